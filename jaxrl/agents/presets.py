"""Settings that learn, by agent and environment: the defaults where nothing is listed.

config, env_steps = presets.config("ppo", "Pendulum-v1")

An `anneal` of -1 is for `training.train`, which knows the updates of a run; put their number there to use it elsewhere.
"""

from typing import Any

from jaxrl.agents.a2c import A2CConfig
from jaxrl.agents.ddpg import DDPGConfig
from jaxrl.agents.dqn import DQNConfig
from jaxrl.agents.ppo import PPOConfig
from jaxrl.agents.qac import QACConfig
from jaxrl.agents.reinforce import ReinforceConfig
from jaxrl.agents.sac import SACConfig
from jaxrl.agents.td3 import TD3Config
from jaxrl.agents.trpo import TRPOConfig

PRESETS: dict[tuple[str, str], tuple[Any, int]] = {
    ("ppo", "CartPole-v1"): (PPOConfig(envs=64, steps=16, learning_rate=2.5e-3, anneal=-1), 500_000),
    ("ppo", "Acrobot-v1"): (
        PPOConfig(envs=16, steps=256, epochs=10, minibatches=8, learning_rate=1e-3, entropy=0.0, anneal=-1),
        500_000,
    ),
    ("ppo", "Pendulum-v1"): (
        PPOConfig(
            envs=16,
            steps=64,
            epochs=10,
            minibatches=8,
            learning_rate=1e-3,
            discount=0.9,
            entropy=0.0,
            normalise_rewards=True,
            anneal=-1,
        ),
        300_000,
    ),
    ("a2c", "CartPole-v1"): (A2CConfig(steps=8, learning_rate=1e-3, discount=0.98, entropy=0.01, anneal=-1), 500_000),
    ("a2c", "Acrobot-v1"): (A2CConfig(envs=16, learning_rate=1e-3, entropy=0.01, anneal=-1), 500_000),
    ("a2c", "Pendulum-v1"): (
        A2CConfig(
            learning_rate=2e-3,
            discount=0.9,
            max_grad_norm=0.1,
            normalise_advantages=True,
            normalise_rewards=True,
            anneal=-1,
        ),
        1_000_000,
    ),
    ("trpo", "CartPole-v1"): (TRPOConfig(), 150_000),
    ("trpo", "Acrobot-v1"): (TRPOConfig(envs=16, steps=128), 300_000),
    ("trpo", "Pendulum-v1"): (
        TRPOConfig(envs=16, steps=128, discount=0.9, lambda_=0.9, value_rate=3e-3, normalise_rewards=True),
        400_000,
    ),
    ("reinforce", "CartPole-v1"): (ReinforceConfig(anneal=-1), 1_200_000),
    ("reinforce", "Acrobot-v1"): (ReinforceConfig(envs=16, entropy=0.01, normalise_rewards=True, anneal=-1), 1_000_000),
    ("qac", "CartPole-v1"): (QACConfig(baseline=True, anneal=-1), 500_000),
    ("dqn", "CartPole-v1"): (
        DQNConfig(
            updates=2,
            capacity=100_000,
            learning_rate=5e-4,
            anneal=-1,
            double=True,
            n_step=3,
            target_every=10,
            target_rate=0.01,
            epsilon_steps=100_000,
        ),
        500_000,
    ),
    ("dqn", "Acrobot-v1"): (DQNConfig(capacity=50_000, epsilon_steps=250_000), 500_000),
    ("ddpg", "Pendulum-v1"): (DDPGConfig(), 20_000),
    ("td3", "Pendulum-v1"): (TD3Config(), 20_000),
    ("ddpg", "MountainCarContinuous-v0"): (
        DDPGConfig(envs=4, updates=4, batch=128, warmup=5_000, noise=0.6, hold=25),
        50_000,
    ),
    ("td3", "MountainCarContinuous-v0"): (
        TD3Config(envs=4, updates=4, batch=128, warmup=5_000, noise=0.6, hold=25),
        50_000,
    ),
    ("sac", "Pendulum-v1"): (SACConfig(), 20_000),
}
"""(agent, environment) -> (config, environment steps to train for)."""


def config(agent: str, env: str) -> tuple[Any, int]:
    """The config and the number of environment steps for an agent on an environment.

    Raises:
      ValueError: nothing is listed; the message says what is.
    """
    if (agent, env) not in PRESETS:
        listed = ", ".join(sorted(name for a, name in PRESETS if a == agent)) or "nothing"
        raise ValueError(f"no settings of {agent!r} for {env!r}; listed for this agent: {listed}")
    return PRESETS[agent, env]
