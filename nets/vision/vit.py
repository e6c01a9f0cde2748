"""Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929): patches as tokens, a pre-norm encoder."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.nets.layers import Linear, normal
from jaxrl.nets.vision.layers import SelfAttention, bicubic, check_images, layer_norm, mlp, patches


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and choices of one ViT. Frozen and hashable.

    `pool` says what is classified: "class", a token that stands before the patches, or "mean" of the patches, without
    such a token (Beyer et al. 2022, arXiv:2205.01580). `classes` None: no head, the normalised tokens are returned.
    """

    image_size: tuple[int, int] = (224, 224)  # H, W
    patch: int = 16
    width: int = 768  # D
    layers: int = 12  # L
    heads: int = 12
    ffn: int = 3072
    classes: int | None = 1000
    pool: Literal["class", "mean"] = "class"
    channels: int = 3
    norm_eps: float = 1e-12  # of the published checkpoints; the authors' code has 1e-6
    remat: bool = False  # recompute a layer's inside in the backward pass
    dtype: str = "float32"  # compute
    param_dtype: str = "float32"  # storage

    def __post_init__(self):
        if self.pool not in ("class", "mean"):
            raise ValueError(f"pool is {self.pool!r}, expected 'class' or 'mean'")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: change one of them")
        if min(self.grid) < 1 or any(side % self.patch for side in self.image_size):
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}: resize the images")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in each direction, (rows, columns)."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def tokens(self) -> int:
        """T: patches, and the class token."""
        return self.grid[0] * self.grid[1] + (self.pool == "class")


class Block(nn.Module):
    """x += attention(norm(x)); x += MLP(norm(x)). The body of the layer loop; sows "hidden", x after the layer."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array):
        """[B, T, D] -> ([B, T, D], None)."""
        c = self.config
        types: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        normed = layer_norm(c.norm_eps, **types, name="attention_norm")(x)
        x = x + SelfAttention(c.heads, **types, name="attention")(normed)
        normed = layer_norm(c.norm_eps, **types, name="ffn_norm")(x)
        x = x + mlp(c.ffn, **types, name="ffn")(normed)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "hidden", x)
        return x, None


class ViT(nn.Module):
    """images [B, H, W, C] -> logits [B, classes], or tokens [B, T, D] without a head.

    Parameters (the layers' carry a leading axis L; T counts the class token, if there is one):
      patches/kernel [p, p, C, D], patches/bias [D]; class_token [1, 1, D] (pool "class"); positions [1, T, D]
      layers/{attention_norm,ffn_norm}/{scale,bias} [L, D]
      layers/attention/{q,k,v,o}/kernel [L, D, D] and bias [L, D]
      layers/ffn/{up,down}/kernel [L, in, out] and bias [L, out]
      norm/{scale,bias} [D]; head/kernel [D, classes], head/bias
    Initialisation: N(0, 0.02^2); biases 0. Deviations: no dropout; no hidden layer before the head in pre-training.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        c = self.config
        check_images(images, c.channels)
        if images.shape[1:3] != c.image_size:
            raise ValueError(
                f"images are {images.shape[1]} x {images.shape[2]}, expected {c.image_size[0]} x {c.image_size[1]}: "
                "resize them, or the network with `resize`"
            )
        types: dict[str, Any] = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        own = lambda name, *shape: self.param(name, normal(0.02), shape, jnp.dtype(c.param_dtype)).astype(c.dtype)
        x = patches(c.width, c.patch, **types, name="patches")(images)
        x = x.reshape(len(images), -1, c.width)
        if c.pool == "class":
            token = jnp.broadcast_to(own("class_token", 1, 1, c.width), (len(images), 1, c.width))
            x = jnp.concatenate([token, x], axis=1)
        x = x + jnp.broadcast_to(own("positions", 1, c.tokens, c.width), x.shape)
        block: Any = nn.remat(Block, prevent_cse=False) if c.remat else Block
        axes: Any = {"params": 0, "intermediates": 0}
        stack: Any = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=c.layers)
        x, _ = stack(c, name="layers")(x)
        x = layer_norm(c.norm_eps, **types, name="norm")(x)
        if c.classes is None:
            return x
        pooled = x[:, 0] if c.pool == "class" else jnp.mean(x, axis=1)
        return Linear(c.classes, use_bias=True, **types, name="head")(pooled)


def resize(config: ViTConfig, params: Any, image_size: tuple[int, int]) -> tuple[ViTConfig, Any]:
    """The network for images of another size: patches stay as large, position embeddings are resampled.

    (Dosovitskiy et al. 2020, section 3.2.) `bicubic` over the grid; the class token's is kept.

    Args:
      config: of `params`.
      params: a plain nested dict, as `ViT.init` makes it (what stands under "params").
      image_size: (H, W), multiples of the patch.

    Returns:
      (config, params) of the new size.
    """
    new = replace(config, image_size=tuple(image_size))
    first = new.tokens - new.grid[0] * new.grid[1]
    own, rest = params["positions"][:, :first], params["positions"][0, first:]
    rest = bicubic(rest.reshape(*config.grid, config.width), new.grid).reshape(1, -1, config.width)
    return new, {**params, "positions": jnp.concatenate([own, rest.astype(own.dtype)], axis=1)}


_S: dict[str, Any] = {"width": 384, "heads": 6, "ffn": 1536}
_L: dict[str, Any] = {"width": 1024, "layers": 24, "heads": 16, "ffn": 4096}
SIZES = {
    "tiny": ViTConfig((16, 16), patch=4, width=24, layers=2, heads=4, ffn=48, classes=10),
    # Steiner et al. 2021, arXiv:2106.10270, table 1
    "vit_ti16": ViTConfig(width=192, heads=3, ffn=768),
    "vit_s16": ViTConfig(**_S),
    "vit_s32": ViTConfig(**_S, patch=32),
    # Dosovitskiy et al. 2020, table 1
    "vit_b16": ViTConfig(),
    "vit_b32": ViTConfig(patch=32),
    "vit_l16": ViTConfig(**_L),
    "vit_l32": ViTConfig(**_L, patch=32),
    "vit_h14": ViTConfig(patch=14, width=1280, layers=32, heads=16, ffn=5120),
}
