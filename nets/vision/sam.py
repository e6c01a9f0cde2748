"""Segment Anything (SAM): an image is embedded once, and each prompt then asks for masks of what it means.

Kirillov et al. 2023, arXiv:2304.02643. `SAM.encode` is the ViT of `sam_encoder`; `SAM.decode` is the prompt encoder and
the mask decoder, small enough to answer every click. A point is ambiguous, so the decoder has M = 3 masks for one
prompt, besides a single mask for prompts that say enough, and predicts the IoU of each with what was meant.

Axes: B images with a prompt each (several prompts of an image: `jax.vmap` over prompts, or repeat the embedding), N
points, h x w patches, C channels, T = 2 + M + N tokens. Masks are logits [4 h, 4 w].

Deviations: every prompt is points with labels, so that batches may mix them; room for points that are not there yet is
hidden from attention, so answers do not depend on it; the frequencies of positions are constants, as in the original
code (transformers trains them).
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Full, Segments
from jaxrl.nets.layers import normal
from jaxrl.nets.mlp import MLP
from jaxrl.nets.vision.layers import layer_norm, patches
from jaxrl.nets.vision.sam_encoder import Attention, ImageEncoder, SAMConfig, scanned, uniform

ABSENT, PADDING, BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = range(-2, 4)
"""Labels of points: not there at all; the one that stands for a box that is not given; clicks; corners of a box."""


class Prompts(NamedTuple):
    """What to segment, a prompt for each image. `prompt` makes them of points, boxes and masks.

    points: [B, N, 2], (x, y) in pixels of the model's image. labels: int [B, N], `ABSENT` ... `BOTTOM_RIGHT`.
    masks: [B, 4 h, 4 w], logits of an earlier answer, or None. has_mask: bool [B], whose mask counts; None: all.
    """

    points: jax.Array
    labels: jax.Array
    masks: jax.Array | None = None
    has_mask: jax.Array | None = None


def prompt(
    points: jax.Array | None = None,
    labels: jax.Array | None = None,
    boxes: jax.Array | None = None,
    masks: jax.Array | None = None,
) -> Prompts:
    """Points, boxes and masks as `Prompts`: a padding point follows the points where there is no box.

    Args:
      points: [B, N, 2], (x, y) in pixels of the model's image, or None.
      labels: int [B, N], 1 foreground, 0 background, -2 no point; None: all foreground.
      boxes: [B, 4], (left, top, right, bottom), or None.
      masks: [B, 4 h, 4 w], logits of an earlier answer, or None.

    Raises:
      ValueError: nothing given, or shapes that do not fit.
    """
    first = next((x for x in (points, boxes, masks) if x is not None), None)
    if first is None:
        raise ValueError("prompt was given nothing, expected points, boxes or masks")
    b = first.shape[0]
    if points is None:
        if labels is not None:
            raise ValueError("labels were given without points: they say whether a point is foreground (1) or not (0)")
        points, labels = jnp.zeros((b, 0, 2)), jnp.zeros((b, 0), jnp.int32)
    elif labels is None:
        labels = jnp.full(points.shape[:2], FOREGROUND)
    if points.shape != (*labels.shape, 2) or labels.ndim != 2:
        raise ValueError(f"points have shape {points.shape} and labels {labels.shape}, expected [B, N, 2] and [B, N]")
    if boxes is not None:
        if boxes.shape != (b, 4):
            raise ValueError(f"boxes have shape {boxes.shape}, expected [B, 4] = ({b}, 4): one box for each prompt")
        more, kinds = boxes.reshape(b, 2, 2), (TOP_LEFT, BOTTOM_RIGHT)
    else:
        count = min(points.shape[1], 1)
        more, kinds = jnp.zeros((b, count, 2)), (PADDING,) * count
    points = jnp.concatenate([points.astype(jnp.float32), more.astype(jnp.float32)], axis=1)
    kinds = jnp.broadcast_to(jnp.array(kinds, jnp.int32).reshape(1, -1), (b, len(kinds)))
    return Prompts(points, jnp.concatenate([labels.astype(jnp.int32), kinds], axis=1), masks)


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), the exact form."""
    return nn.gelu(x, approximate=False)


class MaskEmbedding(nn.Module):
    """Masks [B, 4 h, 4 w] -> [B, h, w, C]. Parameters: {in,mid,out}/{kernel,bias}, {in,mid}_norm/{scale,bias}."""

    config: SAMConfig

    @nn.compact
    def __call__(self, masks: jax.Array) -> jax.Array:
        """Embed logits; see the class."""
        c, x = self.config, masks[..., None]
        for name, width in (("in", c.mask_channels // 4), ("mid", c.mask_channels)):
            x = patches(width, 2, **c.types, name=name)(x)
            x = gelu(layer_norm(1e-6, **c.types, name=f"{name}_norm")(x))
        return patches(c.channels, 1, **c.types, name="out")(x)


class PromptEncoder(nn.Module):
    """Prompts -> tokens [B, N, C] and an image [B, h, w, C]; where in the image -> random Fourier features.

    Parameters: frequencies [2, C / 2] ~ N(0, 1), constants; points [4, 1, C], what to add for each label from 0 on;
    not_a_point [1, C]; no_mask [1, C]; mask (`MaskEmbedding`).
    """

    config: SAMConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        self.frequencies = self.param("frequencies", normal(1.0), (2, c.channels // 2), dtype)
        self.points = self.param("points", normal(1.0), (4, 1, c.channels), dtype)
        self.not_a_point = self.param("not_a_point", normal(1.0), (1, c.channels), dtype)
        self.no_mask = self.param("no_mask", normal(1.0), (1, c.channels), dtype)
        self.mask = MaskEmbedding(c)

    def positions(self, points: jax.Array) -> jax.Array:
        """[sin z, cos z] with z = 2 pi (2 points - 1) F: points [..., 2] in [0, 1] -> [..., C].

        (Tancik et al. 2020, arXiv:2006.10739.)
        """
        frequencies = jax.lax.stop_gradient(self.frequencies).astype(jnp.float32)
        z = 2 * math.pi * jnp.dot(2 * points.astype(jnp.float32) - 1, frequencies, precision="highest")
        return jnp.concatenate([jnp.sin(z), jnp.cos(z)], axis=-1).astype(self.config.dtype)

    def grid(self) -> jax.Array:
        """Positions of the patches' centres, [h, w, C]."""
        centres = (jnp.arange(self.config.grid) + 0.5) / self.config.grid
        return self.positions(jnp.stack(jnp.meshgrid(centres, centres), axis=-1))

    def tokens(self, points: jax.Array, labels: jax.Array) -> jax.Array:
        """Points [B, N, 2] with labels [B, N] as tokens [B, N, C]; a pixel's point is its centre."""
        c = self.config
        kinds = jnp.take(self.points[:, 0].astype(c.dtype), jnp.clip(labels, 0, 3), axis=0)
        placed = self.positions((points + 0.5) / c.image) + kinds
        nowhere = jnp.broadcast_to(self.not_a_point.astype(c.dtype)[None], placed.shape)
        return jnp.where((labels >= 0)[..., None], placed, nowhere)

    def image(self, masks: jax.Array | None, has_mask: jax.Array | None, batch: int) -> jax.Array:
        """Masks [B, 4 h, 4 w] as an addition to the image's embedding, [B, h, w, C]."""
        c = self.config
        shape = (batch, c.grid, c.grid, c.channels)
        nothing = jnp.broadcast_to(self.no_mask.astype(c.dtype).reshape(1, 1, 1, -1), shape)
        if masks is None and not self.is_initializing():
            return nothing
        x = self.mask(jnp.zeros((batch, 4 * c.grid, 4 * c.grid)) if masks is None else masks)
        return x if has_mask is None else jnp.where(has_mask.reshape(-1, 1, 1, 1), x, nothing)


def relu_mlp(config: SAMConfig) -> dict[str, Any]:
    """What the decoder's MLPs have in common, as fields of `MLP`."""
    return {"activation": nn.relu, "activate_final": False, "kernel_init": uniform, **config.types}


class TwoWayBlock(nn.Module):
    """Tokens attend to each other and to the image, pass an MLP, and the image attends to them; norms follow each.

    Positions, the tokens themselves as they came in and the Fourier features of patches, are added to queries and keys
    of every attention, save that the first block's tokens neither get them nor are added to its self-attention.
    Parameters: {tokens,to_image,to_tokens} (`Attention`), ffn, and {tokens,to_image,ffn,to_tokens}_norm.
    """

    config: SAMConfig

    @nn.compact
    def __call__(self, carry, later, token_positions, positions, mask):
        """((tokens [B, T, C], image [B, h w, C]), 0 in the first block and 1 in later ones, ...) -> (carry, None)."""
        c = self.config
        tokens, image = carry
        attend = lambda name, wide=c.channels // c.downsample: Attention(c.decoder_heads, wide, **c.types, name=name)
        norm = lambda name: layer_norm(c.decoder_norm_eps, **c.types, name=f"{name}_norm")
        ffn = MLP((c.decoder_ffn, c.channels), **relu_mlp(c), name="ffn")
        placed = tokens + later * token_positions
        tokens = norm("tokens")(later * tokens + attend("tokens", c.channels)(placed, placed, tokens, mask))
        placed = image + positions
        tokens = norm("to_image")(tokens + attend("to_image")(tokens + token_positions, placed, image, Full()))
        tokens = norm("ffn")(tokens + ffn(tokens))
        image = norm("to_tokens")(image + attend("to_tokens")(placed, tokens + token_positions, tokens, mask))
        return (tokens, image), None


class Upscale(nn.Module):
    """A transposed convolution of size and stride 2: [B, h, w, in] -> [B, 2 h, 2 w, features].

    Parameters: kernel [in, 2, 2, features], bias [features] = 0.
    """

    features: int
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Each pixel becomes 2 x 2."""
        b, h, w, channels = x.shape
        kernel = self.param("kernel", uniform, (channels, 2, 2, self.features), jnp.dtype(self.param_dtype))
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.dtype(self.param_dtype))
        y = jnp.einsum("bhwc,cpqf->bhpwqf", x.astype(self.dtype), kernel.astype(self.dtype))
        y = y.reshape(b, 2 * h, 2 * w, self.features)
        return y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)


class MaskDecoder(nn.Module):
    """Embedding, positions and prompt -> logits of 1 + M masks and their predicted IoUs.

    A mask is the product of a pixel's embedding, upscaled fourfold, with what an MLP makes of the mask's token.
    Parameters: iou_token [1, C], mask_tokens [1 + M, C] ~ N(0, 1); layers/... [decoder_layers, ...] (`TwoWayBlock`);
    final (`Attention`) and final_norm; upscale_in, upscale_norm, upscale_out; masks/layer_{0,1,2} [1 + M, ...] and
    iou/layer_... (`jaxrl.nets.mlp.MLP`).
    """

    config: SAMConfig

    @nn.compact
    def __call__(self, image, positions, prompt_tokens, present):
        """Decode.

        Args:
          image: [B, h, w, C], the embedding plus that of a mask.
          positions: [h, w, C].
          prompt_tokens: [B, N, C]. present: bool [B, N], tokens that may be seen.

        Returns:
          (logits [B, 1 + M, 4 h, 4 w], IoUs [B, 1 + M]), float32; index 0 is the single mask.
        """
        c = self.config
        b, h, w, _ = image.shape
        count = 1 + c.masks
        own = [self.param("iou_token", normal(1.0), (1, c.channels), jnp.dtype(c.param_dtype))]
        own.append(self.param("mask_tokens", normal(1.0), (count, c.channels), jnp.dtype(c.param_dtype)))
        own = jnp.broadcast_to(jnp.concatenate(own)[None].astype(c.dtype), (b, 1 + count, c.channels))
        came = jnp.concatenate([own, prompt_tokens], axis=1)
        seen = jnp.pad(present.astype(jnp.int32), ((0, 0), (1 + count, 0)), constant_values=1)
        flat = image.reshape(b, h * w, c.channels)
        positions = jnp.broadcast_to(positions.reshape(1, h * w, c.channels), flat.shape)

        def visible(queries):
            return Segments(jnp.ones((1, queries), jnp.int32), seen)

        # the two masks differ in the number of queries alone: the longer one serves both
        later = (jnp.arange(c.decoder_layers) > 0).astype(c.dtype)
        layers = scanned(TwoWayBlock, c.decoder_layers, in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast))
        mask = visible(max(h * w, came.shape[1]))
        (tokens, flat), _ = layers(c, name="layers")((came, flat), later, came, positions, mask)
        attend = Attention(c.decoder_heads, c.channels // c.downsample, **c.types, name="final")
        tokens = layer_norm(1e-5, **c.types, name="final_norm")(tokens + attend(tokens + came, flat + positions, flat))

        pixels = Upscale(c.channels // 4, **c.types, name="upscale_in")(flat.reshape(image.shape))
        pixels = gelu(layer_norm(1e-6, **c.types, name="upscale_norm")(pixels))
        pixels = gelu(Upscale(c.channels // 8, **c.types, name="upscale_out")(pixels))
        each = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1)
        kernels = each((c.channels, c.channels, c.channels // 8), **relu_mlp(c), name="masks")(tokens[:, 1 : 1 + count])
        logits = jnp.einsum("bmc,bhwc->bmhw", kernels, pixels)
        hidden = (c.iou_hidden,) * (c.iou_depth - 1)
        ious = MLP((*hidden, count), **relu_mlp(c), name="iou")(tokens[:, 0])
        return logits.astype(jnp.float32), ious.astype(jnp.float32)


class SAM(nn.Module):
    """(images, prompts) -> (logits [B, 1 + M, 4 h, 4 w], IoUs [B, 1 + M]); `encode` and `decode` are its halves.

    Parameters: image_encoder (`ImageEncoder`), prompt_encoder (`PromptEncoder`), mask_decoder (`MaskDecoder`).
    Index 0 is the single mask, the paper's choice for several prompts; 1 ... M are those for one, ambiguous prompt.
    """

    config: SAMConfig

    def setup(self):
        self.image_encoder = ImageEncoder(self.config)
        self.prompt_encoder = PromptEncoder(self.config)
        self.mask_decoder = MaskDecoder(self.config)

    def __call__(self, images: jax.Array, prompts: Prompts) -> tuple[jax.Array, jax.Array]:
        """See `encode` and `decode`."""
        return self.decode(self.encode(images), prompts)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [B, image, image, 3], normalised, -> embeddings [B, h, w, C]."""
        return self.image_encoder(images)

    def decode(self, embeddings: jax.Array, prompts: Prompts) -> tuple[jax.Array, jax.Array]:
        """Answer prompts about embedded images.

        Args:
          embeddings: [B, h, w, C].
          prompts: B of them.

        Returns:
          (logits [B, 1 + M, 4 h, 4 w], IoUs [B, 1 + M]), float32.

        Raises:
          ValueError: shapes that do not fit the config.
        """
        _check(self.config, embeddings, prompts)
        p, encoder = prompts, self.prompt_encoder
        image = embeddings.astype(self.config.dtype) + encoder.image(p.masks, p.has_mask, embeddings.shape[0])
        return self.mask_decoder(image, encoder.grid(), encoder.tokens(p.points, p.labels), p.labels > ABSENT)


def _check(config: SAMConfig, embeddings, prompts):
    b, n = embeddings.shape[0], config.grid
    expected = {
        "embeddings": (embeddings, (b, n, n, config.channels), "[B, h, w, C]"),
        "prompts.labels": (prompts.labels, (b, *prompts.labels.shape[1:2]), "[B, N]"),
        "prompts.points": (prompts.points, (b, *prompts.labels.shape[1:2], 2), "[B, N, 2]"),
        "prompts.masks": (prompts.masks, (b, 4 * n, 4 * n), "[B, 4 h, 4 w]"),
        "prompts.has_mask": (prompts.has_mask, (b,), "[B]"),
    }
    for name, (array, shape, axes) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}, expected {axes} = {shape}: a prompt for each of B embedded images, "
                "made by sam.prompt"
            )
    if prompts.has_mask is not None and prompts.masks is None:
        raise ValueError("has_mask was given without masks: give the masks too, or neither")


def _published(width, layers, heads):
    return SAMConfig(width, layers, heads, global_every=layers // 4, ffn=4 * width)


SIZES: dict[str, SAMConfig] = {
    # of the tests: windows of 3 x 3 on a grid of 4 x 4, so that padding matters
    "tiny": SAMConfig(
        8,
        4,
        2,
        2,
        16,
        window=3,
        image=16,
        patch=4,
        channels=16,
        decoder_heads=2,
        decoder_ffn=16,
        iou_hidden=8,
    ),  # fmt: skip
    # Kirillov et al. 2023, arXiv:2304.02643, appendix A; build_sam.py of facebookresearch/segment-anything
    "vit_b": _published(768, 12, 12),
    "vit_l": _published(1024, 24, 16),
    "vit_h": _published(1280, 32, 16),
}
