"""Environments by name."""

import difflib
from collections.abc import Callable

from jaxrl.envs import acrobot, bandits, cartpole, catch, gui, masked, memory, mountain_car, pendulum, probes, tabular
from jaxrl.envs.adapters.brax import from_brax
from jaxrl.envs.adapters.gymnasium import from_gymnasium
from jaxrl.envs.adapters.gymnax import from_gymnax
from jaxrl.envs.env import Env
from jaxrl.envs.wrappers import time_limit
from jaxrl.tabular import gridworld

TESTBED = (0.5, -0.2, 1.1, -1.3, 0.1, 1.6, -0.6, 0.8, -0.9, 0.3)
CONTEXTS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 1.0, 0.0))
WALK = gridworld.Layout(1, 21, targets=((0, 20),), forbidden=((0, 0),), moves=(gridworld.LEFT, gridworld.RIGHT))

ENVS: dict[str, Callable[[], Env]] = {
    "CartPole-v1": lambda: time_limit(cartpole.make(), 500),
    "Acrobot-v1": lambda: time_limit(acrobot.make(), 500),
    "MountainCar-v0": lambda: time_limit(mountain_car.make(), 200),
    "MountainCarContinuous-v0": lambda: time_limit(mountain_car.make_continuous(), 999),
    "Pendulum-v1": lambda: time_limit(pendulum.make(), 200),
    "Catch": catch.make,
    "GUI": lambda: time_limit(gui.make(), 20),
    "Recall-5": lambda: memory.make(length=5),
    "MaskedChoice": lambda: time_limit(masked.make(), 10),
    "GaussianBandit": lambda: bandits.gaussian(TESTBED),
    "BernoulliBandit": lambda: bandits.bernoulli((0.1, 0.3, 0.5, 0.7, 0.9)),
    "ContextualBandit": lambda: bandits.contextual(CONTEXTS),
    "GridWorld-5x5": lambda: _grid(gridworld.ZHAO, gridworld.grid_world(episodic=True), 100),
    "CliffWalking": lambda: _grid(gridworld.CLIFF, gridworld.cliff_walking(), 500),
    "WindyGridWorld": lambda: _grid(gridworld.WINDY, gridworld.windy_grid_world(), 500),
    "RandomWalk-19": lambda: tabular.grid_world(WALK, gridworld.random_walk(19)),
    **{name: lambda probe=probe: probe().env for name, probe in probes.PROBES.items()},
    **{f"{name}-Continuous": lambda probe=probe: probe(continuous=True).env for name, probe in probes.PROBES.items()},
}
"""Every environment with its time limit."""

ADAPTERS: dict[str, Callable[[str], Env]] = {
    "gymnax": from_gymnax,
    "gymnasium": from_gymnasium,
    "brax": from_brax,
}


def make(name: str) -> Env:
    """The environment of that name, with its time limit.

    Args:
      name: a key of `ENVS`, or "gymnax:NAME", "gymnasium:NAME", "brax:NAME" for those of other libraries.

    Raises:
      ValueError: no such environment; the message names the nearest one.
    """
    library, colon, rest = name.partition(":")
    if colon and library in ADAPTERS:
        return ADAPTERS[library](rest)
    if name not in ENVS:
        near = difflib.get_close_matches(name, ENVS, n=1, cutoff=0.0)[0]
        own = ", ".join(own for own in ENVS if not own.startswith("Probe-"))
        raise ValueError(
            f"no environment {name!r}; did you mean {near!r}? There are {own}, the probes {', '.join(probes.PROBES)}, "
            f"and LIBRARY:NAME for {', '.join(ADAPTERS)}"
        )
    return ENVS[name]()._replace(name=name)


def _grid(layout, mdp, steps):
    return time_limit(tabular.grid_world(layout, mdp), steps)
