"""What a mask means for layers that do not attend: linear attention, recurrent networks, experts."""

import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Causal, Full, Mask, Segments
from jaxrl.kernels.attention.masks import And


def documents(mask: Mask, rows: int, tokens: int, offset: int | jax.Array = 0) -> tuple[bool, jax.Array | None]:
    """What a mask of `Causal`, `Full`, `Segments` and their `&` means for a state.

    The ids that count are those of the keys: a token's id as a query must be the same, and the tokens of a document
    neighbours. Padding with an id of its own, on the left or right, is a document like others.

    Returns:
      (does a token see only what came before, bool [rows, tokens] where a document starts or None if there is one).

    Raises:
      ValueError: for any other mask.
    """
    parts, causal, starts = [mask], False, None
    while parts:
        part = parts.pop()
        if isinstance(part, And):
            parts += [part.a, part.b]
        elif isinstance(part, Causal):
            causal = True
        elif isinstance(part, Segments):
            here = offset + jnp.arange(tokens)
            ids = (_ids(part, jnp.maximum(at, 0)) for at in (here, here - 1))
            new = jnp.broadcast_to(jnp.not_equal(*ids), (rows, tokens))
            starts = new if starts is None else starts | new
        elif not isinstance(part, Full):
            raise ValueError(
                f"a state cannot follow the mask {type(part).__name__}: it forgets nothing that came before; expected "
                "Causal, Full, Segments and their &. Use layers that attend, or leave out what needs this mask "
                "(share_prompt, windows)"
            )
    return causal, starts


def real(mask: Mask, tokens: int, offset: int | jax.Array = 0) -> jax.Array | None:
    """Which columns hold a token, bool [B|1, tokens]: padding has an id of 0 or less in a `Segments` of the mask.

    So all loops of this library number theirs. None where no `Segments` stands in the mask, or only under `|`.
    """
    if isinstance(mask, And):
        found = [side for side in (real(mask.a, tokens, offset), real(mask.b, tokens, offset)) if side is not None]
        return found[0] & found[-1] if found else None
    return _ids(mask, offset + jnp.arange(tokens)) > 0 if isinstance(mask, Segments) else None


def _ids(segments: Segments, columns: jax.Array) -> jax.Array:
    return jnp.take(segments.keys(), columns, axis=1, mode="clip")
