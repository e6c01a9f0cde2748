"""How far attention spreads: python benchmarks/nets/dilution.py prints a table and writes dilution.json

256 tokens whose queries and keys are the sines and cosines of their positions, turned by a random rotation, |q| =
sqrt(32). What share of a token's weights lies within 8 places of it, where evenly spread weights have 17 / 256 less the
ends, and what is the rank of the weights? (Attention dilution: Qin et al. 2022, arXiv:2210.10340, section 3.2.)
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxrl.kernels.attention import Chunked, dense
from jaxrl.nets.linear_attention import MAPS, positive_features, random_projection


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    length: int = 256
    size: int = 32
    near: int = 8
    out: Path = Path(__file__).with_suffix(".json")


def features(options: Options, seed: int) -> np.ndarray:
    """Queries, which are the keys too, [length, size]."""
    half = options.size // 2
    angle = np.arange(options.length)[:, None] * 10_000.0 ** (-np.arange(half) / half)
    plain = np.sqrt(2) * np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(options.size, options.size)))
    return plain @ rotation


def weights(x: np.ndarray, options: Options, seed: int) -> dict[str, np.ndarray]:
    """Weights of each form, [length, length], in float64; the scores of softmax are q . k / sqrt(size) times t."""
    scores = x @ x.T / np.sqrt(options.size)
    softmax = lambda s: np.exp(s - s.max(1, keepdims=True)) / np.exp(s - s.max(1, keepdims=True)).sum(1, keepdims=True)
    shares = lambda s: s / s.sum(1, keepdims=True)
    phi = np.asarray(MAPS["elu+1"](jnp.asarray(x, jnp.float32)), np.float64)
    sharp = np.asarray(MAPS["elu+1"](jnp.asarray(3 * x, jnp.float32)), np.float64)
    w = random_projection(jax.random.key(seed), 64, options.size)
    q, k = (np.asarray(positive_features(jnp.asarray(x, jnp.float32), w, largest=n), np.float64) for n in (True, False))
    blocks = np.asarray(dense(Chunked(2 * options.near), (1, 1, options.length, options.length)))[0, 0]
    return {
        "softmax": softmax(scores),
        "softmax, t = 3": softmax(3 * scores),
        "elu + 1": shares(phi @ phi.T),
        "elu + 1, q and k times 3": shares(sharp @ sharp.T),
        "Performer, 64 features": shares(q @ k.T),
        "softmax in blocks of 16": softmax(np.where(blocks, scores, -np.inf)),
        "even": np.full_like(scores, 1 / options.length),
    }


def main(options: Options):
    """Measures and writes."""
    place = np.arange(options.length)
    near = np.abs(place[:, None] - place[None]) <= options.near
    rows = []
    print("| form | seed | weight within 8 | rank |\n|---|---|---|---|")
    for seed in options.seeds:
        for form, found in weights(features(options, seed), options, seed).items():
            mass, rank = float((found * near).sum(1).mean()), int(np.linalg.matrix_rank(found))
            rows.append({"form": form, "seed": seed, "near": mass, "rank": rank})
            print(f"| {form} | {seed} | {mass:.3f} | {rank} |", flush=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
