"""Weights that need not be stored: the same numbers from a seed, wherever they are drawn. Imports numpy alone."""

from collections.abc import Mapping

import numpy as np


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """float32 tensors by name: normal(0, 0.2), about 1 for scales of norms."""
    draw = np.random.default_rng(seed)
    norm = lambda name: "norm" in name and name.endswith("weight")
    return {n: (norm(n) + draw.normal(0, 0.2, shapes[n])).astype(np.float32) for n in sorted(shapes)}
