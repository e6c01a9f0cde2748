"""Recall: a cue is seen once, then a corridor without any news, then the question which cue it was.

After the T-maze (Bakker, 2001, Reinforcement learning with long short-term memory), without the walking.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.envs import canvas
from jaxrl.envs.env import Box, Discrete, Env, TimeStep


class State(NamedTuple):
    """Scalars, int32: the `cue` and the `place` in the corridor."""

    cue: jax.Array
    place: jax.Array


def make(*, length: int = 5, cues: int = 2) -> Env:
    """Recall over a corridor.

    Actions do nothing until the last place, where the right answer pays 1 and any ends the episode: a policy with a
    memory reaches a return of 1, one without 1 / cues.

    Args:
      length: steps of an episode; the cue is to be kept over length - 1 of them.
      cues: how many there are, and how many actions.

    Returns:
      Env with float32 observations [cues + 1]: the cue at the first place, one-hot, and 1 at the last place.
    """
    if length < 1 or cues < 2:
        raise ValueError(f"length {length}, cues {cues}: expected at least 1 step and 2 cues")

    def observe(state):
        cue = jax.nn.one_hot(state.cue, cues, dtype=jnp.float32) * (state.place == 0)
        return jnp.append(cue, (state.place == length - 1).astype(jnp.float32))

    def reset(key):
        start = State(jax.random.randint(key, (), 0, cues, jnp.int32), jnp.int32(0))
        return start, observe(start)

    def step(key, state, action):
        after = state._replace(place=state.place + 1)
        over = after.place >= length
        reward = (over & (action == state.cue)).astype(jnp.float32)
        observation = observe(after)
        return after, TimeStep(observation, reward, over, jnp.zeros((), bool), observation)

    def render(state):
        colours = [canvas.BLUE, canvas.ORANGE, canvas.GREEN, canvas.RED, canvas.YELLOW]
        picture = canvas.blank(40 * length + 16, 56)
        for place in range(length):
            x = 40 * place + 8
            canvas.rectangle(picture, (x + 1, 9), (x + 39, 47), colour=canvas.LIGHT)
        canvas.circle(picture, (28, 28), 14, colour=colours[int(state.cue) % len(colours)])
        place = 40 * min(int(state.place), length - 1) + 28
        canvas.polygon(picture, [(place - 7, 44), (place, 22), (place + 7, 44)], colour=canvas.BLACK)
        return picture

    return Env("Recall", reset, step, Box(0.0, 1.0, (cues + 1,)), Discrete(cues), render=render)
