"""Twin delayed DDPG (Fujimoto et al. 2018, arXiv 1802.09477): `ddpg` with three remedies against overestimation.

Two critics, of which the smaller one is the target; actor and slow copies follow at every second update; noise on the
target's action. As in the paper the actor follows the first critic. Same code as DDPG, other values.
"""

import dataclasses

from jaxrl.agents import ddpg


@dataclasses.dataclass(frozen=True)
class TD3Config(ddpg.DDPGConfig):
    """Twin delayed deep deterministic policy gradient. Noises are in units of half the range of actions."""

    critics: int = 2
    """Critics, of which the smallest value is the target."""
    actor_every: int = 2
    """Updates of the critics to one of the actor and of the slow copies."""
    target_noise: float = 0.2
    """Standard deviation of the noise that smooths the target's action."""


make = ddpg.make
"""The agent."""
