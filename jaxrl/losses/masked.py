"""Losses of encoders' pre-training beside that of masked tokens, per element, and how several make one.

Masked tokens themselves cost `tokens.cross_entropy`, or `tokens.negative_log_likelihood` of fused log-probs, reduced by
`reduce.tokens` over the tokens that were chosen: divided by their number, not by that of all tokens.
"""

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import same_shape
from jaxrl.losses.reduce import Weighted
from jaxrl.losses.tokens import cross_entropy


def sentence_pair(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of a pair's label.

    Next-sentence prediction (Devlin et al. 2018, arXiv 1810.04805, section 3.1) has 0 for the sentence that follows and
    1 for one of another document; sentence-order prediction (Lan et al. 2019, arXiv 1909.11942, section 3.1) has 0 for
    the order of the text and 1 for the other.

    Args:
      logits: [B, 2], or [B, classes].
      labels: [B] integers.

    Returns:
      [B] float32; reduce with `reduce.elements`.
    """
    if jnp.ndim(logits) != 2:
        raise ValueError(f"logits has shape {jnp.shape(logits)}, expected [B, classes]: one row for a pair")
    return cross_entropy(logits[:, None], jnp.asarray(labels)[:, None])[:, 0]


def replaced_tokens(logits: jax.Array, is_replaced: jax.Array) -> jax.Array:
    """Binary cross-entropy of "this token was replaced": -log sigmoid(x), or -log sigmoid(-x) where it was not.

    (Clark et al. 2020, ELECTRA, arXiv 2003.10555, section 3.1.) A sampled token that happens to be the right one was
    not replaced.

    Args:
      logits: [B, T] of the discriminator.
      is_replaced: [B, T], true where the token is not the text's.

    Returns:
      [B, T] float32; reduce with `reduce.tokens` over all real tokens.
    """
    same_shape("[B, T]", logits=logits, is_replaced=is_replaced)
    logits = jnp.asarray(logits, jnp.float32)
    return jax.nn.softplus(jnp.where(is_replaced, -logits, logits))


def joined(main: Weighted, *others: tuple[float, Weighted]) -> Weighted:
    """main.mean + sum of coefficient * other.mean, as one pair with main's weight.

    BERT: joined(masked tokens, (1.0, pairs)); ELECTRA: joined(masked tokens, (50.0, replaced tokens)).

    Exact for a whole batch. Added up over its parts, an other's mean in a part counts as main's weight there: the same
    where each part has main's weight and the other's in one proportion, as with exact counts of masks in full rows.
    Nothing at all where main's weight is 0.
    """
    total = main.total
    for coefficient, other in others:
        total = total + coefficient * main.weight * other.mean
    return Weighted(total, main.weight)
