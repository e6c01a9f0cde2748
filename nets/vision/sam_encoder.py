"""The image encoder of Segment Anything: a ViT most of whose blocks attend within windows (ViTDet).

Kirillov et al. 2023, arXiv:2304.02643; Li et al. 2022, arXiv:2203.16527. Every `global_every`-th block sees the whole
image, the others windows of window x window patches, the image padded with zeros to whole windows. Blocks are scanned
over that period, and the windowed ones within it once more, so that compile time does not grow with depth.

Axes: B images, h x w patches, D width, C channels of the embedding, H heads, Dh = D / H.

Deviations: images have the config's size (the tables of positions are not interpolated); q, k and v are three maps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.kernels.attention import Full, Mask, attention
from jaxrl.nets.layers import Linear, normal
from jaxrl.nets.vision.layers import check_images, layer_norm, mlp, patches

uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1, 1) / sqrt(fan in), for kernels: what layers of the original code start from."""


@dataclass(frozen=True)
class SAMConfig:
    """Sizes of one Segment Anything model. Frozen and hashable; `jaxrl.nets.vision.sam.SIZES` names published ones."""

    width: int  # D, of the image encoder
    layers: int  # L
    heads: int
    global_every: int  # so many blocks are a period, whose last one is global
    ffn: int  # inner width of the encoder's MLP
    window: int = 14  # in patches
    image: int = 1024  # height and width in pixels
    patch: int = 16
    channels: int = 256  # C, of the embedding, the prompts and the mask decoder
    mask_channels: int = 16  # inner width of what embeds a mask
    decoder_layers: int = 2
    decoder_heads: int = 8
    decoder_ffn: int = 2048
    downsample: int = 2  # attention between tokens and image is C / downsample wide
    masks: int = 3  # M, for an ambiguous prompt, beside the single one
    iou_hidden: int = 256
    iou_depth: int = 3
    decoder_norm_eps: float = 1e-6  # of the two-way blocks, as transformers; the original code has 1e-5
    remat: bool = False  # the backward pass computes the encoder's blocks again
    dtype: str = "float32"  # compute
    param_dtype: str = "float32"  # storage

    def __post_init__(self):
        for name, by in (
            ("image", "patch"),
            ("width", "heads"),
            ("layers", "global_every"),
            ("channels", "downsample"),
        ):
            whole, part = getattr(self, name), getattr(self, by)
            if part < 1 or whole % part:
                raise ValueError(f"{name} is {whole} and {by} {part}: give a multiple of it")
        if self.channels % 8 or self.channels // self.downsample % self.decoder_heads:
            raise ValueError(
                f"channels is {self.channels}, expected a multiple of 8 that leaves {self.decoder_heads} decoder_heads "
                f"equal shares of channels / {self.downsample}"
            )
        if self.mask_channels % 4 or self.iou_depth < 2 or self.masks < 1 or self.window < 1:
            raise ValueError(
                f"mask_channels {self.mask_channels}, iou_depth {self.iou_depth}, masks {self.masks}, window "
                f"{self.window}: expected a multiple of 4, at least 2, at least 1, at least 1"
            )

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image // self.patch

    @property
    def types(self) -> dict[str, Any]:
        """dtype and param_dtype, as modules take them."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


def relative(q: jax.Array, table: jax.Array, axis: str) -> jax.Array:
    """What a query says of each row (or column) of keys: q . R[own row - that row + n - 1].

    Args:
      q: [B, h, w, H, Dh], unscaled.
      table: R, [2 n - 1, Dh], n the length of the axis.
      axis: "h" for rows, "w" for columns.

    Returns:
      [B, h, w, H, n].
    """
    n = (table.shape[0] + 1) // 2
    steps = np.arange(n)[:, None] - np.arange(n) + n - 1
    return jnp.einsum(f"bhwHd,{axis}kd->bhwHk", q, table.astype(q.dtype)[steps])


def fold_positions(q: jax.Array, k: jax.Array, rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries and keys whose products hold decomposed relative positions.

        q'_i . k'_j = q_i . k_j / sqrt(Dh) + q_i . R_rows[y_i - y_j] + q_i . R_columns[x_i - x_j]

    The added bias has rank h + w: q' is q / sqrt(Dh) beside its products with both tables, and k' is k beside one-hot
    vectors of its own row and column. So no array of queries times keys is made outside of attention.
    (Decomposition: Li et al. 2021, MViTv2, arXiv:2112.01526.)

    Args:
      q, k: [B, h, w, H, Dh].
      rows, columns: the tables, [2 h - 1, Dh] and [2 w - 1, Dh].

    Returns:
      (q', k'), each [B, h w, H, Dh + h + w]; attend with scale 1.
    """
    b, h, w, heads, head_dim = q.shape
    at = np.concatenate(
        [np.broadcast_to(np.eye(h)[:, None], (h, w, h)), np.broadcast_to(np.eye(w)[None], (h, w, w))], axis=-1
    )
    at = jnp.broadcast_to(jnp.asarray(at, q.dtype)[None, :, :, None], (b, h, w, heads, h + w))
    q = jnp.concatenate([q * head_dim**-0.5, relative(q, rows, "h"), relative(q, columns, "w")], axis=-1)
    k = jnp.concatenate([k, at], axis=-1)
    return q.reshape(b, h * w, heads, -1), k.reshape(b, h * w, heads, -1)


class Attention(nn.Module):
    """Attention of `heads` heads that are `inner` wide together, q from one sequence and k, v from others.

    Parameters: {q,k,v}/{kernel,bias} [in, inner], o/{kernel,bias} [inner, in]; with `grid` = (h, w) also rows
    [2 h - 1, Dh] = 0 and columns [2 w - 1, Dh] = 0, the tables of relative positions.
    """

    heads: int
    inner: int
    grid: tuple[int, int] | None = None
    kernel_init: Callable = uniform
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = Full()) -> jax.Array:  # noqa: B008
        """Map q [B, T, in], k and v [B, S, in] to [B, T, in]."""
        head_dim, (b, t, width) = self.inner // self.heads, q.shape
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": self.kernel_init}

        def project(name, x):
            return Linear(self.inner, True, **types, name=name)(x).reshape(b, -1, self.heads, head_dim)

        q, k, v, scale = project("q", q), project("k", k), project("v", v), None
        if self.grid is not None:
            table = lambda name, n: self.param(
                name, nn.initializers.zeros, (2 * n - 1, head_dim), jnp.dtype(self.param_dtype)
            )
            rows, columns = (table(name, n) for name, n in zip(("rows", "columns"), self.grid, strict=True))
            split = (b, *self.grid, self.heads, head_dim)
            (q, k), scale = fold_positions(q.reshape(split), k.reshape(split), rows, columns), 1.0
        y: Any = attention(q, k, v, mask=mask, scale=scale)
        return Linear(width, True, **types, name="o")(y.reshape(b, t, self.inner))


def to_windows(x: jax.Array, n: int) -> jax.Array:
    """x [B, h, w, D], padded with zeros below and to the right, as windows [B (h / n) (w / n), n, n, D], rounded up."""
    b, h, w, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, -h % n), (0, -w % n), (0, 0)))
    rows, columns = x.shape[1] // n, x.shape[2] // n
    return x.reshape(b, rows, n, columns, n, d).swapaxes(2, 3).reshape(-1, n, n, d)


def from_windows(x: jax.Array, h: int, w: int) -> jax.Array:
    """The inverse of `to_windows`, without the padding: [B, h, w, D]."""
    _, n, _, d = x.shape
    rows, columns = -(-h // n), -(-w // n)
    x = x.reshape(-1, rows, columns, n, n, d).swapaxes(2, 3)
    return x.reshape(-1, rows * n, columns * n, d)[:, :h, :w]


class Block(nn.Module):
    """x += attention(norm(x)), in windows or of the whole grid; x += MLP(norm(x)). GELU, pre-norm.

    Parameters: attention_norm, attention (with tables of the window's or the grid's size), ffn_norm, ffn. Where the
    collection "intermediates" is asked for, it gets `hidden`, the block's output.
    """

    config: SAMConfig
    windowed: bool

    @nn.compact
    def __call__(self, x: jax.Array, _=None) -> tuple[jax.Array, None]:
        """x [B, h, w, D] -> ([B, h, w, D], None): the body of a scan."""
        c, (_, h, w, d) = self.config, x.shape
        y = layer_norm(1e-6, **c.types, name="attention_norm")(x)
        y = to_windows(y, c.window) if self.windowed else y
        grid, rows = (y.shape[1], y.shape[2]), y.reshape(y.shape[0], -1, d)
        attend = Attention(c.heads, d, grid, kernel_init=normal(0.02), **c.types, name="attention")
        y = attend(rows, rows, rows).reshape(y.shape)
        x = x + (from_windows(y, h, w) if self.windowed else y)
        x = x + mlp(c.ffn, **c.types, name="ffn")(layer_norm(1e-6, **c.types, name="ffn_norm")(x))
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "hidden", x)
        return x, None


def scanned(module: Any, length: int, in_axes: Any = nn.broadcast) -> Any:
    """A module of (carry, ...) -> (carry, out) as one that is applied `length` times, each with its own parameters."""
    axes: Any = {"params": 0, "intermediates": 0}
    return nn.scan(module, variable_axes=axes, split_rngs={"params": True}, length=length, in_axes=in_axes)


class Period(nn.Module):
    """`global_every` - 1 windowed blocks and a global one. Parameters: windowed/... [global_every - 1, ...], global."""

    config: SAMConfig

    @nn.compact
    def __call__(self, x: jax.Array, _=None) -> tuple[jax.Array, None]:
        """x [B, h, w, D] -> ([B, h, w, D], None)."""
        c = self.config
        block: Any = nn.remat(Block, prevent_cse=False) if c.remat else Block
        if c.global_every > 1:
            x, _ = scanned(block, c.global_every - 1)(c, True, name="windowed")(x, None)
        return block(c, False, name="global")(x)


class ImageEncoder(nn.Module):
    """Images [B, image, image, 3], normalised, -> embeddings [B, h, w, C].

    Parameters (G = layers / global_every periods):
      patch/{kernel,bias}: [p, p, 3, D]; positions [1, h, w, D] = 0
      blocks/windowed/... [G, global_every - 1, ...] and blocks/global/... [G, ...], see `Block`
      neck_in/kernel [1, 1, D, C], neck_in_norm, neck_out/kernel [3, 3, C, C], neck_out_norm
    """

    config: SAMConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Embed.

        Raises:
          ValueError: images of another size than the config's.
        """
        c = self.config
        check_images(images, 3)
        if images.shape[1:3] != (c.image, c.image):
            raise ValueError(
                f"images have shape {images.shape}, expected [B, {c.image}, {c.image}, 3]: resize the longer side and "
                "pad the other (jaxrl.segment.preprocess)"
            )
        x = patches(c.width, c.patch, **c.types, name="patch")(images)
        shape = (1, c.grid, c.grid, c.width)
        positions = self.param("positions", nn.initializers.zeros, shape, jnp.dtype(c.param_dtype))
        x = x + jnp.broadcast_to(positions.astype(c.dtype), x.shape)
        x, _ = scanned(Period, c.layers // c.global_every)(c, name="blocks")(x, None)
        types: dict[str, Any] = {key: jnp.dtype(value) for key, value in c.types.items()}
        for name, size in (("neck_in", (1, 1)), ("neck_out", (3, 3))):
            x = nn.Conv(c.channels, size, use_bias=False, kernel_init=uniform, **types, name=name)(x)
            x = layer_norm(1e-6, **c.types, name=f"{name}_norm")(x)
        return x
