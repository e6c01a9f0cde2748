"""A language model on meshes: the log-probs, entropies and gradients of one device, whatever is divided."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import parallel
from jaxrl.kernels.attention import BlockDiffusion, Causal, Full, Prefix, Tree
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain.rollout import Sampling, completion_log_probs, rollout
from jaxrl.posttrain.score import log_probs_of
from jaxrl.types import Prompts, TokenBatch

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
jit = functools.partial(jax.jit, compiler_options=QUICK)
CONFIG = TransformerConfig(
    vocab_size=16, width=16, layers=4, heads=4, kv_heads=4, ffn=32, max_length=32, window=5, window_layers=(1, 2),
    qk_norm=True, qkv_bias=True, remat="none",
)  # fmt: skip
MESHES = ["data=2,tensor=2,context=2", "stage=2,fsdp=2,tensor=2"]
SLOW = [
    "data=8", "fsdp=8", "expert=8", "tensor=4,data=2", "context=8", "context=4,data=2", "stage=4,data=2",
    "context=2,tensor=2,fsdp=2", "stage=2,context=2,tensor=2", "data=2,fsdp=2,expert=2",
]  # fmt: skip


def on(spec: str, config=CONFIG, **options):
    """The model on a mesh of as many devices as the text says, and where its parameters lie."""
    count = int(np.prod([int(part.split("=")[1]) for part in spec.split(",")]))
    mesh = parallel.make_mesh(spec, devices=jax.devices()[:count])
    model = parallel.model_on(config, mesh, **options)
    return model, lambda tree: jax.device_put(tree, parallel.state_shardings(tree, mesh))


@functools.cache
def alone():
    model = language_model(CONFIG)
    return model, jax.jit(model.init)(jax.random.key(0))


@functools.cache
def batch():
    key, other = jax.random.split(jax.random.key(1))
    tokens = jax.random.randint(key, (8, 24), 0, 16)
    segments = jnp.sort(jax.random.randint(other, (8, 24), 0, 3), axis=1)
    return TokenBatch(tokens, jnp.ones((8, 24)), segments)


def scored(model):
    """Loss, (log-probs, entropies) and gradient: rows of 23 columns, which no context axis divides."""

    def loss(params, batch):
        log_probs, entropy, mask = log_probs_of(model, params, batch)
        return (log_probs * mask).sum() / mask.sum(), (log_probs, entropy)

    return jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def expected():
    model, params = alone()
    return jax.device_get(scored(model)(params, batch()))


def close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


@pytest.mark.parametrize("spec", [*MESHES, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)])
def test_values_and_gradients_of_one_device(spec):
    model, place = on(spec)
    found = jax.device_get(scored(model)(place(alone()[1]), batch()))
    close(found, expected(), atol=3e-6)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_any_number_of_micro_batches(micro_batches):
    model, place = on("stage=2,data=2", micro_batches=micro_batches)
    found = jit(model.apply)(place(alone()[1]), batch().tokens)[0]
    close(found, jit(alone()[0].apply)(alone()[1], batch().tokens)[0], atol=3e-6)


def test_micro_batches_that_do_not_divide():
    model, _ = on("stage=2,data=2", micro_batches=3)
    with pytest.raises(ValueError, match="micro_batches is 3 and a device has 4 rows; choose a divisor of 4"):
        jax.eval_shape(model.apply, alone()[1], batch().tokens)


TREE = Tree(jnp.broadcast_to(jnp.array([21] * 5 + [13] * 8 + [21] * 8), (8, 21)))
MASKS = {
    "prefix": Causal() | Prefix(jnp.arange(8) + 3),
    "full": Full(),
    "tree": TREE,
    "chunks": Causal() & Prefix(jnp.full((1,), 18)),
}


def test_masks_over_a_divided_sequence():
    """21 columns are 24 on four devices in zig-zag order; nobody sees the three that were added."""
    config = dataclasses.replace(CONFIG, window=None, window_layers=None, layers=1, qkv_bias=False)
    model, place = on("context=4", config)
    one = language_model(config)
    params = jax.jit(one.init)(jax.random.key(2))
    positions = jnp.broadcast_to(jnp.arange(21)[None] % 13, (8, 21))

    def under_each(model):
        passes = lambda params, tokens, masks: [
            model.apply(params, tokens, positions=positions, mask=mask)[0] for mask in masks
        ]
        return jit(passes)

    given = batch().tokens[:, :21], list(MASKS.values())
    close(under_each(model)(place(params), *given), under_each(one)(params, *given), atol=3e-6)


def test_a_mask_of_halves_is_not_padded():
    model, _ = on("context=4")
    with pytest.raises(ValueError, match=r"rows of 20 tokens under a BlockDiffusion mask .* give a multiple of 24"):
        jax.eval_shape(functools.partial(model.apply, mask=BlockDiffusion(2)), alone()[1], batch().tokens[:, :20])


@pytest.mark.parametrize("spec", ["data=2,tensor=2,context=2", pytest.param("stage=2,fsdp=4", marks=pytest.mark.slow)])
def test_sampling_is_that_of_one_device(spec):
    """The same tokens, and log-probs that a pass over the whole rows gives again, on the mesh and off it."""
    model, place = on(spec)
    rows = jnp.array([[0, 0, 5, 6], [2, 3, 4, 5], [0, 7, 8, 9], [9, 8, 7, 6]])
    prompts = Prompts(rows, jnp.array([2, 4, 3, 4]))
    sampling = Sampling(max_tokens=5, temperature=1.3)

    def sample(model):
        draw = lambda params, key: rollout(
            model, params, prompts, key, samples=2, sampling=sampling, eos_id=1, pad_id=0
        )
        return jit(draw)

    key = jax.random.key(3)
    wanted = sample(alone()[0])(alone()[1], key)
    found = sample(model)(place(alone()[1]), key)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.behaviour_log_probs, wanted.behaviour_log_probs, atol=3e-6)
    again = jit(lambda p, r: completion_log_probs(model, p, r, temperature=1.3))(place(alone()[1]), found)[0]
    np.testing.assert_allclose(again * found.mask, found.behaviour_log_probs * found.mask, atol=5e-6)


def test_temperatures_by_token():
    """Log-probs over a divided vocabulary, every token at its own temperature."""
    model, place = on("tensor=4,data=2")
    one, params = alone()
    hidden = jax.random.normal(jax.random.key(4), (8, 6, 16))
    temperature = 0.5 + jax.random.uniform(jax.random.key(5), (8, 6))
    targets = batch().tokens[:, :6]
    given = dict(temperature=temperature, chunk=4)
    wanted = jit(lambda p: one.log_probs(hidden, one.unembedding(p), targets, **given))(params)
    found = jit(lambda p: model.log_probs(hidden, model.unembedding(p), targets, **given))(place(params))
    close(found, wanted, atol=3e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tensor=8", "heads is 4 and does not divide over the 8 devices of mesh axis 'tensor'; give tensor a divisor"),
        ("stage=8", "layers is 4 and does not divide over the 8 devices of mesh axis 'stage'"),
    ],
)
def test_what_does_not_divide_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        on(spec)
