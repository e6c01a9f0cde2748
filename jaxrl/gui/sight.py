"""Screens for networks that see: pixels in a bank, and image ids where a text holds placeholders.

    sight = Sight(SIZES["tiny"], length=36)
    seen = sft_batch(sight, traces, tokenizer)

    @jax.jit
    def step(state, seen):
        return sft.make(config, seen.model(sight.config), optimizer).step(state, seen.batch)

Each screenshot lies in the bank once, whatever number of turns or pairs show it. The model is made inside of the
compiled function, of the batch's bank, so that other screens of the same shapes take no other program.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data.packing import best_fit, pack
from jaxrl.data.preferences import encode_pairs
from jaxrl.data.records import encode_examples
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.gui.history import SCREENS, Reflection, Trace, kept, pair_records, records
from jaxrl.nets.language_model import LanguageModel
from jaxrl.nets.vision import packed as vision
from jaxrl.nets.vision.packed import Patches
from jaxrl.nets.vision.prepare import Preparation, prepare_native
from jaxrl.nets.vision_language import VisionLanguageConfig, image_ids, with_images
from jaxrl.types import Pairs, TokenBatch

PLACEHOLDER = "<|image_pad|>"
"""Qwen2-VL's; one token of the tokenizer, which stands for one feature."""


class Sight(NamedTuple):
    """How a network is shown screens.

    config: of its decoder and its tower. length: patches of the largest screen, those of a row of the bank.
    preparation: how pictures are resized and normalised. A screen is written `before`, placeholders, `after`; Qwen2-VL
    has <|vision_start|> and <|vision_end|> there.
    """

    config: VisionLanguageConfig
    length: int
    preparation: Preparation = Preparation(None, (0.5,) * 3, (0.5,) * 3)
    placeholder: str = PLACEHOLDER
    before: str = ""
    after: str = ""

    def show(self, screen: Any) -> str:
        """A screen [H, W, 3] as text, for `history.prompt`."""
        return f"{self.before}{self.placeholder * _features(self, np.shape(screen))}{self.after}"


@flax.struct.dataclass
class Seen:
    """Tokens that name features, and the screens they are of.

    batch: a `TokenBatch`, `Pairs`, or what a step makes of one (`preference.Referenced`). bank: [S, N, ...], a screen a
    row. per_row: how many screens a row of tokens shows at most; static.
    """

    batch: Any
    bank: Patches
    per_row: int = flax.struct.field(pytree_node=False)

    def model(self, config: VisionLanguageConfig, decoder: LanguageModel | None = None) -> LanguageModel:
        """The network that reads them."""
        return with_images(config, self.bank, model=decoder, per_row=self.per_row)


def bank_of(sight: Sight, screens: Sequence[Any], *, rows: int | None = None) -> Patches:
    """Screens uint8 [H, W, 3] as a bank, one a row, on the host.

    Args:
      sight: sizes.
      screens: at least one.
      rows: of the bank, filled up with repetitions of the last screen; None: as many as there are screens.

    Raises:
      ValueError: a screen of more patches than `sight.length`, or that patches do not fill.
    """
    one = _packed(sight)
    found = [jax.device_get(one(np.asarray(screen))) for screen in screens]
    found += found[-1:] * ((len(found) if rows is None else rows) - len(found))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def see(
    sight: Sight, tokenizer: Tokenizer, tokens: np.ndarray, screens: Sequence[Sequence[Any]], *, rows: int | None = None
) -> tuple[np.ndarray, Patches]:
    """Image ids in place of placeholders, and the bank that they name.

    Args:
      sight: how they are shown.
      tokenizer: of the tokens.
      tokens: [B, T], with a placeholder for each feature.
      screens: of each row, in their order, as `history.kept` gives them.
      rows: as in `bank_of`.

    Returns:
      (tokens [B, T], bank); equal screens are one row of the bank.

    Raises:
      ValueError: a placeholder that is no single token, or a row with another number of them than its screens have
        features; a decoder whose vocabulary is smaller than the tokenizer's.
    """
    if sight.config.text.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the decoder's vocab_size is {sight.config.text.vocab_size}; expected at least the tokenizer's "
            f"{tokenizer.vocab_size}, as ids of features follow it"
        )
    placeholder = tokenizer.token_id(sight.placeholder)
    if placeholder is None:
        raise ValueError(f"{sight.placeholder!r} is no token of the tokenizer; expected one that stands for a feature")
    places: dict[Any, int] = {}
    numbers = [[places.setdefault(_key(screen), len(places)) for screen in row] for row in screens]
    distinct = {_key(screen): screen for row in screens for screen in row}
    bank = bank_of(sight, list(distinct.values()), rows=rows)
    ids = [images[0] for images in image_ids(sight.config, bank)]
    filled = np.array(tokens)
    for i, row in enumerate(numbers):
        here, named = filled[i] == placeholder, np.concatenate([ids[number] for number in row])
        if here.sum() != len(named):
            raise ValueError(f"row {i} has {here.sum()} placeholders and its screens {len(named)} features")
        filled[i, here] = named
    return filled, bank


def sft_batch(
    sight: Sight,
    traces: Iterable[Trace],
    tokenizer: Tokenizer,
    *,
    keep: int = SCREENS,
    pad_to: int | None = None,
    packed: int | None = None,
    rows: int | None = None,
    **knobs: Any,
) -> Seen:
    """As `history.sft_batch`, with the screens themselves. rows: as in `bank_of`.

    Returns:
      `Seen` of a `TokenBatch`.
    """
    traces = list(traces)
    learnt = knobs.get("learnt", lambda trace, turn: True)
    found = [record for trace in traces for record in records(trace, show=sight.show, keep=keep, **knobs)]
    turns = [(trace.turns, i) for trace in traces for i in range(len(trace.turns)) if learnt(trace, i)]
    screens = [kept(turns[:i], turns[i].screen, keep=keep) for turns, i in turns]
    examples = encode_examples(found, tokenizer, pad_to=pad_to)
    tokens, bank = see(sight, tokenizer, examples.tokens, screens, rows=rows)
    if packed is None:
        return _seen(TokenBatch(tokens, examples.loss_mask), bank, keep)  # pyright: ignore
    fit = best_fit(examples.lengths, packed)
    most = max(len({_key(screen) for i in row for screen in screens[i]}) for row in fit)
    return _seen(pack(examples._replace(tokens=tokens), packed, rows=fit), bank, most)


def pair_batch(
    sight: Sight,
    reflections: Iterable[Reflection],
    tokenizer: Tokenizer,
    *,
    keep: int = SCREENS,
    pad_to: int | None = None,
    rows: int | None = None,
) -> Seen:
    """As `history.pair_batch`, with the screens themselves, which both sides of a pair share.

    Returns:
      `Seen` of `Pairs`, for `preference`'s `reference` and `step`.
    """
    reflections = list(reflections)
    pairs = encode_pairs(pair_records(reflections, show=sight.show, keep=keep), tokenizer, pad_to=pad_to)
    screens = [kept(one.past, one.screen, keep=keep) for one in reflections]
    both = np.concatenate([np.asarray(side.tokens) for side in (pairs.chosen, pairs.rejected)])
    tokens, bank = see(sight, tokenizer, both, screens * 2, rows=rows)
    sides = zip((pairs.chosen, pairs.rejected), np.split(tokens, 2), strict=True)
    return _seen(Pairs(*(side.replace(tokens=tokens) for side, tokens in sides)), bank, keep)  # pyright: ignore


def _seen(batch: Any, bank: Patches, per_row: int) -> Seen:
    return jax.tree.map(jnp.asarray, Seen(batch, bank, per_row))


def _key(screen: Any) -> tuple:
    pixels = np.asarray(screen)
    return pixels.shape, pixels.tobytes()


def _prepared(sight: Sight, screen: jax.Array) -> jax.Array:
    return prepare_native(sight.preparation, sight.config.vision, screen)


@lru_cache(maxsize=64)
def _features(sight: Sight, shape: tuple[int, ...]) -> int:
    prepared = jax.eval_shape(partial(_prepared, sight), jax.ShapeDtypeStruct(shape, jnp.uint8))
    return prepared.shape[0] * prepared.shape[1] // sight.config.vision.side**2


@lru_cache(maxsize=16)
def _packed(sight: Sight):
    return jax.jit(lambda screen: vision.pack(sight.config.vision, [_prepared(sight, screen)], sight.length))
