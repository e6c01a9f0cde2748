"""Chameleon: one decoder over text and the tokens of pictures (Chameleon team 2024, arXiv:2405.09818).

The decoder is `jaxrl.nets.transformer` with query and key norms of each head, the 34B with its norms inside of the
branches; the pictures' tokens are those of `jaxrl.nets.vision.vq`. Dropout is left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.vision.vq import VQConfig

LETTERS = {letter: str(digit) for digit, letter in enumerate("ABCDEFGHIJ")}


@dataclass(frozen=True)
class Pictures:
    """How pictures stand among the tokens: begin, then `tokens` ids of the codebook, row by row, then end.

    ids: for each code its token. begin, end: tokens around a picture.
    """

    ids: tuple[int, ...]
    begin: int
    end: int
    tokens: int  # of one picture

    def embed(self, codes: jax.Array) -> jax.Array:
        """Codes [..., h, w] of pictures as tokens [..., 1 + tokens + 1]."""
        flat = codes.reshape(*codes.shape[:-2], -1)
        if flat.shape[-1] != self.tokens:
            raise ValueError(f"pictures have {codes.shape[-2:]} codes, expected {self.tokens} in all")
        table = jnp.asarray(self.ids, jnp.int32)
        edge = lambda token: jnp.full((*flat.shape[:-1], 1), token, jnp.int32)
        return jnp.concatenate([edge(self.begin), table[flat], edge(self.end)], axis=-1)

    def codes(self, tokens: jax.Array) -> jax.Array:
        """The codes of a picture's tokens [...]; -1 for a token that is none."""
        table = jnp.full((max(*self.ids, self.begin, self.end) + 1,), -1, jnp.int32)
        table = table.at[jnp.asarray(self.ids)].set(jnp.arange(len(self.ids)))
        known = tokens < len(table)
        return jnp.where(known, table[jnp.where(known, tokens, 0)], -1)

    def allowed(self, vocab_size: int) -> Callable:
        """What may come next, for `rollout(..., allowed=)`: in a picture codes, then its end; in text no code.

        Returns:
          (rows [B, T] of tokens, column) -> bool [B, V], given the tokens before the column.
        """
        table = jnp.zeros(vocab_size, bool).at[jnp.asarray(self.ids)].set(True)
        only_end = jnp.arange(vocab_size) == self.end

        def allowed(rows, column):
            at = jnp.arange(rows.shape[1])
            begun = (rows == self.begin) & (at < column)[None]
            last = jnp.max(jnp.where(begun, at[None], -self.tokens - 2), axis=1)
            inside = (column - last)[:, None]  # 1 .. tokens: codes; tokens + 1: the end
            of_text = ~table & ~only_end
            pictured = jnp.where(inside <= self.tokens, table[None], only_end[None])
            return jnp.where(inside <= self.tokens + 1, pictured, of_text[None])

        return allowed


def pictures(vocabulary: Mapping[str, int], config: VQConfig, *, begin: int, end: int) -> Pictures:
    """From a published vocabulary, where code 123 is called IMGIMGBCDZ: its digits as letters.

    Raises:
      ValueError: a vocabulary that does not name every code.
    """
    ids = {}
    for name, token in vocabulary.items():
        if name.startswith("IMGIMG"):
            ids[int("".join(LETTERS.get(letter, letter) for letter in name[len("IMGIMG") : -1]))] = token
    if missing := [code for code in range(config.codes) if code not in ids]:
        raise ValueError(
            f"the vocabulary has no names for {len(missing)} of {config.codes} codes, such as {missing[0]}"
        )
    return Pictures(tuple(ids[code] for code in range(config.codes)), begin, end, config.tokens)


def chameleon_7b(**changes) -> TransformerConfig:
    """The decoder of Chameleon 7B: 7,013,666,816 parameters."""
    config = TransformerConfig(
        vocab_size=65536, width=4096, layers=32, heads=32, kv_heads=32, ffn=11008, max_length=4096, norm_eps=1e-5,
        qk_norm="heads",
    )  # fmt: skip
    return replace(config, **changes)


def chameleon_34b(**changes) -> TransformerConfig:
    """The decoder of Chameleon 34B: 34,294,308,864 parameters."""
    sizes = {"width": 8192, "layers": 48, "heads": 64, "kv_heads": 8, "ffn": 22016, "norm_place": "branch"}
    return replace(chameleon_7b(), **(sizes | changes))
