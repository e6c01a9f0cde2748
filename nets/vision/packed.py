"""A Vision Transformer at native resolution: patches of images of any size, packed into one sequence.

Packing after NaViT (Dehghani et al. 2023, arXiv:2307.06304); the vision towers of Qwen2-VL (Wang et al. 2024,
arXiv:2409.12191), Qwen2.5-VL (Bai et al. 2025, arXiv:2502.13923) and Kimi-VL (MoonViT, 2025, arXiv:2504.07491) are
`PackedViT` under different configs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.kernels.attention import Segments
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.layers import Linear, make_norm, normal
from jaxrl.nets.rope import frequencies
from jaxrl.nets.transformer import Block
from jaxrl.nets.vision.layers import colours_remedy, cubic_weight

MOST_WINDOWS = 256  # along an axis of an image


@dataclass(frozen=True)
class PackedViTConfig:
    """Sizes and choices of one network. Frozen and hashable.

    `grid` (rows, columns) is that of learned positions, resampled to each image; None: the rotation alone tells places.
    `rope`: frequencies of rows and then of columns ("halves"), or column, row, column, row, ... ("alternating"). With
    `window` all layers but `full_layers` attend inside windows of so many pixels.
    """

    width: int  # D
    layers: int  # L
    heads: int
    ffn: int
    out: int  # width of the decoder that reads the features
    patch: int = 14  # pixels
    frames: int = 1  # of a video that one patch covers; an image is repeated
    merge: int = 2  # merge x merge patches become one feature
    channels: int = 3
    grid: tuple[int, int] | None = None
    rope: Literal["halves", "alternating"] = "halves"
    patch_bias: bool = False
    norm: Literal["rms", "layer"] = "layer"
    norm_eps: float = 1e-6
    final_norm: bool = False  # before the merger, which has its own
    gated: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"] = "quick_gelu"
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    remat: bool = False  # recompute a layer's inside in the backward pass
    dtype: str = "float32"  # compute
    param_dtype: str = "float32"  # storage

    def __post_init__(self):
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width {self.width} is not a multiple of 4 x heads {self.heads}: rows and columns each turn pairs"
            )
        if self.rope not in ("halves", "alternating"):
            raise ValueError(f"rope is {self.rope!r}, expected 'halves' or 'alternating'")
        if self.window is not None and self.window % self.side:
            raise ValueError(f"window {self.window} is not a multiple of patch x merge = {self.side} pixels")
        if not all(0 <= i < self.layers for i in self.full_layers):
            raise ValueError(f"full_layers {self.full_layers} names layers outside 0..{self.layers - 1}")

    @property
    def side(self) -> int:
        """Pixels of one feature in each direction."""
        return self.patch * self.merge

    @property
    def block(self) -> TransformerConfig:
        """Of one layer."""
        return TransformerConfig(
            1, self.width, self.layers, self.heads, self.heads, self.ffn, causal=False, bias=True, norm=self.norm,
            norm_eps=self.norm_eps, gated=self.gated, activation=self.activation, dtype=self.dtype,
            param_dtype=self.param_dtype,
        )  # fmt: skip


class Patches(NamedTuple):
    """Patches of several images in a row, padded to N; merge x merge neighbours stand one after another.

    values: [B, N, C * frames * patch * patch]. places: int [B, N, 3], frame, row and column of each patch in its image.
    grids: int [B, N, 3], how many of each its image has (1 on padding). images: int [B, N], 1, 2, ...; 0 is padding.
    seconds: [B, N], how much time of its video one frame of `places` stands for.
    """

    values: jax.Array
    places: jax.Array
    grids: jax.Array
    images: jax.Array
    seconds: jax.Array


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 1280 * 28 * 28
) -> tuple[int, int]:
    """The size (height, width) to which Qwen2-VL resizes an image: multiples of `factor`, about the same shape.

    Args:
      height, width: in pixels, neither more than 200 times the other.
      factor: `PackedViTConfig.side`.
      min_pixels, max_pixels: between which the area comes to lie.
    """
    if min(height, width) < 1:
        raise ValueError(f"an image of {height} x {width} has no pixels; expected a height and a width of at least 1")
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {height} x {width} is too long: expected at most 200 times as long as wide")
    new = [round(x / factor) * factor for x in (height, width)]
    if new[0] * new[1] > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new = [max(factor, math.floor(x / scale / factor) * factor) for x in (height, width)]
    elif new[0] * new[1] < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new = [math.ceil(x * scale / factor) * factor for x in (height, width)]
    return new[0], new[1]


def patchify(config: PackedViTConfig, image: jax.Array) -> tuple[jax.Array, np.ndarray]:
    """The patches of one image or video, and their places.

    Args:
      config: of the network.
      image: floats [H, W, C], or a video [T, H, W, C]; H and W multiples of patch x merge, T of `frames`.

    Returns:
      (values [n, C * frames * patch * patch], places int [n, 3]), in the order of `Patches`.

    Raises:
      ValueError: another shape, type or size.
    """
    if not hasattr(image, "ndim"):
        raise ValueError(
            f"an image is a {type(image).__name__}, expected an array [H, W, C]; a row is one flat list of them"
        )
    x = image[None] if image.ndim == 3 else image
    if x.ndim != 4 or x.shape[-1] != config.channels or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"the image is {x.dtype}{image.shape}, expected floats [H, W, {config.channels}], or [T, ...]"
            f"{colours_remedy(image.shape, config.channels, 3)}"
        )
    x = jnp.repeat(x, config.frames, axis=0) if len(x) == 1 else x
    t, p, m = config.frames, config.patch, config.merge
    frames, height, width, c = x.shape
    if 0 in x.shape or frames % t or height % config.side or width % config.side:
        raise ValueError(
            f"the image is {frames} x {height} x {width}, expected a multiple of {t} frames, and of patch x merge = "
            f"{config.side} pixels in height and width, above 0: resize it (`smart_resize` says to what) or pad it"
        )
    x = x.reshape(frames // t, t, height // (p * m), m, p, width // (p * m), m, p, c)
    values = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, c * t * p * p)
    places = np.indices((frames // t, height // p, width // p))
    places = places.reshape(3, frames // t, height // (p * m), m, width // (p * m), m)
    return values, places.transpose(1, 2, 4, 3, 5, 0).reshape(-1, 3)


def pack(
    config: PackedViTConfig,
    images: Sequence[jax.Array],
    length: int | None = None,
    *,
    seconds: Sequence[float] | None = None,
) -> Patches:
    """Patches of these images, or videos, one after another: a row, B = 1.

    Args:
      config: of the network.
      images: as in `patchify`, of any sizes.
      length: N, a multiple of merge^2; None: as long as the images are. Rows of one length can be concatenated:
        `jax.tree.map(lambda *rows: jnp.concatenate(rows), *packed)`.
      seconds: of each image, how much time `config.frames` of its frames cover, config.frames / (frames a second);
        None: 1 each. Of a single image it does not matter.
    """
    if not len(images):
        raise ValueError("no images to pack, expected at least one; a row without them is any other with `images` of 0")
    each = [patchify(config, image) for image in images]
    total = sum(len(places) for _, places in each)
    length = total if length is None else length
    if total > length or length % config.merge**2:
        raise ValueError(
            f"length is {length}, expected a multiple of merge^2 = {config.merge**2}, at least the {total} patches"
        )
    grids = [places.max(0) + 1 for _, places in each]
    limit = MOST_WINDOWS * (config.window or config.side) // config.patch
    if config.window and max(grid[1:].max() for grid in grids) > limit:
        raise ValueError(f"an image of {grids} patches is too large for windows: expected at most {limit} a side")
    sizes = [len(places) for _, places in each]
    row = lambda parts, fill: np.pad(np.concatenate(parts), ((0, length - total), (0, 0)), constant_values=fill)[None]
    padded = lambda numbers: np.pad(np.repeat(numbers, sizes), (0, length - total))[None]
    values = jnp.pad(jnp.concatenate([values for values, _ in each]), ((0, length - total), (0, 0)))
    return Patches(
        values[None],
        jnp.asarray(row([places for _, places in each], 0)),
        jnp.asarray(row([np.tile(grid, (n, 1)) for grid, n in zip(grids, sizes, strict=True)], 1)),
        jnp.asarray(padded(np.arange(1, len(each) + 1))),
        jnp.asarray(padded(np.ones(len(each)) if seconds is None else seconds), jnp.float32),
    )


def segments(config: PackedViTConfig, patches: Patches) -> tuple[jax.Array, jax.Array]:
    """Ids of the frame and of the window that a patch is in, [B, N] each: who attends to whom. Padding is a frame."""
    frame, row, column = jnp.moveaxis(patches.places, -1, 0)
    begins = (jnp.diff(patches.images, axis=1) != 0) | (jnp.diff(frame, axis=1) != 0)
    frames = 1 + jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0))).astype(jnp.int32), axis=1)
    side = (config.window or config.patch) // config.patch
    windows = (frames * MOST_WINDOWS + row // side) * MOST_WINDOWS + column // side
    return frames, windows


def rotation(config: PackedViTConfig, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, N, 1, Dh / 2] of places [B, N, 3]: half of a head's pairs turn by the row, half by the column."""
    f = frequencies(config.width // config.heads // 2)
    angle = places[..., 1:, None].astype(jnp.float32) * f[None, None, None]  # [B, N, 2, Dh / 4]
    if config.rope == "alternating":
        angle = jnp.swapaxes(angle[..., ::-1, :], -1, -2)
    angle = angle.reshape(*places.shape[:2], 1, -1)
    return jnp.cos(angle), jnp.sin(angle)


def cubic(place: jax.Array, size: jax.Array, old: int) -> tuple[jax.Array, jax.Array]:
    """Four taps and weights, [..., 4] each, of places on an axis of `size` in one of `old`: `vision.layers.bicubic`."""
    taps = jnp.arange(-1, 3)
    source = (place + 0.5) * old / size - 0.5
    first = jnp.floor(source)
    s = jnp.abs((source - first)[..., None] - jnp.broadcast_to(taps, (*source.shape, 4)))
    index = first.astype(jnp.int32)[..., None] + jnp.broadcast_to(taps, s.shape)
    return jnp.clip(index, 0, old - 1), cubic_weight(s)


def resampled(table: jax.Array, patches: Patches) -> jax.Array:
    """Learned positions [rows, columns, D] at the places of patches of images of other sizes, [B, N, D]."""
    sizes = jnp.maximum(patches.grids, 1)  # padding is never NaN, which masks would let through
    place = lambda axis: (patches.places[..., axis], sizes[..., axis], table.shape[axis - 1])
    (rows, by_row), (columns, by_column) = cubic(*place(1)), cubic(*place(2))
    tap = lambda i, j: (by_row[..., i] * by_column[..., j])[..., None] * table[rows[..., i], columns[..., j]]
    return sum((tap(i, j) for i in range(4) for j in range(4)), start=jnp.zeros((), table.dtype))


class Merger(nn.Module):
    """y = gelu(norm(x) of merge^2 patches side by side W_up + b) W_down + b. Parameters: norm, up, down."""

    config: PackedViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N / merge^2, out]."""
        c = self.config
        types: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        x = make_norm(c.norm, c.norm_eps, **types, name="norm")(x)
        x = x.reshape(len(x), -1, c.merge**2 * c.width)
        x = nn.gelu(Linear(x.shape[-1], use_bias=True, **types, name="up")(x), approximate=False)
        return Linear(c.out, use_bias=True, **types, name="down")(x)


class PackedViT(nn.Module):
    """`Patches` -> features [B, N / merge^2, out], one for each merge x merge patches; those of padding mean nothing.

    Parameters (the layers' carry a leading axis L):
      patches/kernel [C, frames, p, p, D], or [C, p, p, D] for one frame; with patch_bias patches/bias [D]
      with grid: positions [rows, columns, D]
      layers/... of `jaxrl.nets.transformer.Block`, all with biases; with final_norm norm/{scale, bias} [D]
      merger/norm/scale [D], merger/up/{kernel, bias} [m^2 D, m^2 D], merger/down/{kernel, bias} [m^2 D, out]
    Initialisation: N(0, 0.02^2); biases 0. Frames of a video attend to themselves alone, as in Qwen2-VL; Kimi-K2.5's
    pooling over frames is not here.
    """

    config: PackedViTConfig

    @nn.compact
    def __call__(self, patches: Patches) -> jax.Array:
        c = self.config
        size = c.channels * c.frames * c.patch**2
        if patches.values.ndim != 3 or patches.values.shape[-1] != size:
            raise ValueError(f"patches have shape {patches.values.shape}, expected [B, N, {size}]: make them by `pack`")
        types: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        x = PatchEmbed(c, name="patches")(patches.values)
        if c.grid:
            table = self.param("positions", normal(0.02), (*c.grid, c.width), jnp.dtype(c.param_dtype))
            x = x + resampled(table.astype(jnp.float32), patches).astype(c.dtype)
        cos, sin = rotation(c, patches.places)
        ids, windows = segments(c, patches)
        if c.window:
            full = jnp.array([i in c.full_layers for i in range(c.layers)])[:, None, None]
            ids = jnp.where(full, ids[None], windows[None])
        each, same = 0, nn.broadcast
        block: Any = nn.remat(Block, prevent_cse=False) if c.remat else Block
        stack: Any = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(each, each, same, same, each if c.window else same, same),  # pyright: ignore[reportArgumentType]
            length=c.layers,
        )
        carry, _ = stack(c.block, name="layers")(
            (x, None, None), jnp.arange(c.layers), None, cos, sin, Segments(ids), 0
        )
        x = carry[0]
        if c.final_norm:
            x = make_norm(c.norm, c.norm_eps, **types, name="norm")(x)
        return Merger(c, name="merger")(x)


class PatchEmbed(nn.Module):
    """Patches as numbers -> [B, N, D]. Parameters: kernel, bias."""

    config: PackedViTConfig

    @nn.compact
    def __call__(self, values: jax.Array) -> jax.Array:
        c = self.config
        shape = (c.channels, *(c.frames,) * (c.frames > 1), c.patch, c.patch, c.width)
        kernel = self.param("kernel", normal(0.02), shape, jnp.dtype(c.param_dtype)).astype(c.dtype)
        x = values.astype(c.dtype) @ kernel.reshape(-1, c.width)
        if not c.patch_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, (c.width,), jnp.dtype(c.param_dtype)).astype(c.dtype)
        return x + jnp.broadcast_to(bias, x.shape)


_QWEN: dict[str, Any] = {"width": 1280, "layers": 32, "heads": 16, "frames": 2}
_QWEN25: dict[str, Any] = {
    **_QWEN, "norm": "rms", "gated": True, "activation": "silu", "window": 112, "full_layers": (7, 15, 23, 31),
}  # fmt: skip
SIZES = {
    "tiny": PackedViTConfig(width=32, layers=2, heads=2, ffn=64, out=32, patch=4),
    # Wang et al. 2024, arXiv:2409.12191, table 1: one tower of 675M for all, whose merger fits the decoder
    "qwen2_vl_2b": PackedViTConfig(**_QWEN, ffn=5120, out=1536),
    "qwen2_vl_7b": PackedViTConfig(**_QWEN, ffn=5120, out=3584),
    "qwen2_vl_72b": PackedViTConfig(**_QWEN, ffn=5120, out=8192),
    # Bai et al. 2025, arXiv:2502.13923, table 1; ffn as in the models' config files
    "qwen25_vl_3b": PackedViTConfig(**_QWEN25, ffn=3420, out=2048),
    "qwen25_vl_7b": PackedViTConfig(**_QWEN25, ffn=3420, out=3584),
    "qwen25_vl_32b": PackedViTConfig(**_QWEN25, ffn=3456, out=5120),
    "qwen25_vl_72b": PackedViTConfig(**_QWEN25, ffn=3456, out=8192),
    # Kimi Team 2025, arXiv:2504.07491: MoonViT, which began as SigLIP-SO-400M, under Moonlight's width
    "moonvit_so_400m": PackedViTConfig(
        width=1152, layers=27, heads=16, ffn=4304, out=2048, grid=(64, 64), rope="alternating", patch_bias=True,
        norm_eps=1e-5, final_norm=True, activation="gelu_tanh",
    ),
}  # fmt: skip
