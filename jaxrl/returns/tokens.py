"""Rewards and advantages of sampled completions, token by token: `[B, C]`, right-padded, with their lengths."""

import jax
import jax.numpy as jnp

from jaxrl.returns.recursions import Estimates, gae


def token_rewards(scores: jax.Array, penalties: jax.Array, lengths: jax.Array) -> jax.Array:
    """One reward for each token: minus its penalty, and at the last token the completion's score.

        r_t = -penalty_t + score [t = length - 1],      0 after the end

    With penalty = beta (log pi - log ref) the reward of RLHF (Stiennon et al. 2020, arXiv 2009.01325; Ouyang et al.
    2022, arXiv 2203.02155).

    Args:
      scores: [B], one to a completion.
      penalties: [B, C]; what stands after the end is never read.
      lengths: [B] tokens of each completion, its end-of-sequence included.

    Returns:
      [B, C] float32.

    Raises:
      ValueError: shapes that do not fit.
    """
    _check(penalties, lengths, scores=scores)
    columns = jnp.arange(penalties.shape[1])[None]
    ends = lengths[:, None]
    rewards = jnp.where(columns < ends, -jnp.asarray(penalties, jnp.float32), 0.0)
    return rewards + jnp.where(columns == ends - 1, jnp.asarray(scores, jnp.float32)[:, None], 0.0)


def token_gae(
    rewards: jax.Array, values: jax.Array, lengths: jax.Array, *, discount: float = 1.0, lambda_: float = 0.95
) -> Estimates:
    """Generalised advantage estimation over the tokens of each completion: `gae` with one episode to a row.

        delta_t = r_t + discount V_{t+1} - V_t,   V = 0 after the last token;   A_t = delta_t + discount lambda A_{t+1}

    A completion that was cut off at the token limit ends as any other: its score stands at its last token, and there
    is nothing to bootstrap from.

    Args:
      rewards: [B, C], as of `token_rewards`.
      values: [B, C], V_t read before token t is known. What stands after the end is never read.
      lengths: [B].
      discount: gamma.
      lambda_: 1 gives returns minus values.

    Returns:
      Estimates(advantages [B, C], targets [B, C]), float32, 0 after the end.

    Raises:
      ValueError: shapes that do not fit.
    """
    _check(rewards, lengths, values=values)
    inside = jnp.arange(rewards.shape[1])[None] < lengths[:, None]
    r_t, v_tm1 = (jnp.where(inside, x, 0.0) for x in (rewards, values))
    v_t = jnp.pad(v_tm1[:, 1:], ((0, 0), (0, 1)))
    ended = ~jnp.pad(inside[:, 1:], ((0, 0), (0, 1)))
    one = lambda v_tm1, r_t, v_t, ended: gae(
        v_tm1, r_t, v_t, ended, jnp.zeros_like(ended), discount=discount, lambda_=lambda_
    )
    return Estimates(*(jnp.where(inside, x, 0.0) for x in jax.vmap(one)(v_tm1, r_t, v_t, ended)))


def _check(tokens: jax.Array, lengths: jax.Array, **others: jax.Array) -> None:
    if jnp.ndim(tokens) != 2 or jnp.shape(tokens)[1] == 0:
        raise ValueError(f"token values have shape {jnp.shape(tokens)}, expected [B, C] with at least one column")
    rows = jnp.shape(tokens)[:1]
    if jnp.shape(lengths) != rows:
        raise ValueError(f"lengths has shape {jnp.shape(lengths)}, expected [B] = {rows}: one to a completion")
    for name, other in others.items():
        expected = rows if name == "scores" else jnp.shape(tokens)
        if jnp.shape(other) != expected:
            axes = "[B]" if name == "scores" else "[B, C]"
            raise ValueError(f"{name} has shape {jnp.shape(other)}, expected {axes} = {expected}")
