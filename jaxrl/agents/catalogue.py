"""Agents by name."""

import difflib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

AGENTS: dict[str, tuple[str, str]] = {
    "reinforce": ("ReinforceConfig", "Monte-Carlo policy gradient, with or without a baseline"),
    "qac": ("QACConfig", "actor-critic with action values by Sarsa"),
    "a2c": ("A2CConfig", "advantage actor-critic"),
    "off_policy_actor_critic": ("OffPolicyActorCriticConfig", "actor-critic with importance weights"),
    "trpo": ("TRPOConfig", "trust region policy optimisation"),
    "ppo": ("PPOConfig", "proximal policy optimisation"),
    "dqn": ("DQNConfig", "deep Q-learning: double, dueling, n-step, prioritised"),
    "dpg": ("DPGConfig", "deterministic policy gradient, plain"),
    "ddpg": ("DDPGConfig", "deep deterministic policy gradient"),
    "td3": ("TD3Config", "twin delayed DDPG"),
    "sac": ("SACConfig", "soft actor-critic with a learned temperature"),
}
"""Module of `jaxrl.agents` -> (its config class, what it is)."""


class Entry(NamedTuple):
    """`config`: a frozen dataclass, the class. `make`: `(config, env) -> Agent`."""

    config: Any
    make: Callable


def find(name: str) -> Entry:
    """The agent of that name.

    Raises:
      ValueError: no such agent; the message names the nearest one.
    """
    if name not in AGENTS:
        near = difflib.get_close_matches(name, AGENTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no agent {name!r}; did you mean {near!r}? There are {', '.join(AGENTS)}")
    module = importlib.import_module(f"jaxrl.agents.{name}")
    return Entry(getattr(module, AGENTS[name][0]), module.make)
