"""Vanilla PPO over-optimises a learned reward, PPO-max does not: a made-up language, a reward model from few pairs.

    python benchmarks/ppo_max/run.py            # writes results.json, results.md and curves.png
    python benchmarks/ppo_max/run.py --redraw   # table and figure from results.json

The language is a Markov chain over twelve tokens that ends with probability 0.1 at each token. What people want of a
text, the gold reward, is known here: that it is fluent and says different things,

    gold = mean log-probability of its transitions + 4 x (different tokens / 12).

A small transformer is fine-tuned on samples of the chain. From it come the pairs that a reward model is fitted to until
it knows them by heart, and PPO then maximises that model. Every arm of the comparison starts from the same policy and
the same reward model; only the switches differ. All seeds of an arm are one `vmap`.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import ppo, reward_model, sft, update
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.types import Pairs, Prompts, Rollout, TokenBatch

HERE = Path(__file__).parent
PAD, EOS, FIRST, TOKENS = 0, 1, 2, 12
WIDTH, BATCH, RATE = 16, 128, 1e-3
BLOCK, LAST = 5, 4  # iterations to a point of the curves; points at the end that count as the end
LABELS = {
    "gold": "gold reward: what was wanted",
    "reward/mean": "proxy reward: what was maximised",
    "policy/kl_completion": "KL to the fine-tuned model (nats a text)",
    "policy/entropy": "entropy (nats a token)",
    "completion/length": "length (tokens)",
    "reference/perplexity": "perplexity under the fine-tuned model",
}
SHOWN = tuple(LABELS)
MODEL = language_model(
    TransformerConfig(vocab_size=FIRST + TOKENS, width=32, layers=1, heads=2, kv_heads=2, ffn=64, max_length=32)
)
SAMPLING = Sampling(max_tokens=WIDTH)
SIZES = {"prompts": BATCH, "epochs": 2, "sampling": SAMPLING}
PLAIN = ppo.PPOConfig(**SIZES)
MAX = dataclasses.replace(ppo.PPO_MAX, **SIZES)
ARMS = {
    "PPO, no KL": dataclasses.replace(PLAIN, kl_coef=0.0),
    "PPO": PLAIN,
    "PPO, KL x 5": dataclasses.replace(PLAIN, kl_coef=0.25),
    "PPO-max, no KL": dataclasses.replace(MAX, kl_coef=0.0),
    "PPO-max": MAX,
}


def language(seed: int) -> jax.Array:
    """Log-probabilities `[12 + end, 12 + end]` of the next token: few likely successors, some unlikely, row by row."""
    rng = np.random.default_rng(seed)
    rows = 0.9 * rng.dirichlet(np.full(TOKENS, 0.4), TOKENS)
    rows = np.concatenate([np.full((TOKENS, 1), 0.1), rows], axis=1)
    return jnp.log(jnp.asarray(np.maximum(rows, 1e-3), jnp.float32))


def gold(chain: jax.Array, completions: Rollout) -> jax.Array:
    """The true reward, `[B]`; see the top."""
    tokens = completions.completions
    before = jnp.concatenate(
        [completions.tokens[:, completions.prompt_width - 1 : completions.prompt_width], tokens], 1
    )
    steps = chain[jnp.maximum(before[:, :-1] - FIRST, 0), jnp.maximum(tokens - FIRST + 1, 0)]
    fluency = (steps * completions.mask).sum(1) / completions.lengths
    said = jax.nn.one_hot(jnp.where(completions.mask > 0, tokens - FIRST, -1), TOKENS).max(1).sum(1)
    return fluency + 4.0 * said / TOKENS


def prompts_of(key, number: int) -> Prompts:
    """One random token each."""
    tokens = jax.random.randint(key, (number, 1), FIRST, FIRST + TOKENS)
    return Prompts(tokens, jnp.ones(number, jnp.int32))


def texts(chain: jax.Array, key, number: int) -> TokenBatch:
    """Samples of the language, right-padded, all but the first token to be learnt."""

    def step(last, key):
        token = jax.random.categorical(key, chain[jnp.maximum(last - FIRST, 0)])
        token = jnp.where(last <= EOS, PAD, jnp.where(token == 0, EOS, token - 1 + FIRST))
        return token, token

    first = jax.random.randint(jax.random.fold_in(key, 0), (number,), FIRST, FIRST + TOKENS)
    keys = jax.random.split(jax.random.fold_in(key, 1), WIDTH)
    rest = jax.lax.scan(step, first, keys)[1].T
    tokens = jnp.concatenate([first[:, None], rest], 1)
    return TokenBatch(tokens, (tokens != PAD).astype(jnp.float32).at[:, 0].set(0.0))


def example_of(completions: Rollout) -> TokenBatch:
    """Prompt and completion, right-padded: prompts are one token here, so nothing moves."""
    mask = jnp.concatenate([jnp.zeros((completions.lengths.shape[0], 1)), completions.mask], axis=1)
    return TokenBatch(completions.tokens, mask)


def sample(params, key, number: int) -> Rollout:
    prompts = prompts_of(jax.random.fold_in(key, 0), number)
    return rollout(MODEL, params, prompts, jax.random.fold_in(key, 1), sampling=SAMPLING, eos_id=EOS, pad_id=PAD)


def trained(recipe, key, params, data, steps: int):
    state = recipe.init(key, params)
    state, metrics = jax.lax.scan(lambda state, _: recipe.step(state, data), state, length=steps)
    return state.params, jax.tree.map(lambda x: x[-1], metrics)


def prepare(key, chain, *, pairs: int, rm_steps: int):
    """A fine-tuned policy, a reward model that knows its pairs by heart, and how good that model is elsewhere."""
    keys = jax.random.split(key, 8)
    adam = lambda rate: update.make_optimizer(update.OptimizerConfig(learning_rate=rate))
    teach = sft.make(sft.SFTConfig(batch=128), MODEL, adam(3e-3))
    policy, learnt = trained(teach, keys[0], MODEL.init(keys[1]), texts(chain, keys[2], 4096), 600)

    def compare(key, number):
        one, other = (sample(policy, jax.random.fold_in(key, side), number) for side in (0, 1))
        better = gold(chain, one) > gold(chain, other)
        pick = lambda first: jax.tree.map(
            lambda a, b: jnp.where((better == first)[:, None], a, b), example_of(one), example_of(other)
        )
        return Pairs(pick(True), pick(False))

    judge = reward_model.make(reward_model.RMConfig(batch=min(100, pairs)), MODEL, adam(2e-3))
    data = compare(keys[3], pairs)
    rm, fitted = trained(judge, keys[4], policy, data, rm_steps)
    fresh = compare(keys[5], 2000)
    score = lambda side: reward_model.score(MODEL, rm, side)
    about = {
        "sft_loss": learnt["train/loss"],
        "rm_loss": fitted["train/loss"],
        "rm_accuracy": (score(data.chosen) > score(data.rejected)).mean(),
        "rm_accuracy_on_new_pairs": (score(fresh.chosen) > score(fresh.rejected)).mean(),
    }
    return policy, rm, about


def run_arm(config, chains, policies, judges, *, steps: int):
    """All seeds side by side: {metric: [seeds, steps]}."""
    adam = lambda rate: update.make_optimizer(update.OptimizerConfig(learning_rate=rate))
    recipe = ppo.make(
        config, MODEL, adam(RATE), critic_optimizer=adam(3 * RATE), eos_id=EOS, pad_id=PAD, max_grad_norm=0.5
    )

    def one(seed, chain, policy, judge):
        critic = judge if config.critic_warmup else None  # PPO-max's critic begins as the reward model
        prompts = prompts_of(jax.random.key(99), 1024)

        def step(state, _):
            completions, _ = recipe.sample(state, prompts)
            scores = reward_model.score_rollout(MODEL, judge, completions)
            state, metrics = recipe.learn(state, completions, scores)
            return state, metrics | {"gold": gold(chain, completions).mean(), "proxy/std": scores.std()}

        return jax.lax.scan(step, recipe.init(jax.random.key(seed), policy, critic), length=steps)[1]

    seeds = jnp.arange(chains.shape[0])
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(seeds, chains, policies, judges))


def measure(options) -> dict:
    begun = time.perf_counter()
    chains = jnp.stack([language(seed) for seed in range(options.seeds)])
    keys = jax.vmap(jax.random.key)(jnp.arange(100, 100 + options.seeds))
    make = jax.jit(jax.vmap(lambda key, chain: prepare(key, chain, pairs=options.pairs, rm_steps=options.rm_steps)))
    policies, judges, about = jax.tree.map(np.asarray, make(keys, chains), is_leaf=lambda x: isinstance(x, jax.Array))
    arms = {}
    for name, config in ARMS.items():
        rows = run_arm(config, chains, policies, judges, steps=options.steps)
        blocks = {key: rows[key].reshape(options.seeds, -1, BLOCK).mean(-1) for key in SHOWN}
        arms[name] = {key: np.round(value, 3).tolist() for key, value in blocks.items()}
        print(
            f"{name}: gold {np.round(blocks['gold'][:, -1], 2)} after {time.perf_counter() - begun:.0f} s", flush=True
        )
    about = {key: np.round(value, 3).tolist() for key, value in about.items()}
    seconds = round(time.perf_counter() - begun)
    settings = {"seeds": options.seeds, "steps": options.steps, "pairs": options.pairs, "rm_steps": options.rm_steps}
    return {"settings": settings, "jax": jax.__version__, "seconds": seconds, "reward_model": about, "arms": arms}


def table(results: dict) -> str:
    last = lambda rows, key: np.mean(np.asarray(rows[key])[:, -LAST:], axis=1)
    lines = [
        f"| arm | gold: first {BLOCK} | best | end | end, worst seed | proxy: end | KL | entropy | length |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in results["arms"].items():
        curve = np.asarray(rows["gold"])
        end = last(rows, "gold")
        others = [last(rows, key).mean() for key in SHOWN[1:5]]
        figures = [curve[:, 0].mean(), curve.max(axis=1).mean(), end.mean(), end.min(), *others]
        lines.append(f"| {name} | " + " | ".join(f"{x:.2f}" for x in figures) + " |")
    return "\n".join(lines) + "\n"


def draw(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, (key, label) in zip(panels, LABELS.items(), strict=True):
        for number, (name, rows) in enumerate(results["arms"].items()):
            values = np.asarray(rows[key])
            steps = BLOCK * (np.arange(values.shape[1]) + 0.5)
            axes.plot(steps, values.mean(axis=0), color=f"C{number}", label=name, linewidth=2)
            axes.fill_between(
                steps, values.min(axis=0), values.max(axis=0), color=f"C{number}", alpha=0.12, linewidth=0
            )
        if key in ("policy/kl_completion", "reference/perplexity"):
            axes.set_yscale("log")
        axes.set_title(label)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(f"mean and range over {results['settings']['seeds']} seeds")
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120, help=f"iterations, a multiple of {BLOCK}")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--rm-steps", type=int, default=400)
    parser.add_argument("--redraw", action="store_true", help="table and figure from results.json, nothing is run")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    if options.redraw:
        results = json.loads((options.out / "results.json").read_text())
    else:
        results = measure(options)
        (options.out / "results.json").write_text(json.dumps(results) + "\n")
    settings = results["settings"]
    about = (
        f"`python benchmarks/ppo_max/run.py`: {settings['seeds']} seeds, {settings['steps']} iterations of {BATCH} "
        f"texts, a reward model from {settings['pairs']} pairs that orders "
        f"{np.mean(results['reward_model']['rm_accuracy_on_new_pairs']):.0%} of new pairs right. Means over the seeds; "
        f"best is the highest point of {BLOCK} iterations, end the last {BLOCK * LAST} iterations.\n\n"
    )
    (options.out / "results.md").write_text(about + table(results))
    draw(results, options.out / "curves.png")
    print(table(results))


if __name__ == "__main__":
    main()
