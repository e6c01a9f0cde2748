"""Error of random features: python benchmarks/nets/performer.py prints a table and writes performer.json

64 queries and keys of 16 numbers, of length `norm` once divided by 16^(1/4); the exact weights before their division,
A = exp(q . k), against phi(q) . phi(k) of m features, over 40 draws (Choromanski et al. 2020, arXiv:2009.14794, figure
4). "error": root mean square of (A' - A) / A; "output": squared error of the attention's output over its square;
"slope": of log error in log m. Trigonometric features are those of random Fourier features, which may be negative.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxrl.nets.linear_attention import positive_features, random_projection


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    features: tuple[int, ...] = (16, 64, 256, 1024)
    norms: tuple[float, ...] = (1.0, 2.0)
    draws: int = 40
    length: int = 64
    size: int = 16
    out: Path = Path(__file__).with_suffix(".json")


def trigonometric(x: jax.Array, w: jax.Array) -> jax.Array:
    """exp(|x'|^2 / 2) (cos w x', sin w x') / sqrt(m): its products are exp(q . k / sqrt(Dh)) on average."""
    x = x * x.shape[-1] ** -0.25
    angle = x @ w.T
    both = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return jnp.exp(jnp.sum(jnp.square(x), axis=-1, keepdims=True) / 2) * both * w.shape[0] ** -0.5


FORMS = {
    "independent": (positive_features, False),
    "orthogonal": (positive_features, True),
    "trigonometric": (trigonometric, False),
}


@functools.partial(jax.jit, static_argnames=("options", "form", "m"))
def errors(norm: float, seed: int, *, options: Options, form: str, m: int) -> tuple[jax.Array, jax.Array]:
    """(error of A, error of the output)."""
    phi, orthogonal = FORMS[form]
    kq, kk, kv, kw = jax.random.split(jax.random.key(seed), 4)
    unit = lambda key: (lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True))(
        jax.random.normal(key, (options.length, options.size))
    )
    q, k = (unit(key) * norm * options.size**0.25 for key in (kq, kk))  # |q'| = norm
    v = jax.random.normal(kv, (options.length, options.size))
    exact = jnp.exp(q @ k.T * options.size**-0.5)
    output = exact / exact.sum(1, keepdims=True) @ v

    def one(key):
        w = random_projection(key, m, options.size, orthogonal=orthogonal)
        found = phi(q, w) @ phi(k, w).T
        wrong = found / found.sum(1, keepdims=True) @ v - output
        return jnp.square(found / exact - 1).mean(), jnp.square(wrong).mean() / jnp.square(output).mean()

    weights, outputs = jax.lax.map(one, jax.random.split(kw, options.draws))
    return jnp.sqrt(weights.mean()), outputs.mean()


def main(options: Options):
    """Measures and writes."""
    rows = []
    heads = "".join(f" m = {m}, error / output |" for m in options.features)
    print(f"| form | norm | seed |{heads} slope |\n|{'---|' * (len(options.features) + 4)}")
    for norm in options.norms:
        for form in FORMS:
            for seed in options.seeds:
                found = [
                    tuple(map(float, errors(norm, seed, options=options, form=form, m=m))) for m in options.features
                ]
                slope = np.polyfit(np.log(options.features), np.log([e for e, _ in found]), 1)[0]
                given = {"form": form, "norm": norm, "seed": seed, "slope": float(slope)}
                rows.append(given | {"features": options.features, "errors": found})
                cells = "".join(f" {e:.3f} / {o:.4g} |" for e, o in found)
                print(f"| {form} | {norm} | {seed} |{cells} {slope:.2f} |", flush=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
