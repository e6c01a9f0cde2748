"""Exact-answer rewards: in token ids on the device, in text on the host."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.types import Finish, Rollout


@flax.struct.dataclass
class Answers:
    """Right-padded answers: `tokens [N, A]` int32 and `lengths [N]` int32, without EOS."""

    tokens: jax.Array
    lengths: jax.Array


def exact_answer(rollout: Rollout, answers: Answers, *, marker: int | None = None) -> jax.Array:
    """1 where a completion's answer equals the expected one token for token, else 0.

    The answer is what stands after the last `marker` (the whole completion where there is none), up to the EOS. A
    completion that did not end by itself earns nothing.

    Args:
      rollout: `B` completions of width `C`.
      answers: `[B, A]`, one row for each completion.
      marker: a token id, such as that of `=`; None compares whole completions.

    Returns:
      `[B]` float32 of zeros and ones.
    """
    tokens = rollout.completions
    content = (rollout.lengths - (rollout.finish == Finish.EOS))[:, None]
    columns = jnp.arange(tokens.shape[1])[None, :]
    marks = (tokens == marker) & (columns < content) if marker is not None else jnp.zeros(tokens.shape, bool)
    start = jnp.max(jnp.where(marks, columns + 1, 0), axis=1, keepdims=True)
    slots = jnp.arange(answers.tokens.shape[1])[None, :]
    given = jnp.take_along_axis(tokens, jnp.minimum(start + slots, tokens.shape[1] - 1), axis=1)
    expected = answers.lengths[:, None]
    same = ((given == answers.tokens) | (slots >= expected)).all(axis=1)
    complete = (content - start == expected)[:, 0] & (rollout.finish != Finish.LENGTH)
    return (same & complete).astype(jnp.float32)


def exact_text(
    *,
    completions: Sequence[str],
    answer: Sequence[str],
    finish_reasons: Sequence[str],
    marker: str | None = None,
    **_,
) -> list[float]:
    """The comparison on text, for tokenizers that can spell one answer in several ways.

    White space around an answer and special tokens inside it do not count, as they do on token ids.

    Args:
      completions: decoded texts, without the EOS.
      answer: the data's `answer` column.
      finish_reasons: `eos`, `stop` or `length`; a completion cut off by `length` earns nothing.
      marker: text after whose last occurrence the answer stands; None compares whole completions.

    Returns:
      Zeros and ones.
    """
    read = lambda text: (text.rsplit(marker, 1)[-1] if marker else text).strip()
    return [
        float(reason != "length" and read(text) == str(expected).strip())
        for text, expected, reason in zip(completions, answer, finish_reasons, strict=True)
    ]


def exact_reward(*, marker: str | None = None) -> Callable[..., list[float]]:
    """`exact_text` with its marker, to be combined with others."""
    return partial(exact_text, marker=marker)
