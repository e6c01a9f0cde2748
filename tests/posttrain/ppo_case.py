"""What the tests of PPO share: a small config, a reward, and comparisons of trees."""

from functools import partial

import jax
import numpy as np
import optax

from jaxrl.posttrain import ppo
from jaxrl.posttrain.rollout import Sampling

EOS, PAD = 1, 0
SAMPLING = Sampling(max_tokens=6, temperature=1.5)
SMALL = ppo.PPOConfig(prompts=4, group=4, epochs=2, sampling=SAMPLING)
RATE = 0.3  # large enough for every clip to be in force at the second update
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = partial(jax.jit, compiler_options=QUICK)


def share_of_even_tokens(rollout, answers):
    even = (rollout.completions % 2 == 0) * rollout.mask
    return 3.0 * even.sum(axis=1) / rollout.lengths + answers


def build(model, config, **options):
    options = {"max_grad_norm": 0.0, "critic_optimizer": optax.sgd(0.5 * RATE), **options}
    return ppo.make(config, model, optax.sgd(RATE), eos_id=EOS, pad_id=PAD, **options)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def farthest(a, b):
    return max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
