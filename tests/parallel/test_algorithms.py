"""SFT, DPO, PPO and GRPO on meshes end where one device ends: losses, metrics, parameters."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import loop, parallel
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import grpo, ppo, preference, sft
from jaxrl.posttrain.rollout import Sampling
from jaxrl.types import Pairs, Prompts, TokenBatch

CONFIG = TransformerConfig(vocab_size=16, width=16, layers=2, heads=4, kv_heads=4, ffn=32, max_length=32)
SAMPLING = Sampling(max_tokens=6, temperature=1.5)
AXES = ["data", "fsdp", "expert", "tensor", "context", "stage"]


def rows(seed: int, count: int = 16) -> TokenBatch:
    tokens = jax.random.randint(jax.random.key(seed), (count, 9), 0, 16)
    columns = jnp.arange(9)[None]
    mask = (columns >= 2) & (columns < 4 + jnp.arange(count)[:, None] % 6)
    return TokenBatch(tokens, mask.astype(jnp.float32))


PROMPTS = Prompts(
    jnp.array([[0, 0, 0, 5], [0, 0, 6, 7], [2, 3, 4, 5], [9, 8, 7, 6]]),
    jnp.array([1, 2, 4, 4]),
)


def even(completions, answers):
    return ((completions.completions % 2 == 0) * completions.mask).sum(1) / completions.lengths + answers


def build_sft(model, optimizer, **options):
    recipe = sft.make(sft.SFTConfig(batch=8, micro_batches=2), model, optimizer, **options)
    return recipe.init, recipe.step, rows(0)


def build_dpo(model, optimizer, **options):
    recipe = preference.make(preference.DPOConfig(batch=8), model, optimizer, **options)
    data = jax.jit(recipe.reference)(parameters(2), Pairs(rows(0), rows(1)))
    return recipe.init, recipe.step, data


def build_ppo(model, optimizer, **options):
    config = ppo.PPOConfig(prompts=4, group=4, epochs=1, minibatches=2, sampling=SAMPLING)
    recipe = ppo.make(config, model, optimizer, eos_id=1, pad_id=0, **options)
    return recipe.init, ppo.fused(recipe, even, config), ppo.Data(PROMPTS, jnp.zeros(4))


def build_grpo(model, optimizer, **options):
    config = grpo.GRPOConfig(prompts=4, group=4, epochs=1, minibatches=2, kl_coef=0.1, sampling=SAMPLING)
    recipe = grpo.make(config, model, optimizer, eos_id=1, pad_id=0, **options)
    return recipe.init, grpo.fused(recipe, even, config), grpo.Problems(PROMPTS, jnp.zeros(4))


BUILD = {"sft": build_sft, "dpo": build_dpo, "ppo": build_ppo, "grpo": build_grpo}


@functools.cache
def parameters(seed: int = 0):
    return jax.jit(language_model(CONFIG).init)(jax.random.key(seed))


def ended(name: str, model, place=lambda state: state, wrap=lambda optimizer: optimizer, **options):
    """Metrics of two steps and the state after them."""
    init, step, data = BUILD[name](model, wrap(optax.adam(1e-2)), **options)
    state = place(jax.jit(init)(jax.random.key(4), parameters()))
    (last,) = loop.run(step, state, data, steps=2, chunk=2)
    return last.metrics, last.state


@functools.cache
def alone(name: str):
    return ended(name, language_model(CONFIG))


def check(name: str, spec: str, *, zero: int = 3):
    """The state on a mesh, after comparing it with that of one device."""
    count = int(np.prod([int(part.split("=")[1]) for part in spec.split(",")]))
    mesh = parallel.make_mesh(spec, devices=jax.devices()[:count])
    place = lambda state: jax.device_put(state, parallel.state_shardings(state, mesh, zero=zero))
    wrap = partial(parallel.place_gradients, mesh=mesh, zero=zero)
    constrain = partial(parallel.shard_batch, mesh=mesh)
    metrics, state = ended(name, parallel.model_on(CONFIG, mesh), place, wrap, constrain=constrain)
    for row, expected in zip(metrics, alone(name)[0], strict=True):
        assert row.keys() == expected.keys()
        np.testing.assert_allclose(list(row.values()), list(expected.values()), atol=1e-4, rtol=1e-4)
    for leaf, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone(name)[1].params), strict=True):
        np.testing.assert_allclose(leaf, expected, atol=2e-4)
    return state


FAST = [("sft", "stage=2,fsdp=2,tensor=2"), ("dpo", "fsdp=4,tensor=2"), ("grpo", "data=2,fsdp=2,tensor=2")]
MIXED = ["data=2,fsdp=2,context=2", "context=2,tensor=2,expert=2", "stage=2,context=2,data=2", "data=2,tensor=4"]
SLOW = [
    *((name, f"{axis}={2 if axis == 'stage' else n}") for name in BUILD for axis in AXES for n in (2, 4)),
    *((name, spec) for name in BUILD for spec in (*MIXED, "data=8", "fsdp=8", "data=1")),
]


@pytest.mark.parametrize(
    ("name", "spec"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted({*SLOW}))]
)
def test_a_mesh_does_what_one_device_does(name, spec):
    check(name, spec)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_divides_the_state(zero):
    """Moments are a quarter on every device from 1 on, parameters from 3 on; the run is the same."""
    state = check("sft", "fsdp=4", zero=zero)
    share = lambda leaf: leaf.addressable_shards[0].data.size / leaf.size
    kernels = lambda tree: [
        x for x in jax.tree.leaves(tree) if x.ndim > 1 and x.shape[-1] > 1 and min(x.shape[-2:]) > 2
    ]
    assert {share(x) for x in kernels(state.params)} == {0.25 if zero == 3 else 1.0}
    assert {share(x) for x in kernels(state.opt_state)} == {0.25}
