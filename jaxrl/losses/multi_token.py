"""The loss of networks that predict several tokens ahead, whatever makes the predictions."""

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import same_shape
from jaxrl.losses.reduce import Weighted, tokens


def targets(
    ids: jax.Array, mask: jax.Array, *, depth: int, segments: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """What is to be predicted at each column, 1, 2, ..., depth + 1 tokens on, and where.

    Args:
      ids: [B, T] token ids.
      mask: [B, T], true where a token is to be predicted.
      depth: predictions beyond the next token.
      segments: [B, T] or None: several examples share a row, as in `TokenBatch`. No prediction crosses from one to
        the next.

    Returns:
      `(targets, mask)`, both [depth + 1, B, T - 1]; entry k at column i is of token i + k + 1. The mask is float32, 0
      where there is no such token in the row or it belongs to another example.
    """
    same_shape("[B, T]", ids=ids, mask=mask, segments=segments)
    if depth < 0:
        raise ValueError(f"depth is {depth}, expected at least 0: predictions beyond the next token")
    width = ids.shape[1]

    def further(k):
        ahead = lambda x: jnp.pad(x[:, k + 1 :], ((0, 0), (0, min(k, width - 1))))[:, : width - 1]
        counted = ahead(jnp.asarray(mask, jnp.float32))
        if segments is not None:
            counted = jnp.where(ahead(segments) == segments[:, :-1], counted, 0.0)
        return ahead(ids), counted

    found = [further(k) for k in range(depth + 1)]
    return jnp.stack([ids for ids, _ in found]), jnp.stack([counted for _, counted in found])


def multi_token(values: jax.Array, mask: jax.Array, *, weight: float = 0.3) -> tuple[Weighted, Weighted]:
    """Mean cross-entropy of the next token, and of those further on beside it.

        L = CE_0 + weight / D sum_{k=1}^{D} CE_k

    with CE_k the sum over the predictions of depth k divided by the number of *next* tokens, as in the paper
    (DeepSeek-AI 2024, arXiv 2412.19437, equations 24-25): so that totals and weights still add up over parts of a
    batch. Its weights are 0.3 for 10T tokens, then 0.1.

    Args:
      values: [D + 1, B, T] cross-entropies, the next token first; values under the mask are never read.
      mask: [D + 1, B, T], from `targets`.
      weight: lambda.

    Returns:
      `(L, the mean over all predictions beyond the next)`.
    """
    same_shape("[D + 1, B, T]", values=values, mask=mask)
    main, *further = (tokens(value, counted) for value, counted in zip(values, mask, strict=True))
    total, count = (jnp.asarray([getattr(part, name) for part in further]).sum() for name in Weighted._fields)
    share = weight / max(len(further), 1)
    return Weighted(main.total + share * total, main.weight), Weighted(total, count)
