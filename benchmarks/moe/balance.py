"""How even routers become, by bias or by loss: python benchmarks/moe/balance.py writes balance.md

Fixed scores: 16 experts, 2 for each of 4,096 tokens, sigmoid scores of normal logits with offsets from -1 to 1; only
the bias moves. Training: a decoder on an order-2 Markov source (12 symbols, 32 tokens a row), 8 experts, 2 a token.
MaxVio is the largest load over the mean load, minus 1.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrl.nets import moe
from jaxrl.nets.language_model import language_model
from jaxrl.nets.moe import MoEConfig
from jaxrl.nets.transformer import TransformerConfig, router_statistics
from jaxrl.posttrain import sft, update
from jaxrl.types import TokenBatch

SEEDS = (0, 1, 2)
STEPS = 200
PLAIN = MoEConfig(8, 2, 32, score="sigmoid", normalise=True)
SETTINGS = {  # gating, rate of the bias
    "nothing": (PLAIN, 0.0),
    "balance loss 0.01": (dataclasses.replace(PLAIN, aux_coef=0.01), 0.0),
    "bias, rate 0.001": (dataclasses.replace(PLAIN, bias=True), 1e-3),
}


@jax.jit
def of_fixed_scores(rate: float, seed: int) -> jax.Array:
    """MaxVio after 0, 50, 100 and 400 updates."""
    config = MoEConfig(16, 2, 1, score="sigmoid", normalise=True, bias=True)
    logits = jax.random.normal(jax.random.key(seed), (1, 4096, 16)) + jnp.linspace(-1, 1, 16)

    def step(bias, _):
        found = moe.statistics(config, logits, moe.route(config, logits, bias))
        return bias - rate * jnp.sign(found.load - 1 / 16), found.max_violation

    return jax.lax.scan(step, jnp.zeros(16), length=401)[1][jnp.array([0, 50, 100, 400])]


def source(key: jax.Array, rows: int) -> TokenBatch:
    """Rows of a source whose next symbol depends on the last two."""
    first, second = jax.random.split(key)
    table = 2.0 * jax.random.normal(first, (12, 12, 12))

    def step(pair, key):
        after = jax.random.categorical(key, table[pair[..., 0], pair[..., 1]])
        return jnp.stack([pair[..., 1], after], axis=-1), after

    _, tokens = jax.lax.scan(step, jnp.zeros((rows, 2), jnp.int32), jax.random.split(second, 32))
    return TokenBatch(tokens.T, jnp.ones((rows, 32)))


def trained(gating: MoEConfig, rate: float) -> list[tuple[float, float, float]]:
    """For each seed: loss of the last 20 steps, MaxVio before and after, of the layer where it is largest."""
    sizes = {"vocab_size": 12, "width": 48, "layers": 2, "heads": 4, "kv_heads": 4, "ffn": 96, "max_length": 32}
    config = TransformerConfig(**sizes, experts=gating)
    model = language_model(config)
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=3e-3, router_bias_rate=rate))
    recipe = sft.make(sft.SFTConfig(batch=16), model, optimizer)

    @jax.jit
    def run(seed):
        data = source(jax.random.key(seed), 4096)
        state = recipe.init(jax.random.key(seed + 10), model.init(jax.random.key(seed + 20)))
        violation = lambda params: router_statistics(config, params, data.tokens[:64]).max_violation.max()
        last, metrics = jax.lax.scan(lambda state, _: recipe.step(state, data), state, length=STEPS)
        return metrics["train/loss"][-20:].mean(), violation(state.params), violation(last.params)

    return [tuple(map(float, run(seed))) for seed in SEEDS]


def main():
    """Measures and writes."""
    lines = ["| rate of the bias | MaxVio at first | after 50 updates | after 100 | after 400 |", "|---" * 5 + "|"]
    spread = lambda values, digits=2: " ".join(f"{value:.{digits}f}" for value in values)
    for rate in (1e-3, 1e-2):
        columns = zip(*(of_fixed_scores(rate, seed) for seed in SEEDS), strict=True)
        lines.append(f"| {rate} | " + " | ".join(map(spread, columns)) + " |")
    lines += ["", "| balanced by | loss | MaxVio before training | after |", "|---" * 4 + "|"]
    for name, setting in SETTINGS.items():
        loss, before, after = zip(*trained(*setting), strict=True)
        lines.append(f"| {name} | {spread(loss, 3)} | {spread(before)} | {spread(after)} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "balance.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
