"""The losses of reward models: one that learns from comparisons, and one from steps judged right or wrong."""

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import choice, same_shape


def bradley_terry(
    chosen_rewards: jax.Array,
    rejected_rewards: jax.Array,
    *,
    margin: jax.Array | float = 0.0,
    centring: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log sigmoid(r_w - r_l - margin) + centring (r_w + r_l)^2, the loss of every pair.

    Bradley and Terry 1952; reward models: Ouyang et al. 2022, arXiv 2203.02155; margin: Touvron et al. 2023
    (Llama 2, arXiv 2307.09288); centring, which fixes the level that differences leave open: Eisenstein et
    al. 2023, arXiv 2312.09244 (0.01).

    Args:
      chosen_rewards, rejected_rewards: [N], read at the last token of each response.
      margin: [N] or a number: by how much the chosen one should win.
      centring: weight of the squared sum.

    Returns:
      ([N] float32 losses, {"accuracy": [N] 1.0 where the chosen one wins, "margin": [N] r_w - r_l,
      "chosen_rewards", "rejected_rewards": [N]}); diagnostics carry no gradient.

    Raises:
      ValueError: different shapes.
    """
    same_shape(
        "[N]",
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        margin=margin if jnp.ndim(margin) else None,
    )
    chosen, rejected = jnp.asarray(chosen_rewards, jnp.float32), jnp.asarray(rejected_rewards, jnp.float32)
    difference = chosen - rejected
    values = -jax.nn.log_sigmoid(difference - jnp.asarray(margin, jnp.float32))
    if centring:
        values = values + centring * jnp.square(chosen + rejected)
    diagnostics = {
        "accuracy": (difference > 0).astype(jnp.float32),
        "margin": difference,
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
    }
    return values, jax.tree.map(jax.lax.stop_gradient, diagnostics)


def process(step_rewards: jax.Array, correct: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-y log sigmoid(r) - (1 - y) log sigmoid(-r), the loss of every step of a solution that is judged step by step.

    Lightman et al. 2023, arXiv 2305.20050, with two labels: where they also have "neutral", call it one of the two.

    Args:
      step_rewards: [...] r, log-odds that the step is right, read at its last token.
      correct: [...] y, true (or 1) where it is.

    Returns:
      ([...] float32 losses, {"accuracy": [...] 1.0 where the sign of r agrees with y, "probability": [...]
      sigmoid(r)}); diagnostics carry no gradient.

    Raises:
      ValueError: different shapes.
    """
    same_shape("[...]", step_rewards=step_rewards, correct=correct)
    rewards, correct = jnp.asarray(step_rewards, jnp.float32), jnp.asarray(correct, jnp.float32)
    values = -correct * jax.nn.log_sigmoid(rewards) - (1.0 - correct) * jax.nn.log_sigmoid(-rewards)
    diagnostics = {
        "accuracy": ((rewards > 0) == (correct > 0.5)).astype(jnp.float32),
        "probability": jax.nn.sigmoid(rewards),
    }
    return values, jax.tree.map(jax.lax.stop_gradient, diagnostics)


def solution_score(step_rewards: jax.Array, ends: jax.Array, *, how: str = "product") -> jax.Array:
    """One score for a solution from those of its steps (Lightman et al. 2023, arXiv 2305.20050, section 2.6).

        product:  prod_i sigmoid(r_i), the probability that every step is right
        min:      min_i sigmoid(r_i), that of the weakest

    Args:
      step_rewards: [B, T] r, log-odds, of which only those at step ends are read.
      ends: [B, T] true at the last token of each step.
      how: product or min.

    Returns:
      [B] float32; 1 for a solution without steps.

    Raises:
      ValueError: different shapes, an unknown name.
    """
    same_shape("[B, T]", step_rewards=step_rewards, ends=ends)
    log_probability = jax.nn.log_sigmoid(jnp.asarray(step_rewards, jnp.float32))
    log_probability = jnp.where(jnp.asarray(ends, bool), log_probability, 0.0)
    combine = choice("how", how, {"product": jnp.sum, "min": jnp.min})
    return jnp.exp(combine(log_probability, axis=1))
