"""What a mask means for layers whose past is a state: linear attention, recurrent networks."""

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
            ids = (jnp.take(part.keys(), jnp.maximum(at, 0), axis=1, mode="clip") for at in (here, here - 1))
            new = jnp.broadcast_to(jnp.not_equal(*ids), (rows, tokens))
            starts = new if starts is None else starts | new
        elif not isinstance(part, Full):
            raise ValueError(
                f"a state cannot follow the mask {type(part).__name__}: it forgets nothing that came before; expected "
                "Causal, Full, Segments and their &. Use layers that attend, or leave out what needs this mask "
                "(share_prompt, windows)"
            )
    return causal, starts
