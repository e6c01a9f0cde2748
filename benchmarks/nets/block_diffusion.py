"""Block diffusion between autoregression and diffusion: python benchmarks/nets/block_diffusion.py [seeds]

An order-2 Markov language of 12 symbols whose entropy is known, rows of 24. The same network is trained by next-token
prediction and by block diffusion with blocks of 1, 4 and 24 tokens, and at 4 also with times clipped to [0.3, 0.8].
Figures are nats a token on held-out rows: an exact NLL, or the bound, by 24 masks of exactly m tokens
a row and block (the full schedule, whatever was trained with). Trigrams and pairs are counted on the same training
rows (modified Kneser-Ney).
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import diffusion
from jaxrl.data import markov
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain.score import log_probs_of

sys.path.insert(0, str(Path(__file__).parent))
from training import autoregressive, diffused, ngram_nll, rows_of

SYMBOLS, LENGTH, ROWS, HELD_OUT, SAMPLES = 12, 24, 20_000, 256, 24
MASK, BEGIN = SYMBOLS, SYMBOLS + 1
MODEL = language_model(
    TransformerConfig(
        vocab_size=SYMBOLS + 2, width=48, layers=2, heads=4, kv_heads=4, ffn=96, max_length=2 * LENGTH + 2
    )
)
STEPS, BATCH = 1200, 32
CLIPPED = (0.3, 0.8)
SPANS = np.concatenate([diffusion.intervals(step=0.1, widths=(0.5, 0.7, 0.9)), [(1e-3, 1.0)]]).astype(np.float32)


def measure(seeds: list[int]) -> dict[str, list]:
    """Each figure for all seeds, which run in one program."""
    of_seeds = jax.vmap
    keys = [jax.random.split(jax.random.key(seed)) for seed in seeds]
    tables = [markov.chain(key[0], symbols=SYMBOLS, order=2) for key in keys]
    tokens = [
        markov.sample(key[1], table, rows=ROWS + HELD_OUT, length=LENGTH)
        for key, table in zip(keys, tables, strict=True)
    ]
    split = [(np.asarray(rows[:ROWS]), np.asarray(rows[ROWS:])) for rows in tokens]
    found: dict[str, list] = {
        "entropy rate": [markov.entropy_rate(table) for table in tables],
        "truth": [
            float(-markov.log_probs(table, rows[ROWS:]).mean()) for table, rows in zip(tables, tokens, strict=True)
        ],
        "pairs": [ngram_nll(*parts, 2) for parts in split],
        "trigrams": [ngram_nll(*parts, 3) for parts in split],
    }
    begun = time.time()

    def record(name, value):
        found[name] = np.asarray(value, np.float64).round(4).tolist()
        Path(__file__).with_suffix(".json").write_text(json.dumps({"seed": seeds, **found}, indent=1) + "\n")
        print(f"{name:>40} {found[name]}  ({time.time() - begun:.0f} s)", flush=True)

    whole = jnp.stack(tokens)
    train, test = whole[:, :ROWS], rows_of(whole[:, ROWS:])
    behind = lambda x: rows_of(jnp.pad(x, ((0, 0), (0, 0), (1, 0)), constant_values=BEGIN))
    sizes = {"steps": STEPS, "batch": BATCH}
    params, losses = autoregressive(MODEL, behind(train), seeds, **sizes)
    nll = lambda params, batch: -log_probs_of(MODEL, params, batch)[0].mean()
    record("AR", jax.jit(of_seeds(nll))(params, behind(test.tokens)))
    record("AR, loss std", losses[:, -150:].std(1))

    def bound(params, block):
        def one(params, batch):
            options = {"mask_id": MASK, "samples": SAMPLES, "block": block}
            return -diffusion.log_likelihood(MODEL, params, batch, jax.random.key(100), **options).mean() / LENGTH

        return jax.jit(of_seeds(one))(params, test)

    def search(params, batch):
        value_of = lambda part: diffusion.values(MODEL, params, part, mask_id=MASK, block=4)
        return diffusion.variances(value_of, batch, jax.random.key(7), jnp.asarray(SPANS), block=4, mask_id=MASK)

    for name, block, options in (
        ("block 1", 1, {}),
        ("block 4", 4, {}),
        ("block 24", LENGTH, {}),
        ("block 4, clipped", 4, {"span": CLIPPED, "confine": True}),
    ):
        params, losses = diffused(MODEL, rows_of(train), seeds, mask_id=MASK, block=block, **sizes, **options)
        record(name, bound(params, block))
        record(f"{name}, loss std", losses[:, -150:].std(1))
        if name == "block 4":
            spread = np.asarray(jax.jit(of_seeds(search))(params, test))
            record("block 4, span of least variance", SPANS[spread.argmin(1)])
            record("block 4, variance there", spread.min(1))
            record("block 4, variance over all times", spread[:, -1])
    return found


def main():
    seeds = [int(x) for x in sys.argv[1:]] or [0, 1, 2]
    found = measure(seeds)
    for name, values in found.items():
        shown = " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in values)
        print(f"| {name} | {shown} |")


if __name__ == "__main__":
    main()
