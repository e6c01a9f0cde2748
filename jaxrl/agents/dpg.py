"""The plain deterministic policy gradient (Silver et al. 2014; Zhao, Mathematical Foundations of RL, 10.4).

    w     follows  delta dq/dw (s, a),     delta = r + discount q(s', mu(s')) - q(s, a)
    theta follows  dq/da (s, mu(s)) dmu/dtheta

Off-policy without importance weights: a comes from mu plus noise, and mu is followed everywhere else. It is `ddpg`
without its two inventions: each transition is learnt from once, in the step it was made, and there are no slow copies.
Deviation: Adam in place of plain gradient steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxrl.agents import ddpg, replay
from jaxrl.agents.agent import Agent
from jaxrl.envs.env import Env


@dataclasses.dataclass(frozen=True)
class DPGConfig:
    """Deterministic policy gradient, without replay and slow copies."""

    envs: int = 32
    """Environments side by side; each update learns from one step of all of them."""
    rounds: int = 100
    """Steps and updates in one step of the agent."""
    learning_rate: float = 1e-3
    """Adam's, of the critic."""
    actor_learning_rate: float = 1e-4
    """Adam's, of the actor."""
    discount: float = 0.99
    """Worth of a reward one step later."""
    noise: float = 0.3
    """Standard deviation of the exploring noise, in units of half the range of actions."""
    hidden: tuple[int, ...] = (64, 64)
    """Features of the hidden layers."""


def make(
    config: DPGConfig, env: Env, *, constrain: Callable = lambda batch: batch, axis_name: str | None = None
) -> Agent:
    """The agent; `constrain` and `axis_name` as in `replay.make`."""
    own: dict[str, Any] = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    own |= {"batch": config.envs, "capacity": config.envs, "warmup": config.envs, "target_rate": 1.0}
    return ddpg.make(ddpg.DDPGConfig(**own), env, memory=replay.latest(), constrain=constrain, axis_name=axis_name)
