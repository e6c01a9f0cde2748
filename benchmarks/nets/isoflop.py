"""IsoFLOP profiles of small decoders: python benchmarks/nets/isoflop.py prints a table and writes isoflop.json

Four budgets of compute C, each spent on six widths: M = FLOPs per token of the model, D = C / M tokens. The data are
rows of a Markov chain of order 2 over 16 symbols, so the loss has a known floor. The parabolas' minima give the best M
for each C, and a line through them in logarithms the exponent (DeepSeek-AI 2024, arXiv:2401.02954: 0.524 on their
data). The learning rate falls as 1 / width: at 1e-2 for all, widths of 32 and more learnt next to nothing. Widths, data
and rate were chosen on seed 0 so that minima lie inside. A seed takes 3 to 4 minutes on two busy cores.
"""

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro

from jaxrl import scaling_laws
from jaxrl.data import markov
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.posttrain import sft
from jaxrl.types import TokenBatch

sys.path.insert(0, str(Path(__file__).parent))
from training import ngram_nll


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    widths: tuple[int, ...] = (8, 12, 16, 24, 32, 48)
    budgets: tuple[float, ...] = (2e10, 4e10, 8e10, 1.6e11)
    layers: int = 2
    length: int = 32
    batch: int = 16
    symbols: int = 16
    order: int = 2
    learning_rate: float = 1e-2  # of width 16
    rows: int = 4096
    out: Path = Path(__file__).with_suffix(".json")


def train(options: Options, width: int, data, held_out, key, steps):
    """Held-out loss after so many steps (a traced number: one program for all budgets)."""
    heads = max(width // 16, 1)
    sizes = {"heads": heads, "kv_heads": heads, "ffn": -(-8 * width // 3), "remat": "none"}
    model = language_model(presets.llama_like(options.symbols, width, options.layers, max_length=64, **sizes))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95))
    loss = lambda params, ids: sft.loss(model, params, TokenBatch(ids, jnp.ones(ids.shape)))[0].mean

    def step(i, state):
        params, moments = state
        rows = jax.random.randint(jax.random.fold_in(key, i), (options.batch,), 0, data.shape[0])
        updates, moments = adam.update(jax.grad(loss)(params, data[rows]), moments, params)
        done = i / steps
        share = jnp.where(done < 0.8, jnp.minimum(1.0, (i + 1) / 20), jnp.where(done < 0.9, 0.316, 0.1))
        rate = -options.learning_rate * 16 / width * share
        return optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates)), moments

    params = model.init(key)
    return loss(jax.lax.fori_loop(0, steps, step, (params, adam.init(params)))[0], held_out)


def main():
    """Measures and writes."""
    options = tyro.cli(Options)
    runs, fits = [], []
    print("| seed | C | best M | its loss over the floor | minimum inside |\n|---|---|---|---|---|")
    for seed in options.seeds:
        began = time.perf_counter()
        key = jax.random.key(seed)
        first, second, third = jax.random.split(key, 3)
        table = markov.chain(first, symbols=options.symbols, order=options.order)
        ids = markov.sample(second, table, rows=options.rows + 256, length=options.length)
        floor, counted = markov.entropy_rate(table), ngram_nll(ids[256:], ids[:256], options.order + 1, first=1)
        print(f"seed {seed}: counted n-grams of order {options.order + 1} are {counted - floor:.4f} over the floor")
        own = []
        for width in options.widths:
            program = jax.jit(partial(train, options, width))
            m = scaling_laws.flops_per_token(options.layers, width, options.length)
            for c in options.budgets:
                steps = max(round(c / m / (options.batch * options.length)), 1)
                loss = float(program(ids[256:], ids[:256], third, steps))
                own.append({"seed": seed, "budget": c, "width": width, "size": m, "steps": steps, "loss": loss})
        runs += own
        column = lambda name, own=own: [run[name] for run in own]
        try:
            found = scaling_laws.fit_isoflop(column("budget"), column("size"), column("loss"))
        except ValueError as error:
            print(f"seed {seed}: {error}", flush=True)
            continue
        for c, best in zip(sorted(set(options.budgets)), found.minima, strict=True):
            print(f"| {seed} | {c:.1e} | {best.size:.3g} | {best.loss - floor:.4f} | {best.inside} |", flush=True)
        law = found.model
        took = time.perf_counter() - began
        fits.append({"seed": seed, "seconds": took, "floor": floor, "n-grams": counted, **law._asdict()})
        print(
            f"seed {seed}: M grows as C^{law.exponent:.3f} ({law.low:.3f} to {law.high:.3f}), R^2 {law.r_squared:.3f}, "
            f"{took:.0f} s",
            flush=True,
        )
    setting = {name: value for name, value in vars(options).items() if name != "out"}
    options.out.write_text(json.dumps({"options": setting, "runs": runs, "fits": fits}, indent=1) + "\n")


if __name__ == "__main__":
    main()
