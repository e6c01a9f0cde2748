"""Rotary position embedding in the half-split layout, and its context-extension variants."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every angle divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class DynamicNTK:
    """The base grows with the sequence once it is longer than `original_length` (bloc97 2023, "dynamic NTK").

    With n = max(position) + 1, base' = base * (factor * n / original_length - (factor - 1)) ** (d / (d - 2)).
    Deviation from Hugging Face: n is taken per row, so that a row does not depend on its neighbours in the
    batch. Keys that stand in a cache keep the angle of the length at which they were written, so past
    `original_length` a cached decode is not exactly the full forward pass (there, too).
    """

    factor: float
    original_length: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Long waves divided by `factor`, short ones kept, a blend between (Llama 3.1, arXiv:2407.21783)."""

    factor: float
    original_length: int
    low_frequency: float = 1.0
    high_frequency: float = 4.0


@dataclass(frozen=True)
class Yarn:
    """Interpolation per dimension, cos and sin times `attention_factor` (Peng et al. 2023, arXiv:2309.00071).

    Dimensions that turn more than `beta_fast` times over `original_length` keep their frequency, those that
    turn less than `beta_slow` times are divided by `factor`, with a linear ramp between.
    `attention_factor=None` is the paper's 0.1 ln(factor) + 1. `truncate` rounds the ramp's ends to whole
    dimensions, as the released code does. With `mscale_all_dim` (DeepSeek) attention's scores are multiplied by
    (0.1 mscale_all_dim ln(factor) + 1)^2 besides, see `score_factor`.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    mscale_all_dim: float = 0.0


RopeScaling = LinearScaling | DynamicNTK | Llama3Scaling | Yarn


def frequencies(head_dim: int, *, base: float = 10_000.0, scaling: RopeScaling | None = None) -> jax.Array:
    """Angles per position, f_i = base ** (-2i / d), changed by the scaling.

    Args:
      head_dim: d, how many numbers of a head turn, even.
      base: theta of the paper.
      scaling: one of the dataclasses of this file, or None. `DynamicNTK` depends on the length of the
      sequence
        and leaves them as they are here; `rotation` applies it.

    Returns:
      [d / 2] float32, in radians per position.

    Raises:
      ValueError: if `head_dim` is odd.

    Su et al. 2021, "RoFormer", arXiv:2104.09864.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, but rotary embedding turns pairs: give an even head_dim")
    f = base ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    match scaling:
        case LinearScaling(factor):
            return f / factor
        case Llama3Scaling(factor, original_length, low, high):
            turns = original_length * f / (2 * math.pi)
            keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
            return keep * f + (1 - keep) * f / factor
        case Yarn():
            first, last = (
                head_dim * math.log(scaling.original_length / (2 * math.pi * beta)) / (2 * math.log(base))
                for beta in (scaling.beta_fast, scaling.beta_slow)
            )
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            span = last - first if last > first else 0.001
            interpolate = jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - first) / span, 0.0, 1.0)
            return interpolate * f / scaling.factor + (1 - interpolate) * f
    return f


def score_factor(scaling: RopeScaling | None) -> float:
    """What attention's scores are multiplied by, beside what cos and sin are."""
    if not isinstance(scaling, Yarn) or scaling.factor <= 1:
        return 1.0
    return (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0) ** 2


def rotation(
    positions: jax.Array,
    head_dim: int,
    *,
    base: float = 10_000.0,
    scaling: RopeScaling | None = None,
    sections: tuple[int, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position times frequency, computed in float32 whatever the model's type.

    Args:
      positions: [B, T] integers; they may restart in packed rows. With sections also [axes, B, T].
      head_dim, base, scaling: see `frequencies`.
      sections: how many frequencies, from the highest on, turn by each axis of positions; they sum to head_dim / 2
        (M-RoPE: Wang et al. 2024, arXiv:2409.12191, section 2.1). Positions [B, T] are those of all axes.

    Returns:
      (cos, sin), each [B, T, 1, head_dim / 2] float32: the third axis broadcasts over heads.
    """
    if positions.ndim != 2 and not (sections and positions.ndim == 3 and len(positions) == len(sections)):
        raise ValueError(f"positions have shape {positions.shape}, expected [B, T]: one row per sequence")
    f = frequencies(head_dim, base=base, scaling=scaling)[None, None, None, :]
    if isinstance(scaling, DynamicNTK):
        length = positions.max(axis=-1).astype(jnp.float32) + 1
        stretch = scaling.factor * jnp.maximum(length / scaling.original_length, 1.0) - (scaling.factor - 1)
        exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / (head_dim - 2)
        f = f * stretch[:, None, None, None] ** -exponent[None, None, None, :]
    turned = positions.astype(jnp.float32)[..., None, None]
    if sections and positions.ndim == 3:
        axis = [i for i, size in enumerate(sections) for _ in range(size)]
        turned = jnp.moveaxis(turned[jnp.array(axis), ..., 0], 0, -1)
    angle = turned * f
    amplitude = 1.0
    if isinstance(scaling, Yarn):
        amplitude = scaling.attention_factor
        if amplitude is None:
            amplitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Turn the pairs (x_i, x_{i + d/2}) by their angles: the half-split layout of Llama and Qwen checkpoints.

    Args:
      x: [B, T, H, Dh] queries or keys.
      cos, sin: [B, T, 1, d / 2] from `rotation`; the first d numbers of a head turn, the others pass (GPT-NeoX:
        Black et al. 2022, arXiv:2204.06745).
      interleaved: turn the pairs (x_2i, x_2i+1) instead, as DeepSeek's checkpoints want; the result is half-split all
        the same, which products of queries with keys do not notice.

    Returns:
      [B, T, H, Dh] in x's type; the turn itself is float32.

    Raises:
      ValueError: angles for more numbers than a head has.
    """
    size = 2 * cos.shape[-1]
    if size > x.shape[-1]:
        raise ValueError(
            f"cos turns {size} numbers of a head, but x has shape {x.shape}: expected at most its last axis"
        )
    wide = x[..., :size].astype(jnp.float32)
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, x[..., size:]], axis=-1)
