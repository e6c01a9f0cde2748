"""Environments as pure functions."""

from jaxrl.envs.env import Box as Box
from jaxrl.envs.env import Discrete as Discrete
from jaxrl.envs.env import Env as Env
from jaxrl.envs.env import TimeStep as TimeStep
