"""A bandit as a language model: every position has the same table of logits, and every response is one token.

Small enough to write down what the losses should come to.
"""

import jax.numpy as jnp
import numpy as np
import optax

from jaxrl.nets.language_model import LanguageModel
from jaxrl.types import Pairs, TokenBatch


def bandit(responses: int) -> LanguageModel:
    """Parameters {"logits": [V]}; the next token is drawn from their softmax, whatever stands before it."""
    hidden = lambda tokens: jnp.ones((*tokens.shape, 1), jnp.float32)
    return LanguageModel(
        init=lambda key: {"logits": jnp.zeros(responses)},
        apply=lambda params, tokens, **_: (hidden(tokens), None),
        unembedding=lambda params: params["logits"][None],
        init_cache=lambda batch, length: None,
    )


def one_token(responses) -> TokenBatch:
    """The prompt 0 and one response of one token in each row."""
    responses = np.asarray(responses, np.int32)
    tokens = np.stack([np.zeros_like(responses), responses], axis=1)
    mask = np.broadcast_to(np.float32([0, 1]), tokens.shape)
    return TokenBatch(jnp.asarray(tokens), jnp.asarray(mask))


def comparisons(counts: dict[tuple[int, int], int]) -> Pairs:
    """Each (winner, loser) as often as it is counted."""
    rows = np.array([pair for pair, count in counts.items() for _ in range(count)])
    return Pairs(one_token(rows[:, 0]), one_token(rows[:, 1]))


def descent(steps: int) -> optax.GradientTransformation:
    """Plain gradient descent for problems this small; its rate falls towards the end."""
    return optax.adam(optax.cosine_decay_schedule(0.05, steps))
