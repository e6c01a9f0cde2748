"""The adding problem: python benchmarks/nets/adding.py prints a table and writes adding.json

A row holds 50 numbers of U(0, 1) and two marks, one in each half; the sum of the marked numbers is asked for at the end
(Hochreiter and Schmidhuber 1997; Le et al. 2015, arXiv:1504.00941). Always answering 1 has a squared error of 1/6.
"""

import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro

from jaxrl.nets.recurrent import RNN, RNNConfig

CELLS = {"tanh": RNNConfig("tanh", 48), "gru": RNNConfig("gru", 48), "lstm": RNNConfig("lstm", 48)}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 1500
    batch: int = 64
    length: int = 50
    learning_rate: float = 1e-2
    out: Path = Path(__file__).with_suffix(".json")


def problems(key, batch, length):
    """(x [T, N, 2], answers [N])."""
    numbers, first, second = jax.random.split(key, 3)
    values = jax.random.uniform(numbers, (length, batch))
    places = jnp.stack(
        [
            jax.random.randint(first, (batch,), 0, length // 2),
            jax.random.randint(second, (batch,), length // 2, length),
        ]
    )
    marks = jax.nn.one_hot(places, length, axis=0).sum(1)
    return jnp.stack([values, marks], axis=-1), (values * marks).sum(0)


def train(config: RNNConfig, options: Options, seed):
    """The mean squared error of each step, [steps]."""
    net = RNN(config)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(options.learning_rate))
    start, draws = jax.random.split(jax.random.key(seed))

    def loss(params, key):
        x, answers = problems(key, options.batch, options.length)
        last = net.apply(params["net"], x)[0][-1]
        return jnp.square(last @ params["out"]["kernel"] + params["out"]["bias"] - answers).mean()

    def step(state, key):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    out = {"kernel": jnp.zeros(config.features), "bias": jnp.zeros(())}
    params = {"net": net.init(start, jnp.zeros((1, 1, 2))), "out": out}
    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(draws, options.steps))[1]


def main():
    """Measures and writes."""
    options = tyro.cli(Options)
    rows = []
    print("| cell | seed | squared error, last 100 steps | seconds of all seeds, with compilation |\n|---|---|---|---|")
    for cell, config in CELLS.items():
        began = time.perf_counter()
        errors = jax.jit(jax.vmap(partial(train, config, options)))(jnp.asarray(options.seeds))[:, -100:].mean(1)
        errors = [float(error) for error in errors]
        seconds = time.perf_counter() - began
        for seed, error in zip(options.seeds, errors, strict=True):
            rows.append({"cell": cell, "seed": seed, "error": error, "seconds": seconds})
            print(f"| {cell} | {seed} | {error:.4f} | {seconds:.0f} |", flush=True)
    setting = {name: value for name, value in vars(options).items() if name != "out"}
    options.out.write_text(json.dumps({"options": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
