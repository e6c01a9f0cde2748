"""The records that move between samplers, rewards, losses and loops.

In the shapes, `B` is the number of sequences, `P` the prompt width, `C` the completion width and `T` a sequence length.
"""

import enum

import flax.struct
import jax
import jax.numpy as jnp


class Finish(enum.IntEnum):
    """Why a completion ended."""

    EOS = 0  # the model produced the end-of-sequence token
    LENGTH = 1  # the token budget ran out
    STOP = 2  # a stop sequence appeared
    REPEAT = 3  # it went round in a circle and was stopped


@flax.struct.dataclass
class Prompts:
    """Left-padded prompts, so that every row's last token stands in the last column.

    `tokens`: `[B, P]` int32. `lengths`: `[B]` int32, real tokens of each row.
    """

    tokens: jax.Array
    lengths: jax.Array


@flax.struct.dataclass
class TokenBatch:
    """Sequences to be learnt by next-token prediction.

    `tokens`: `[B, T]` int32, right-padded. `loss_mask`: `[B, T]` float32, 1 where the token is to be predicted (from
    the tokens before it). The mask comes from lengths, never from comparing ids: where padding and end-of-sequence
    share an id, the end is still trained.

    `segments`: `[B, T]` int32 where several examples share a row: 1, 2, ... for those of the row, 0 on padding. None
    where each row is one example.
    """

    tokens: jax.Array
    loss_mask: jax.Array
    segments: jax.Array | None = None


@flax.struct.dataclass
class Pairs:
    """Two responses to each of `N` prompts, the first preferred; the loss masks cover the responses.

    `margin`: `[N]` float32, by how much the chosen one is better, or None.
    """

    chosen: TokenBatch
    rejected: TokenBatch
    margin: jax.Array | None = None


@flax.struct.dataclass
class Labelled:
    """Responses judged one by one. `desirable`: `[N]` bool."""

    examples: TokenBatch
    desirable: jax.Array


@flax.struct.dataclass
class Rollout:
    """What a sampler returns, whatever the network behind it.

    `tokens`: `[B, P + C]` int32, left-padded prompt, then the completion, then padding.
    `prompt_lengths`, `lengths`: `[B]` int32, real prompt tokens and completion tokens (its EOS counts).
    `finish`: `[B]` int32, a `Finish`.
    `log_probs`: `[B, C]` float32 under the model itself (temperature 1, nothing cut off), 0 after the end.
    `behaviour_log_probs`: `[B, C]` float32 under the distribution that was sampled from, 0 after the end.
    `prompt_width`: the static `P`.
    `given`: `[B, C]` bool, tokens of the completion that its environment wrote (results of tools), which nothing is to
    be learnt from; or None. They count in `lengths`; `mask` leaves them out, and both log-probs are 0 there.
    """

    tokens: jax.Array
    prompt_lengths: jax.Array
    lengths: jax.Array
    finish: jax.Array
    log_probs: jax.Array
    behaviour_log_probs: jax.Array
    prompt_width: int = flax.struct.field(pytree_node=False)
    given: jax.Array | None = None

    @property
    def completions(self) -> jax.Array:
        """Completion tokens, `[B, C]`."""
        return self.tokens[:, self.prompt_width :]

    @property
    def mask(self) -> jax.Array:
        """1 on the tokens of the completion that the model wrote, its EOS included; `[B, C]` float32."""
        columns = jnp.arange(self.tokens.shape[1] - self.prompt_width)
        inside = columns[None, :] < self.lengths[:, None]
        return (inside if self.given is None else inside & ~self.given).astype(jnp.float32)
