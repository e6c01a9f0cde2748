"""Environments by name."""

import difflib
from collections.abc import Callable

from jaxrl.envs import cartpole, pendulum
from jaxrl.envs.env import Env
from jaxrl.envs.wrappers import time_limit

ENVS: dict[str, Callable[[], Env]] = {
    "CartPole-v1": lambda: time_limit(cartpole.make(), 500),
    "Pendulum-v1": lambda: time_limit(pendulum.make(), 200),
}
"""Every environment with its time limit."""


def make(name: str) -> Env:
    """The environment of that name, with its time limit.

    Raises:
      ValueError: no such environment; the message names the nearest one.
    """
    if name not in ENVS:
        near = difflib.get_close_matches(name, ENVS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no environment {name!r}; did you mean {near!r}? There are: {', '.join(ENVS)}")
    return ENVS[name]()._replace(name=name)
