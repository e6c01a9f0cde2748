"""Swin Transformer, both versions: attention inside windows that move by half a window from layer to layer.

Version 1: Liu et al. 2021, arXiv:2103.14030. Version 2: Liu et al. 2021, arXiv:2111.09883.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.kernels.attention import Segments
from jaxrl.nets.layers import Linear
from jaxrl.nets.vision.layers import SelfAttention, bicubic, check_images, drop_path, layer_norm, mlp, patches


@dataclass(frozen=True)
class SwinConfig:
    """Sizes and choices of one Swin. Frozen and hashable.

    version 1: norm before attention and MLP; a bias of the logits for each offset between two tokens, from a table.
    version 2: norm after them, at the end of each branch; cosine attention; the bias is a small network's function of
    the offset on a logarithmic scale, so that it has a value in windows of every size.
    """

    version: Literal[1, 2] = 1
    patch: int = 4
    width: int = 96  # C of the first stage; doubles with each
    depths: tuple[int, ...] = (2, 2, 6, 2)  # layers of each stage, even numbers
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7  # M; no larger than the map
    pretrained_windows: tuple[int, ...] | None = None  # version 2: what offsets are measured by; None: the window
    mlp_ratio: int = 4
    classes: int | None = 1000  # None: no head, the normalised map of the last stage is returned
    channels: int = 3
    drop_path: float = 0.0  # of the last layer; grows linearly from 0 at the first
    shift: bool = True  # False: windows stand still (the paper's ablation)
    norm_eps: float = 1e-5
    remat: bool = False  # recompute a pair of layers in the backward pass
    dtype: str = "float32"  # compute
    param_dtype: str = "float32"  # storage

    def __post_init__(self):
        if self.version not in (1, 2):
            raise ValueError(f"version is {self.version}, expected 1 or 2")
        for name, given in (("heads", self.heads), ("pretrained_windows", self.pretrained_windows or self.heads)):
            if len(given) != len(self.depths):
                raise ValueError(f"{name} is {given}, expected one for each of the stages in depths {self.depths}")
        if any(depth % 2 or depth < 2 for depth in self.depths):
            raise ValueError(f"depths are {self.depths}, expected even ones: layers come in pairs, still and shifted")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"a stage of width {width} has {heads} heads, expected a divisor of the width")
        if self.window < 1 or not 0 <= self.drop_path < 1:
            raise ValueError(f"window is {self.window}, drop_path {self.drop_path}: expected >= 1, and in [0, 1)")

    @property
    def widths(self) -> tuple[int, ...]:
        """C of each stage."""
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))


def windows(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> rows of tokens [B (H / size) (W / size), size^2, C], one a window."""
    b, h, w, c = x.shape
    return jnp.swapaxes(x.reshape(b, h // size, size, w // size, size, c), 2, 3).reshape(-1, size * size, c)


def whole(rows: jax.Array, size: int, h: int, w: int) -> jax.Array:
    """The map [B, h, w, C] whose windows these are."""
    x = rows.reshape(-1, h // size, w // size, size, size, rows.shape[-1])
    return jnp.swapaxes(x, 2, 3).reshape(-1, h, w, rows.shape[-1])


def regions(h: int, w: int, size: int, shift: int) -> np.ndarray:
    """Which tokens of a window were neighbours before the map was rolled by -shift: ids int [windows, size^2].

    Tokens of one window belong together where both or neither came round the edge, in rows and in columns.
    """
    came_round = [np.arange(side) >= side - shift for side in (h, w)]
    ids = 2 * came_round[0][:, None] + came_round[1][None]
    return ids.reshape(h // size, size, w // size, size).swapaxes(1, 2).reshape(-1, size * size)


def offset_index(size: int, reach: int) -> np.ndarray:
    """Where the offset of query and key stands in a table of (2 reach - 1)^2: int [size^2, size^2].

    (dy + reach - 1) (2 reach - 1) + dx + reach - 1, with dy, dx from key to query, row by row.
    """
    y, x = (axis.reshape(-1) for axis in np.divmod(np.arange(size * size), size))
    between = lambda a: a[:, None] - a[None] + reach - 1
    return between(y) * (2 * reach - 1) + between(x)


def log_offsets(size: int, scale: int) -> np.ndarray:
    """Offsets of a window on a logarithmic scale, [(2 size - 1)^2, 2]: sign(d) log2(1 + 8 |d| / (scale - 1)) / 3."""
    steps = np.arange(1 - size, size)
    grid = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.sign(grid) * np.log2(1 + 8 * np.abs(grid) / max(scale - 1, 1)) / 3


class OffsetBias(nn.Module):
    """What the offset of key and query adds to the logits of a window, [1, H, size^2, size^2].

    Parameters: version 1 table [(2 M - 1)^2, H] = 0, of which a smaller window reads the middle; version 2
    up/{kernel [2, 512], bias}, down/kernel [512, H], and the bias is 16 sigmoid(relu(offsets W_up + b) W_down).
    """

    config: SwinConfig
    heads: int
    scale: int | None = None  # the window by which offsets are measured; None: this one

    @nn.compact
    def __call__(self, size: int) -> jax.Array:
        c = self.config
        if c.version == 1:
            shape = ((2 * c.window - 1) ** 2, self.heads)
            table = self.param("table", nn.initializers.normal(0.02), shape, jnp.dtype(c.param_dtype))
            return jnp.moveaxis(table[offset_index(size, c.window)], -1, 0)[None]
        types: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        offsets = jnp.asarray(log_offsets(size, self.scale or size), c.dtype)
        inner = nn.relu(Linear(512, use_bias=True, **types, name="up")(offsets))
        table = 16 * nn.sigmoid(Linear(self.heads, **types, name="down")(inner))
        return jnp.moveaxis(table[offset_index(size, size)], -1, 0)[None]


class Block(nn.Module):
    """x += attention in windows; x += MLP; each with its norm before (version 1) or after (version 2).

    Maps are padded with zeros to a multiple of the window after the norm, and what is padded is attended to, as in
    the authors' code. Parameters: attention/... (`SelfAttention`), bias/... (`OffsetBias`), ffn/{up,down}/...,
    {attention_norm,ffn_norm}/{scale,bias}; in version 2 these scales start at 0, so that each block starts as identity.
    """

    config: SwinConfig
    heads: int
    shifted: bool
    scale: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | None = None) -> jax.Array:
        """Map x [B, H, W, C] to the same; rate: of `drop_path`."""
        c = self.config
        _, h, w, width = x.shape
        types: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        attend = SelfAttention(self.heads, cosine=c.version == 2, **types, name="attention")
        size = min(c.window, h, w)
        shift = size // 2 if self.shifted and size < min(h, w) else 0
        down, right = -h % size, -w % size

        def attention(x):
            x = jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0)))
            rows = windows(jnp.roll(x, (-shift, -shift), (1, 2)), size)
            ids = regions(h + down, w + right, size, shift)
            mask = Segments(jnp.tile(ids, (len(rows) // len(ids), 1))) if shift else None
            rows = attend(rows, mask=mask, bias=OffsetBias(c, self.heads, self.scale, name="bias")(size))
            return jnp.roll(whole(rows, size, h + down, w + right), (shift, shift), (1, 2))[:, :h, :w]

        def branch(x, name, function):
            norm = layer_norm(
                c.norm_eps,
                **types,
                name=name,
                scale_init=nn.initializers.zeros if c.version == 2 else nn.initializers.ones,
            )
            y = norm(function(x)) if c.version == 2 else function(norm(x))
            return x + drop_path(self, y, rate)

        x = branch(x, "attention_norm", attention)
        return branch(x, "ffn_norm", mlp(c.mlp_ratio * width, **types, name="ffn"))


class Pair(nn.Module):
    """A block with still windows and one with shifted ones: the body of a stage's loop."""

    config: SwinConfig
    heads: int
    scale: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, rates: jax.Array | None):
        """([B, H, W, C], rates [2]) -> ([B, H, W, C], None)."""
        for i, name in enumerate(("still", "shifted")):
            shifted = self.config.shift and name == "shifted"
            block = Block(self.config, self.heads, shifted, self.scale, name=name)
            x = block(x, None if rates is None else rates[i])
        return x, None


class Merge(nn.Module):
    """Four neighbours become one token of twice the width: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2 C].

    In the order (0,0), (1,0), (0,1), (1,1) of (row, column). Parameters: norm/{scale,bias}, over 4 C before the
    linear map (version 1) or over 2 C after it (version 2); reduce/kernel [4 C, 2 C].
    """

    config: SwinConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        types: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        _, h, w, width = x.shape
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)
        norm = layer_norm(c.norm_eps, **types, name="norm")
        reduce = Linear(2 * width, **types, name="reduce")
        return norm(reduce(x)) if c.version == 2 else reduce(norm(x))


class Swin(nn.Module):
    """images [B, H, W, C] of any size -> logits [B, classes], or the last map [B, h, w, 8 C] without a head.

    The cost is linear in the number of pixels. Sows "map0", ... to "intermediates": the map at the end of each
    stage, before merging. With a stream "dropout" and `drop_path`, branches are left out (`drop_path`).
    Parameters (P pairs of layers in a stage, on a leading axis):
      patches/kernel [p, p, channels, C], patches/bias; patches_norm/{scale,bias} [C]
      stage{s}/{still,shifted}/... [P, ...] (`Block`); merge{s}/... (`Merge`), but for the last stage
      norm/{scale,bias}; head/kernel [C of the last stage, classes], head/bias
    Initialisation: N(0, 0.02^2); biases 0.
    Deviations: windows shrink to the map that there is (published version 2: to that of the config's image size); no
    absolute positions, no dropout; the extra norms of version 2's largest models are left out.
    """

    config: SwinConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        c = self.config
        check_images(images, c.channels)
        types: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        images = jnp.pad(images, ((0, 0), *((0, -side % c.patch) for side in images.shape[1:3]), (0, 0)))
        x = patches(c.width, c.patch, **types, name="patches")(images)
        x = layer_norm(c.norm_eps, **types, name="patches_norm")(x)
        pair: Any = nn.remat(Pair, prevent_cse=False) if c.remat else Pair
        rates = jnp.linspace(0, c.drop_path, sum(c.depths)) if c.drop_path else None
        for stage, (depth, heads) in enumerate(zip(c.depths, c.heads, strict=True)):
            before = sum(c.depths[:stage])
            own = None if rates is None else rates[before : before + depth].reshape(-1, 2)
            split: Any = {"params": True, "dropout": True}
            loop: Any = nn.scan(pair, variable_axes={"params": 0}, split_rngs=split, length=depth // 2)
            scale = c.pretrained_windows[stage] if c.pretrained_windows else None
            x, _ = loop(c, heads, scale, name=f"stage{stage}")(x, own)
            if self.is_mutable_collection("intermediates"):
                self.sow("intermediates", f"map{stage}", x)
            if stage < len(c.depths) - 1:
                x = Merge(c, name=f"merge{stage}")(x)
        x = layer_norm(c.norm_eps, **types, name="norm")(x)
        if c.classes is None:
            return x
        return Linear(c.classes, use_bias=True, **types, name="head")(jnp.mean(x, axis=(1, 2)))


def resize(config: SwinConfig, params: Any, window: int) -> tuple[SwinConfig, Any]:
    """The network with windows of another size, as for images of 384 pixels after 224: windows of 12 after 7.

    Version 1 (Liu et al. 2021, arXiv:2103.14030, section 4.1): `bicubic` over each table of offsets. Version 2 has a
    bias for every offset and keeps its parameters; it must know by which windows they were learnt.

    Args:
      config: of `params`.
      params: a plain nested dict, as `Swin.init` makes it (what stands under "params").
      window: M of the new network.

    Returns:
      (config, params) of the new windows.

    Raises:
      ValueError: version 2 without `pretrained_windows`.
    """
    new = replace(config, window=window)
    if config.version == 2:
        if config.pretrained_windows is None:
            raise ValueError(
                f"pretrained_windows is None, expected the windows of training, stage by stage: {config.window}, or "
                "the side of the map where that was smaller, such as (12, 12, 12, 6) with images of 192"
            )
        return new, params
    old, side = (2 * size - 1 for size in (config.window, window))

    def resampled(path, leaf):
        if jax.tree_util.keystr(path[-2:], simple=True, separator="/") != "bias/table":
            return leaf
        grid = jnp.moveaxis(leaf.reshape(-1, old, old, leaf.shape[-1]), 0, 2)
        again = jnp.moveaxis(bicubic(grid, (side, side)), 2, 0)
        return again.reshape(*leaf.shape[:-2], side * side, leaf.shape[-1]).astype(leaf.dtype)

    return new, jax.tree.map_with_path(resampled, params)


_S: dict[str, Any] = {"depths": (2, 2, 18, 2)}
_B: dict[str, Any] = {"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}
_L: dict[str, Any] = {"width": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48)}
SIZES = {
    "tiny": SwinConfig(patch=2, width=8, depths=(2, 2), heads=(2, 4), window=4, mlp_ratio=2, classes=10),
    "tiny_v2": SwinConfig(2, patch=2, width=8, depths=(2, 2), heads=(2, 4), window=4, mlp_ratio=2, classes=10),
    # 2103.14030, section 3.3; for 384 pixels windows of 12
    "swin_t": SwinConfig(),
    "swin_s": SwinConfig(**_S),
    "swin_b": SwinConfig(**_B),
    "swin_l": SwinConfig(**_L),
    "swin_b_384": SwinConfig(**_B, window=12),
    "swin_l_384": SwinConfig(**_L, window=12),
    # 2111.09883, section 3.5 and table 3: for 256 pixels, windows of 8 or 16
    "swinv2_t": SwinConfig(2, window=8),
    "swinv2_s": SwinConfig(2, window=8, **_S),
    "swinv2_b": SwinConfig(2, window=8, **_B),
    "swinv2_t_w16": SwinConfig(2, window=16),
    "swinv2_s_w16": SwinConfig(2, window=16, **_S),
    "swinv2_b_w16": SwinConfig(2, window=16, **_B),
    # pretrained on ImageNet-22K with images of 192; fine-tuned at 384. H and G have norms besides, left out here
    "swinv2_l_w12": SwinConfig(2, window=12, classes=21841, **_L),
    "swinv2_l_w24_384": SwinConfig(2, window=24, pretrained_windows=(12, 12, 12, 6), **_L),
}
