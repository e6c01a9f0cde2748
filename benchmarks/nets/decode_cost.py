"""A token's cost against the length of the past: python benchmarks/nets/decode_cost.py writes decode_cost.json

One step of decoding of a network of 4 layers, width 256 and 8 heads, one row, whose cache holds so many columns: with
softmax, with latent attention (64 numbers and 16 turned ones a token), with linear attention and with 256 random
features. All forms take turns in one process; CPU milliseconds, the median over rounds.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.nets.latent_attention import LatentConfig
from jaxrl.nets.linear_attention import LinearConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run."""

    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    rounds: int = 100
    layers: int = 4
    out: Path = Path(__file__).with_suffix(".json")


FORMS = {
    "softmax": {},
    "latent": {"latent": LatentConfig(kv_rank=64, nope=32, rope=16, value=32)},
    "linear": {"linear": LinearConfig()},
    "performer": {"linear": LinearConfig("performer", random=256)},
}


def program(changes: dict, length: int, layers: int):
    """(compiled step, parameters, a cache that lacks one column)."""
    sizes = {"heads": 8, "kv_heads": 8, "max_length": length}
    model = language_model(presets.llama_like(256, 256, layers, **sizes, **changes))
    params = jax.jit(model.init)(jax.random.key(0))
    cache = model.init_cache(1, length)._replace(length=jnp.int32(length - 1))
    step = jax.jit(lambda params, token, cache: model.apply(params, token, cache=cache), donate_argnums=2)
    return step.lower(params, jnp.zeros((1, 1), jnp.int32), cache).compile(), params, cache


def measure(length: int, options: Options) -> dict[str, float]:
    """Median milliseconds of each form."""
    programs = {name: program(changes, length, options.layers) for name, changes in FORMS.items()}
    caches = {name: cache for name, (_, _, cache) in programs.items()}
    laps: dict[str, list[float]] = {name: [] for name in FORMS}
    token = jnp.zeros((1, 1), jnp.int32)
    for _ in range(options.rounds):
        for name, (step, params, _) in programs.items():
            cache = caches[name]._replace(length=jnp.int32(length - 1))
            begun = time.process_time()
            caches[name] = jax.block_until_ready(step(params, token, cache))[1]
            laps[name].append(1e3 * (time.process_time() - begun))
    return {name: statistics.median(times[2:]) for name, times in laps.items()}


def main(options: Options):
    """Measures and writes."""
    rows = []
    print("| cached tokens | " + " | ".join(f"{name}, CPU ms" for name in FORMS) + " |\n" + "|---" * 5 + "|")
    for length in options.lengths:
        rows.append({"length": length, "cpu_ms": measure(length, options)})
        print(f"| {length} | " + " | ".join(f"{ms:.2f}" for ms in rows[-1]["cpu_ms"].values()) + " |", flush=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
