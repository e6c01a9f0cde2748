"""The loss of a reward model that learns from comparisons."""

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import same_shape


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
