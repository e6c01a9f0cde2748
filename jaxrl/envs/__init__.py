"""Environments as pure functions."""

from jaxrl.envs.catalogue import ENVS as ENVS
from jaxrl.envs.catalogue import make as make
from jaxrl.envs.checker import check as check
from jaxrl.envs.env import Box as Box
from jaxrl.envs.env import Discrete as Discrete
from jaxrl.envs.env import Env as Env
from jaxrl.envs.env import Space as Space
from jaxrl.envs.env import TimeStep as TimeStep
from jaxrl.envs.normalise import normalise_observations as normalise_observations
from jaxrl.envs.normalise import normalise_rewards as normalise_rewards
from jaxrl.envs.wrappers import auto_reset as auto_reset
from jaxrl.envs.wrappers import clip_actions as clip_actions
from jaxrl.envs.wrappers import frame_stack as frame_stack
from jaxrl.envs.wrappers import mask_actions as mask_actions
from jaxrl.envs.wrappers import rescale_actions as rescale_actions
from jaxrl.envs.wrappers import time_limit as time_limit
from jaxrl.envs.wrappers import vectorise as vectorise
