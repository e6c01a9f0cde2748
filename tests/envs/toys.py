"""A toy whose every number is known: it counts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.envs import Box, Discrete, Env, TimeStep


class State(NamedTuple):
    count: jax.Array
    start: jax.Array


def counter(*, end: int = 3) -> Env:
    """Observes [start, count]; start is drawn at reset; reward = count; ends when count reaches `end`."""

    def observe(state):
        return jnp.stack([state.start, state.count.astype(jnp.float32)])

    def reset(key):
        state = State(jnp.int32(0), jax.random.uniform(key))
        return state, observe(state)

    def step(key, state, action):
        after = State(state.count + 1, state.start)
        observation, ended = observe(after), after.count >= end
        return after, TimeStep(observation, after.count.astype(jnp.float32), ended, jnp.zeros((), bool), observation)

    space = Box((0.0, 0.0), (1.0, 1000.0), (2,))
    return Env("Counter", reset, step, space, Discrete(2))


def rollout(env, steps, *, action=0, key=0):
    """(first observation, TimeStep [steps, ...]) of a constant action, as one program."""

    def run(key):
        reset_key, loop_key = jax.random.split(key)
        state, first = env.reset(reset_key)

        def move(state, key):
            return env.step(key, state, jnp.asarray(action))

        return first, jax.lax.scan(move, state, jax.random.split(loop_key, steps))[1]

    return jax.jit(run)(jax.random.key(key))
