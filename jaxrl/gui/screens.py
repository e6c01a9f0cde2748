"""Screens as text: each patch of a picture is a letter, so that prompts with screens stay texts like all others.

The letters are of Unicode's private area, which no instruction and no typed text holds by itself. A network with eyes
is shown the pixels: `jaxrl.gui.sight`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data.tokenizer import CharTokenizer

FIRST = 0xE000
"""The letter of the palette's first colour."""


def patch_ids(screen: jax.Array, palette: jax.typing.ArrayLike, *, patch: int) -> jax.Array:
    """The colour that most pixels of each patch are nearest to; of equals the first of the palette.

    Args:
      screen: uint8 [H, W, 3].
      palette: uint8 [P, 3].
      patch: pixels along its side, a divisor of H and W.

    Returns:
      int32 [(H / patch) (W / patch)], row by row.

    Raises:
      ValueError: patches that do not fill the screen.
    """
    height, width = screen.shape[:2]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patches of {patch} do not fill a screen of {width} x {height}; give a divisor of both")
    colours = jnp.asarray(palette, jnp.int32)
    away = screen.astype(jnp.int32)[:, :, None] - colours[None, None]
    nearest = jnp.argmin((away**2).sum(-1), axis=-1)
    tiles = nearest.reshape(height // patch, patch, width // patch, patch).transpose(0, 2, 1, 3)
    votes = jax.nn.one_hot(tiles.reshape(-1, patch * patch), len(colours), dtype=jnp.int32).sum(1)
    return jnp.argmax(votes, axis=-1).astype(jnp.int32)


def mosaic(palette: np.ndarray, *, patch: int) -> Callable[[Any], str]:
    """A `show`: screens [H, W, 3] as texts of one letter a patch."""
    ids = jax.jit(lambda screen: patch_ids(screen, palette, patch=patch))
    return lambda screen: "".join(chr(FIRST + int(i)) for i in np.asarray(ids(screen)))


def letters(palette: np.ndarray) -> str:
    """The alphabet of `mosaic`."""
    return "".join(chr(FIRST + i) for i in range(len(palette)))


@dataclass(frozen=True)
class PieceTokenizer(CharTokenizer):
    """A character tokeniser in which some texts are one token each; the longest that fits comes first.

    The ids of characters, BOS, EOS and padding are the CharTokenizer's, the pieces follow. Without `special` all is
    spelt by characters, so that a user's text cannot forge a piece.

    Raises ValueError if a piece is shorter than two characters, or there twice.
    """

    pieces: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        wrong = sorted({piece for piece in self.pieces if len(piece) < 2 or self.pieces.count(piece) > 1})
        if wrong:
            raise ValueError(f"PieceTokenizer got the pieces {wrong}; expected distinct ones of two characters or more")

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {piece: super(PieceTokenizer, self).vocab_size + i for i, piece in enumerate(self.pieces)}

    @cached_property
    def _rule(self) -> re.Pattern[str]:
        longest = sorted(self.pieces, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest)) + ")" if longest else "(?!)")

    @property
    def vocab_size(self) -> int:
        return super().vocab_size + len(self.pieces)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids. Raises ValueError for a character outside the alphabet and all pieces."""
        if not special:
            return super().encode(text)
        parts = enumerate(self._rule.split(text))
        return [i for n, part in parts for i in ([self._numbers[part]] if n % 2 else CharTokenizer.encode(self, part))]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens are left out. Raises ValueError for an id out of range."""
        start = super().vocab_size
        text = lambda i: self.pieces[i - start] if start <= i < self.vocab_size else CharTokenizer.decode(self, [i])
        return "".join(text(int(i)) for i in ids)

    def token_id(self, text: str) -> int | None:
        """Return the id of a piece, a character, or `<bos>`, `<eos>`, `<pad>`; None for anything else."""
        return self._numbers.get(text, super().token_id(text))

    def token_text(self, token: int) -> str:
        """Return the piece or character, or `<bos>`, `<eos>`, `<pad>`."""
        start = super().vocab_size
        return self.pieces[token - start] if start <= token < self.vocab_size else super().token_text(token)

    def to_json(self) -> dict[str, Any]:
        """Return the plain dictionary from which `from_json` builds this tokeniser again."""
        return {"kind": "pieces", "alphabet": self.alphabet, "pieces": list(self.pieces)}

    @classmethod
    def from_json(cls, spec: dict[str, Any]) -> Self:
        """Build the tokeniser that `to_json` described."""
        return cls(spec["alphabet"], tuple(spec["pieces"]))
