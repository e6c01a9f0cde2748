"""Whole runs on real tasks, at the settings of `presets`."""

import dataclasses

import jax
import pytest

from jaxrl.agents import ddpg, dqn, evaluate, presets, sac, td3
from jaxrl.envs import make as make_env

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "make", "env", "least"),
    [
        ("dqn", dqn.make, "CartPole-v1", 475),
        ("ddpg", ddpg.make, "Pendulum-v1", -200),
        ("td3", td3.make, "Pendulum-v1", -200),
        ("sac", sac.make, "Pendulum-v1", -200),
    ],
)
def test_reaches_the_published_return(name, make, env, least):
    config, env_steps = presets.config(name, env)
    task = make_env(env)
    steps = -(-env_steps // (config.envs * config.steps * config.rounds))
    if name == "dqn":
        config = dataclasses.replace(config, anneal=steps)
    agent = make(config, task)

    def run(key):
        state, _ = jax.lax.scan(agent.step, agent.init(key), length=steps)
        return evaluate.evaluate(agent, task, state.params, jax.random.key(1), episodes=32).returns.mean()

    assert float(jax.jit(run)(jax.random.key(0))) >= least
