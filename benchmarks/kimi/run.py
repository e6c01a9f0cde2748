"""Kimi k1.5 on sums of digits: what a length reward does to length and accuracy, and the ways from long to short.

    python benchmarks/kimi/run.py --seed 0    # adds a seed to results.json, then writes results.md and curves.png
    python benchmarks/kimi/run.py --redraw    # table and figure from results.json

The task is the sum of four digits modulo 10 with its partial sums (`jaxrl.data.digit_sums`). The base
model is fine-tuned on workings that say each step one to three times, `3518:` -> `s8s8s9s7s7s7=7`, and stopped early.
Each arm starts from it: mirror descent as `recipes.KIMI_RUN` has it, without and with the length reward; GRPO the same;
and Kimi's long2short: tuning on the shortest right answer of eight, DPO on pairs by length, averaging the weights of
the base and the first of them, and a second phase of RL with the length reward after mirror descent without it.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl.data.digit_sums import ALPHABET, MARKER, digit_sums
from jaxrl.data.split import split_by_problem
from jaxrl.data.tokenizer import CharTokenizer
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import grpo, long2short, preference, rewards, sft, task, update
from jaxrl.posttrain.preference import DPOConfig
from jaxrl.posttrain.recipes.kimi import KIMI_RUN
from jaxrl.posttrain.rollout import Sampling

HERE = Path(__file__).parent
TOKENIZER = CharTokenizer(ALPHABET)
MODEL = language_model(
    TransformerConfig(vocab_size=TOKENIZER.vocab_size, width=64, layers=2, heads=4, kv_heads=4, ffn=256, max_length=32)
)
SAMPLING = Sampling(max_tokens=24)
RATE, ITERATIONS, WARMUP, BASE_STEPS, SHORT_STEPS, DPO_STEPS = 3e-4, 40, 10, 1200, 60, 60
KIMI = dataclasses.replace(KIMI_RUN.grpo, length_weight=0.0, prioritised=False, sampling=SAMPLING)
GRPO = dataclasses.replace(KIMI, variant="grpo", kl_coef=0.0)
SHORT = {"length_weight": 0.5, "length_warmup": WARMUP}
CURVES = {
    "mirror descent": KIMI,
    "mirror descent, length reward": dataclasses.replace(KIMI, **SHORT),
    "GRPO": GRPO,
    "GRPO, length reward": dataclasses.replace(GRPO, **SHORT),
}
SECOND = dataclasses.replace(KIMI, length_weight=0.5, length_warmup=0)
TWICE = "a second phase after mirror descent, length reward"


def repeated(record: dict, random: np.random.Generator) -> dict:
    """The worked example of a problem, each step one to three times."""
    sums = np.cumsum([int(digit) for digit in record["prompt"][:-1]])[1:] % 10
    steps = "".join(f"s{value}" * random.integers(1, 4) for value in sums)
    return {**record, "completion": f"{steps}={record['answer']}"}


def adam(rate: float):
    return update.make_optimizer(update.OptimizerConfig(learning_rate=rate))


def trained(recipe, key, params, data, steps: int):
    run = jax.jit(lambda state, data: jax.lax.scan(lambda s, _: recipe.step(s, data), state, length=steps)[0])
    return run(recipe.init(key, params), data).params


def measure(seed: int) -> dict:
    begun, random = time.perf_counter(), np.random.default_rng(seed)
    training, held_out = split_by_problem(digit_sums(seed=seed), held_out=512, column="prompt")
    examples = task.examples_of([repeated(record, random) for record in training[:4096]], TOKENIZER)
    key = lambda number: jax.random.fold_in(jax.random.key(seed), number)
    cosine = update.OptimizerConfig(learning_rate=3e-3, warmup_steps=20, decay="cosine", decay_steps=2000)
    teach = sft.make(sft.SFTConfig(batch=64), MODEL, update.make_optimizer(cosine))
    base = trained(teach, key(1), jax.jit(MODEL.init)(key(0)), examples, BASE_STEPS)
    exact = partial(rewards.exact_answer, marker=TOKENIZER.token_id(MARKER))
    prompts, answers = task.prompts_of(held_out, TOKENIZER), task.answers_of(held_out, TOKENIZER)
    generate = task.make_generate(MODEL, TOKENIZER, SAMPLING)

    def judged(params) -> dict:
        drawn = generate(params, prompts, key(2))
        return {"accuracy": float(exact(drawn, answers).mean()), "length": float(drawn.lengths.mean())}

    ends, curves = {"base": judged(base)}, {}
    problems = grpo.Problems(task.prompts_of(training, TOKENIZER), task.answers_of(training, TOKENIZER))

    def reinforced(config, params):
        recipe = grpo.make(config, MODEL, adam(RATE), eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id)
        step = grpo.fused(recipe, exact, config)
        run = jax.jit(lambda state, data: jax.lax.scan(lambda s, _: step(s, data), state, length=ITERATIONS))
        state, rows = run(recipe.init(key(3), params), problems)
        return state.params, {name: np.asarray(rows[name]) for name in ("reward/mean", "completion/length")}

    after = {}
    for name, config in CURVES.items():
        after[name], rows = reinforced(config, base)
        curves[name] = {metric: np.round(values, 3).tolist() for metric, values in rows.items()}
        ends[name] = judged(after[name])
        print(name, ends[name], f"{time.perf_counter() - begun:.0f} s", flush=True)
    ends[TWICE] = judged(reinforced(SECOND, after["mirror descent"])[0])
    print(TWICE, ends[TWICE], flush=True)
    drawn = long2short.sample(
        MODEL, base, TOKENIZER, training[:2048], rewards.exact_reward(marker=MARKER), key(4),
        sampling=SAMPLING, samples=8, batch=128,
    )  # fmt: skip
    short, failed = long2short.select(drawn, keep="shortest")
    pairs, _ = long2short.length_pairs(drawn)
    gentle = sft.make(sft.SFTConfig(batch=64), MODEL, adam(1e-3))
    tuned = trained(gentle, key(5), base, task.examples_of(short, TOKENIZER), SHORT_STEPS)
    prefer = preference.make(DPOConfig(batch=64, beta=0.1), MODEL, adam(1e-4))
    data = jax.jit(prefer.reference)(base, task.pairs_of(pairs, TOKENIZER))
    ends |= {
        "shortest of 8, SFT": judged(tuned),
        "weights averaged with it": judged(long2short.merge(base, tuned)),
        "DPO on pairs by length": judged(trained(prefer, key(6), base, data, DPO_STEPS)),
    }
    about = {"records": len(short), "failed": failed, "pairs": len(pairs)}
    return {"ends": ends, "curves": curves, **about, "seconds": round(time.perf_counter() - begun)}


def table(results: dict) -> str:
    seeds = list(results["seeds"].values())
    lines = [
        f"`python benchmarks/kimi/run.py`, seeds {', '.join(results['seeds'])}: {ITERATIONS} iterations of 32 problems "
        f"x 8 samples, length reward of weight 0.5 from iteration {WARMUP} on. 512 held-out problems, sampled at "
        "temperature 1; in brackets each seed.",
        "",
        "| arm | accuracy | length (tokens) |",
        "|---|---|---|",
    ]
    for name in seeds[0]["ends"]:
        cells = []
        for metric, digits in (("accuracy", 2), ("length", 1)):
            values = [seed["ends"][name][metric] for seed in seeds]
            each = ", ".join(f"{value:.{digits}f}" for value in values)
            cells.append(f"{np.mean(values):.{digits}f} ({each})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", results.get("note", "")]).rstrip() + "\n"


def draw(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    seeds = list(results["seeds"].values())
    for axes, (metric, label) in zip(
        figure.subplots(1, 2), (("reward/mean", "right answers"), ("completion/length", "tokens")), strict=True
    ):
        for number, name in enumerate(CURVES):
            values = np.mean([seed["curves"][name][metric] for seed in seeds], axis=0)
            style = "--" if "length" in name else "-"
            axes.plot(1 + np.arange(ITERATIONS), values, style, color=f"C{number // 2}", label=name)
        axes.axvline(WARMUP + 0.5, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(label)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--redraw", action="store_true", help="table and figure from results.json, nothing is run")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    file = options.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"seeds": {}}
    if not options.redraw:
        results["seeds"][str(options.seed)] = measure(options.seed)
        results["jax"] = jax.__version__
        file.write_text(json.dumps(results) + "\n")
    (options.out / "results.md").write_text(table(results))
    draw(results, options.out / "curves.png")
    print(table(results))


if __name__ == "__main__":
    main()
