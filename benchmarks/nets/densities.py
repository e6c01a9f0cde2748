"""Densities of binarised 8 x 8 digits: python benchmarks/nets/densities.py prints a table and writes densities.json

scikit-learn's digits, a pixel being 1 from 8 of 16 on; 1,300 images of a fixed permutation are learnt, the other 497
judge, every 100 steps. It needs scikit-learn, or --digits FILE: its images as one array of a .npy file, which an
interpreter with scikit-learn writes by

    python -c "import numpy, sklearn.datasets as d; numpy.save('digits.npy', d.load_digits().data)"
"""

import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxrl.nets.densities import bernoulli
from jaxrl.nets.densities.fvsbn import fvsbn
from jaxrl.nets.densities.made import MADEConfig, made
from jaxrl.nets.densities.nade import NADEConfig, eonade, nade
from jaxrl.nets.densities.pixelcnn import PixelCNNConfig, pixelcnn

DENSITIES = {
    "FVSBN": fvsbn(64),
    "NADE-64": nade(NADEConfig(64, (64,))),
    "MADE-256, direct": made(MADEConfig(64, (256,), direct=True)),
    "EoNADE-256-256": eonade(NADEConfig(64, (256, 256))),
    "PixelCNN, 5 layers of 16": pixelcnn(PixelCNNConfig(8, 8, channels=16, layers=5)),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run."""

    digits: Path | None = None
    """A .npy file of the 1797 images; none: scikit-learn's own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 3000
    batch: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    only: tuple[str, ...] = tuple(DENSITIES)
    out: Path = Path(__file__).with_suffix(".json")


def images(file: Path | None) -> tuple[jax.Array, jax.Array]:
    """Training and test images, [1300, 64] and [497, 64]."""
    if file is not None:
        values = np.load(file).reshape(-1, 64)
    else:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise SystemExit(f"scikit-learn is not there: install it, or see --digits in {__file__}") from None
        values = load_digits().data
    binary = np.random.default_rng(0).permutation(np.asarray(values >= 8, np.float32))
    return jnp.asarray(binary[:1300]), jnp.asarray(binary[1300:])


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name: str, options: Options, seed, train, test):
    """NLL in nats of the test images every 100 steps, and at the end of the training images."""
    density = DENSITIES[name]
    optimizer = optax.adamw(options.learning_rate, weight_decay=options.weight_decay)
    start, draws = jax.random.split(jax.random.key(seed))
    nll = lambda params, x: -density.log_prob(params, x).mean()

    def step(state, key):
        params, moments = state
        rows, key = jax.random.split(key)
        x = train[jax.random.randint(rows, (options.batch,), 0, len(train))]
        gradient = jax.grad(lambda params: density.loss(params, x, key).mean())(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    def hundred(state, keys):
        state, _ = jax.lax.scan(step, state, keys)
        return state, nll(state[0], test)

    params = density.init(start)
    keys = jax.random.split(draws, (options.steps // 100, 100))
    state, tests = jax.lax.scan(hundred, (params, optimizer.init(params)), keys)
    return tests, nll(state[0], train)


def main():
    """Measures and writes."""
    options = tyro.cli(Options)
    train, test = images(options.digits)
    share = (train.sum(0) + 1) / (len(train) + 2)
    independent = -float(bernoulli(jnp.log(share) - jnp.log1p(-share), test).sum(-1).mean())
    rows = [{"density": "independent pixels", "parameters": 64, "best": independent, "last": independent}]
    print("| density | parameters | seed | best test NLL | last | train | seconds with compilation |")
    print("|---" * 7 + "|")
    print(f"| independent pixels | 64 | | {independent:.2f} | | | |", flush=True)
    for name in options.only:
        shapes = jax.eval_shape(DENSITIES[name].init, jax.random.key(0))
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        for seed in options.seeds:
            began = time.perf_counter()
            tests, trained = jax.device_get(run(name, options, seed, train, test))
            row = {"density": name, "parameters": count, "seed": seed, "best": float(tests.min())}
            row |= {"last": float(tests[-1]), "train": float(trained), "seconds": time.perf_counter() - began}
            rows.append(row)
            cells = " | ".join(f"{row[field]:.2f}" for field in ("best", "last", "train"))
            print(f"| {name} | {count} | {seed} | {cells} | {row['seconds']:.0f} |", flush=True)
    setting = {name: value for name, value in vars(options).items() if name not in ("out", "digits")}
    options.out.write_text(json.dumps({"options": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
