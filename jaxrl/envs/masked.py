"""A toy for action masks: what is allowed changes at every step and is seen in the mask alone."""

import jax
import jax.numpy as jnp

from jaxrl.envs import canvas
from jaxrl.envs.env import Box, Discrete, Env, TimeStep


def make(*, actions: int = 5) -> Env:
    """Action i pays i / (actions - 1) if it is allowed; one that is not allowed pays -1 and ends the episode.

    A random action is allowed, and every other one with probability 1/2. The observation says nothing, so that only a
    policy that applies the mask does well: the best takes the highest action allowed, for `best(actions)` a step.
    The state is the mask, bool [actions]. Without a time limit an episode need not end.
    """
    if actions < 2:
        raise ValueError(f"actions is {actions}, expected at least 2")
    observation = jnp.ones(1, jnp.float32)

    def draw(key):
        one_key, rest_key = jax.random.split(key)
        one = jax.random.randint(one_key, (), 0, actions)
        return jax.random.bernoulli(rest_key, 0.5, (actions,)) | (jnp.arange(actions) == one)

    def reset(key):
        return draw(key), observation

    def step(key, state, action):
        allowed = state[action]
        reward = jnp.where(allowed, action / (actions - 1), -1.0).astype(jnp.float32)
        return draw(key), TimeStep(observation, reward, ~allowed, jnp.zeros((), bool), observation)

    def render(state):
        picture = canvas.blank(32 * actions + 16, 80)
        for action in range(actions):
            colour = canvas.GREEN if bool(state[action]) else canvas.LIGHT
            top = 70 - 60 * (action + 1) / actions
            canvas.rectangle(picture, (32 * action + 12, 70), (32 * action + 36, top), colour=colour)
        return picture

    space = Box(0.0, 1.0, (1,))
    return Env("MaskedChoice", reset, step, space, Discrete(actions), action_mask=lambda state: state, render=render)


def best(actions: int) -> float:
    """The mean reward of a step of the best policy: the mean highest action allowed, over actions - 1."""
    below = [(i + 1) / actions * 0.5 ** (actions - 1 - i) for i in range(actions)]  # P(highest <= i)
    return sum(1.0 - p for p in below[:-1]) / (actions - 1)
