"""Vision-language models: features of a packed ViT stand among the tokens of a decoder (Qwen2-VL, Kimi-VL).

In the form of a `LanguageModel`, so that losses and loops need not know of images: those that a run uses lie in a bank,
`Patches [I, N, ...]`, and each of the I * M features that the tower makes of it, M = N / merge^2, is a token id after
the vocabulary. Such ids stand in prompts; nothing predicts them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrl.nets import presets
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.vision.packed import SIZES as TOWERS
from jaxrl.nets.vision.packed import PackedViT, PackedViTConfig, Patches


@dataclass(frozen=True)
class VisionLanguageConfig:
    """A decoder and the tower whose features it reads. With `text.rope_sections` (3 axes) positions are M-RoPE's."""

    text: TransformerConfig
    vision: PackedViTConfig
    tokens_per_second: float | None = None  # positions that a second of video takes; None: one a frame

    def __post_init__(self):
        if self.vision.out != self.text.width:
            raise ValueError(f"the tower's out is {self.vision.out}, expected the decoder's width {self.text.width}")
        if self.text.rope_sections and len(self.text.rope_sections) != 3:
            raise ValueError(f"rope_sections {self.text.rope_sections} must be 3: of frame, row and column")


class Features(NamedTuple):
    """Where the features of a bank stand, ints [I, M, 3], [I, M] and [I, M].

    places: frame, row and column in features, the frame as the time at which M-RoPE counts it. index: number in its
    image. saved: how many positions the image takes less than it has features, at its last one, and 0 at the others.
    """

    places: jax.Array
    index: jax.Array
    saved: jax.Array


def features(config: VisionLanguageConfig, bank: Patches) -> Features:
    """The features that `PackedViT` makes of a bank, without their values.

    The frames of a video stand at the whole part of frame x seconds of one x tokens_per_second (Qwen2.5-VL: Bai et al.
    2025, arXiv:2502.13923, section 2.1.3).
    """
    m = config.vision.merge
    images = bank.images[:, :: m * m]
    per = jnp.asarray([1, m, m])[None, None]
    places, grids = bank.places[:, :: m * m] // per, bank.grids[:, :: m * m] // per
    if config.tokens_per_second is not None:
        pace = config.tokens_per_second * bank.seconds[:, :: m * m]
        places = places.at[..., 0].set((places[..., 0] * pace).astype(places.dtype))
    columns = jnp.broadcast_to(jnp.arange(images.shape[1])[None], images.shape)
    begins = jnp.pad(jnp.diff(images, axis=1) != 0, ((0, 0), (1, 0)), constant_values=True)
    index = columns - lax.cummax(jnp.where(begins, columns, 0), axis=1)
    last = (index == grids.prod(-1) - 1) & (images > 0)
    taken = jnp.maximum(places[..., 0] + 1, grids[..., 1:].max(-1))
    return Features(places, index, jnp.where(last, index + 1 - taken, 0))


def image_ids(config: VisionLanguageConfig, bank: Patches) -> list[list[np.ndarray]]:
    """The token ids of each image of each row of a bank, in the order in which a prompt must hold them.

    Where a tokenizer wrote a placeholder for each feature: tokens[tokens == placeholder] = np.concatenate(ids).
    """
    images = np.asarray(bank.images)[:, :: config.vision.merge**2]
    first = config.text.vocab_size + images.shape[1] * np.arange(len(images))
    found = lambda row, i: (first[row] + np.flatnonzero(images[row] == i)).astype(np.int32)
    return [[found(row, i) for i in range(1, images[row].max() + 1)] for row in range(len(images))]


def mrope_positions(
    ids: jax.Array, of: Features, *, vocab_size: int, positions: jax.Array | None = None, from_end: bool = False
) -> jax.Array:
    """Positions of three axes (M-RoPE: Wang et al. 2024, arXiv:2409.12191, section 2.1).

    Text has one number on all axes; a feature has that of its image's first plus (frame, row, column); text after an
    image goes on at the largest number so far + 1. So Qwen's models were trained; transformers 5.24 goes on after the
    larger of rows and columns, which differs where a video is longer in time.

    Args:
      ids: [B, T] tokens and, from `vocab_size` on, features.
      of: of the bank.
      vocab_size: of the text.
      positions: [B, T], which number in its example a token has; 0 begins another. None: rows are one example each.
      from_end: count such that the text after the last image has its `positions`, not that the first token has 0. The
        differences are the same, and so is attention; tokens decoded later need not know of the images.

    Returns:
      int32 [3, B, T], frame, row and column.
    """
    b, t = ids.shape
    columns = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
    positions = columns if positions is None else positions
    which = ids - vocab_size
    seen = which >= 0
    take = lambda x, fill=0: jnp.where(seen, x.reshape(-1)[jnp.maximum(which, 0)], fill)
    begins = positions == 0
    # saved from here on to the end of the example
    after = jnp.pad(lax.cumsum(take(of.saved), axis=1, reverse=True), ((0, 0), (0, 1)))
    following = jnp.pad(lax.cummin(jnp.where(begins, columns, t), axis=1, reverse=True)[:, 1:], ((0, 0), (0, 1)))
    following = jnp.where(columns == t - 1, t, following)
    rest = after[:, :-1] - jnp.take_along_axis(after, following, axis=1)
    if not from_end:
        first = lax.cummax(jnp.where(begins, columns, 0), axis=1)
        rest = rest - jnp.take_along_axis(rest, first, axis=1)
    start = positions - take(of.index) + rest
    return start[None] + jnp.stack([take(of.places[..., axis]) for axis in range(3)])


def with_images(
    config: VisionLanguageConfig, bank: Patches, *, model: LanguageModel | None = None, per_row: int | None = 1
) -> LanguageModel:
    """A decoder that reads images, as a LanguageModel whose ids go on after the vocabulary (`image_ids`).

    `apply` is the decoder's, with the tower's feature in the place of an embedding; where there is no image among the
    tokens the tower does not run. A single token over a cache is a word; a feature there is NaN. Logits are over the
    text's vocabulary. `log_probs` gives 0 for a feature as target, but a loss mask must not count it:
    `jnp.where(tokens < vocab_size, loss_mask, 0)`.

    With M-RoPE positions follow from ids and `positions`, `from_end`: over a cache, images stand in the prompt, which
    is read in one call. Positions [3, B, T] are taken as they are.

    Call it inside of the function that is compiled, and the bank is data, as tokens are: other images of the same shape
    take no other program. So are written a pass, `rollout`, and the steps of `sft`, `preference` and `grpo`:

        @jax.jit
        def step(state, bank, batch):
            return sft.make(config, with_images(networks, bank), optimizer).step(state, batch)

    Args:
      config: of both networks.
      bank: all images that tokens may name, [I, N, ...].
      model: the decoder, of `config.text`; None: `language_model(config.text)`.
      per_row: how many rows of the bank one row of tokens names at most; those alone are computed. A feature beyond
        them, or beyond the bank, is NaN. None: the whole bank is, once for all rows, which is right for a bank of one
        batch.

    Returns:
      The model; parameters {"text": the decoder's, "vision": the tower's}.
    """
    text, vision = language_model(config.text) if model is None else model, PackedViT(config.vision)
    words, size = config.text.vocab_size, bank.values.shape[1] // config.vision.merge**2
    of = jax.jit(features, static_argnums=0)(config, bank)

    def init(key):
        k_text, k_vision = jax.random.split(key)
        one = jax.tree.map(lambda x: x[:1], bank)
        return {"text": text.init(k_text), "vision": vision.init(k_vision, one)["params"]}

    def encode(params, rows: Patches) -> Any:
        return vision.apply({"params": params}, rows)

    def looked_up(params, ids):
        """Features [B, T, D] of ids, anything where they are words."""
        place = jnp.maximum(ids - words, 0)
        if per_row is None:
            found = encode(params, bank).reshape(-1, config.text.width)
            return jnp.where((place < len(found))[..., None], found[place], jnp.nan)
        row = jnp.where(ids < words, -1, place // size)
        named, rest = [], row
        for _ in range(per_row):  # the highest, the second highest, ...
            named.append(rest.max(axis=1, keepdims=True))
            rest = jnp.where(rest == named[-1], -1, rest)
        named = jnp.concatenate(named, axis=1)
        found = encode(params, jax.tree.map(lambda x: x[jnp.maximum(named, 0).reshape(-1)], bank))
        found = found.reshape(len(ids), per_row * size, -1)
        same = (row[:, :, None] == named[:, None, :]) & (row < len(bank.images))[..., None]
        at = jnp.argmax(same, axis=-1) * size + place % size
        there = same.any(-1, keepdims=True)
        return jnp.where(there, jnp.take_along_axis(found, at[..., None], axis=1), jnp.nan)

    def apply(params, ids, *, positions=None, mask=None, cache=None, **options):
        is_image = (ids >= words)[..., None]
        x = params["text"]["embed"]["embedding"][jnp.where(is_image[..., 0], 0, ids)].astype(config.text.dtype)
        if cache is not None and ids.shape[1] == 1:
            x = jnp.where(is_image, jnp.nan, x)
        else:
            mixed = lambda: jnp.where(is_image, looked_up(params["vision"], ids).astype(x.dtype), x)
            x = lax.cond(is_image.any(), mixed, lambda: x)
        if config.text.rope_sections and (positions is None or positions.ndim == 2):
            if positions is None:
                columns = jnp.arange(ids.shape[1]) + (0 if cache is None else cache.length)
                positions = jnp.broadcast_to(columns[None], ids.shape)
            positions = mrope_positions(ids, of, vocab_size=words, positions=positions, from_end=True)
        return text.apply(params["text"], x, positions=positions, mask=mask, cache=cache, **options)

    def log_probs(hidden, unembedding, targets, **options):
        word = targets < words
        found, *rest = text.log_probs(hidden, unembedding, jnp.where(word, targets, 0), **options)
        return jnp.where(word, found, 0.0), *rest

    unembedding = lambda params: text.unembedding(params["text"])
    return text._replace(init=init, apply=apply, unembedding=unembedding, log_probs=log_probs)


_MROPE: dict[str, Any] = {"rope_sections": (16, 24, 24), "max_length": 32768}
_QWEN_3B = {"width": 2048, "layers": 36, "heads": 16, "ffn": 11008}
_QWEN_72B = {"width": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "ffn": 29568}
SIZES = {
    "tiny": VisionLanguageConfig(presets.tiny(width=32, rope_sections=(1, 1, 2)), TOWERS["tiny"]),
    # Wang et al. 2024, arXiv:2409.12191: Qwen2's decoders
    "qwen2_vl_2b": VisionLanguageConfig(presets.qwen25_1_5b(**_MROPE), TOWERS["qwen2_vl_2b"]),
    "qwen2_vl_7b": VisionLanguageConfig(presets.qwen25_7b(**_MROPE), TOWERS["qwen2_vl_7b"]),
    "qwen2_vl_72b": VisionLanguageConfig(presets.qwen25_7b(**_QWEN_72B, **_MROPE), TOWERS["qwen2_vl_72b"]),
    # Bai et al. 2025, arXiv:2502.13923: Qwen2.5's
    "qwen25_vl_3b": VisionLanguageConfig(
        presets.qwen25_1_5b(**_QWEN_3B, rope_sections=(16, 24, 24), max_length=128000), TOWERS["qwen25_vl_3b"], 2
    ),
    "qwen25_vl_7b": VisionLanguageConfig(
        presets.qwen25_7b(rope_sections=(16, 24, 24), max_length=128000), TOWERS["qwen25_vl_7b"], 2
    ),
    "qwen25_vl_32b": VisionLanguageConfig(
        presets.qwen25_32b(rope_sections=(16, 24, 24), max_length=128000), TOWERS["qwen25_vl_32b"], 2
    ),
    "qwen25_vl_72b": VisionLanguageConfig(
        presets.qwen25_72b(rope_sections=(16, 24, 24), max_length=128000), TOWERS["qwen25_vl_72b"], 2
    ),
    # Kimi Team 2025, arXiv:2504.07491: Moonlight's, after the stage for long texts
    "kimi_vl_a3b": VisionLanguageConfig(
        presets.moonlight_16b_a3b(rope_base=8e5, max_length=131072), TOWERS["moonvit_so_400m"]
    ),
}
# Qin et al. 2025, arXiv:2501.12326: Qwen2-VL, trained on; UI-TARS-1.5: Qwen2.5-VL
SIZES |= {f"ui_tars_{size}": SIZES[f"qwen2_vl_{size}"] for size in ("2b", "7b", "72b")}
SIZES["ui_tars_15_7b"] = SIZES["qwen25_vl_7b"]
