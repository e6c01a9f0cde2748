"""Bases in few bits: the code book, blocks and double quantisation against loops; products and gradients; memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets import adapters
from jaxrl.nets.adapters.adapted import get
from jaxrl.nets.adapters.quantised_base import CODES, NF4, to_int8, to_nf4
from jaxrl.nets.language_model import language_model
from jaxrl.nets.layers import Operator
from jaxrl.nets.transformer import TransformerConfig
from tests.nets import adapter_cases as cases
from tests.oracles import adapters as oracle


def test_the_code_book_is_that_of_its_definition():
    np.testing.assert_allclose(CODES, oracle.nf4_table(), atol=2e-6)
    np.testing.assert_array_equal(CODES, np.float32(oracle.NF4))


def unpack(packed):
    """Codes [in, out] from bytes [in / 2, out], the first of a pair in the high half."""
    pairs = np.stack([packed >> 4, packed & 15], axis=1)
    return pairs.reshape(-1, packed.shape[1])


@pytest.mark.parametrize("shape", [(64, 3), (128, 300), (70, 5), (2, 1)])
def test_nf4_against_loops(shape):
    w = np.random.default_rng(0).normal(size=shape) * np.linspace(0.5, 2, shape[1])
    w[:2, 0] = 0.0
    got = jax.jit(to_nf4)(jnp.asarray(w, jnp.float32))
    codes, absmax, kernel = oracle.nf4(np.float32(w))
    np.testing.assert_array_equal(unpack(np.asarray(got.codes)), codes)
    assert got.shape == shape and got.absmax.values.dtype == jnp.int8
    np.testing.assert_allclose(got.mean, absmax.mean(), rtol=1e-6)
    # a scale is off by at most half a step of int8, a weight by that and half of the widest gap of the codes
    step = np.abs(absmax - absmax.mean()).max() / 254 * 1.001 + 1e-6
    np.testing.assert_allclose(got.dense(), kernel, atol=step)
    bound = np.repeat(absmax, 64, axis=0)[: shape[0]] * np.diff(CODES).max() / 2 + step
    assert (np.abs(got.dense() - w) <= bound).all()
    np.testing.assert_array_equal(np.diff(CODES).max() / 2 < 0.1525, True)


def test_layers_are_quantised_one_by_one():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 8)) * np.array([1, 5, 0.1])[:, None, None])
    whole = to_nf4(w)
    for n in range(3):
        alone = to_nf4(w[n])
        np.testing.assert_array_equal(whole.dense()[n], alone.dense())
    assert whole.codes.shape == (3, 32, 8) and whole.mean.shape == (3, 1, 1)


def test_int8_errs_by_half_a_step():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(40, 6)), jnp.float32)
    got = to_int8(w)
    step = np.abs(w).max(0) / 127
    assert (np.abs(got.dense() - w) <= step[None] / 2 * 1.0001).all()


def test_bits_of_a_weight():
    stored = jax.eval_shape(to_nf4, jax.ShapeDtypeStruct((1024, 1024), jnp.float32))
    assert 8 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored)) / 2**20 < 4.13


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_low_rank_over_a_quantised_base_is_over_the_dense_one(form):
    """Values and gradients, with every setting of remat, equal those over the dequantised kernels."""
    _, model, base = cases.network(qkv_bias=True)
    small = adapters.quantise_base(base, form=form)
    dense = adapters.dequantise_base(small)
    assert isinstance(get(small, "layers/ffn/up/kernel"), Operator)
    assert small["embed"] is base["embed"]
    for name in ("q", "o"):
        whole = get(base, f"layers/attention/{name}/kernel")
        error = np.abs(get(dense, f"layers/attention/{name}/kernel") - whole).max()
        assert 0 < error < {"nf4": 0.2, "int8": 0.01}[form] * np.abs(whole).max()
    adapter = adapters.lora(adapters.LoRAConfig(rank=3, magnitude=True))
    params = cases.stirred(adapter.init(jax.random.key(0), model, small))
    ids = cases.tokens()
    for remat in ("none", "dots"):
        own = cases.network(qkv_bias=True, remat=remat)[1]
        value = lambda params, base: (adapters.adapt(own, base, adapter).apply(params, ids)[0] ** 3).sum()
        got, expected = (jax.jit(jax.value_and_grad(value))(params, tree) for tree in (small, dense))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), got, expected)
    assert cases.forward(model, adapter)(small, params, ids).shape == (2, 10, 16)


def test_the_backward_pass_keeps_codes_and_no_kernels():
    """Temporary memory of a gradient, with nothing recomputed: below that of one dense copy of the layers."""
    config = TransformerConfig(
        vocab_size=16, width=128, layers=16, heads=2, kv_heads=2, ffn=512, max_length=16, remat="none"
    )
    model = language_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    small = jax.eval_shape(adapters.quantise_base, shapes)
    adapter = adapters.lora(adapters.LoRAConfig(rank=1, targets=("q",)))
    params = jax.eval_shape(lambda key: adapter.init(key, model, shapes), jax.random.key(0))
    kernels = sum(x.size for x in jax.tree.leaves(shapes["layers"])) * 4

    def temporary(base):
        value = lambda params, base: adapters.adapt(model, base, adapter).apply(params, jnp.zeros((1, 4), int))[0].sum()
        program = jax.jit(jax.grad(value)).lower(params, base).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(small) < 0.4 * kernels


def test_merging_into_a_quantised_base_gives_plain_kernels():
    _, model, base = cases.network()
    small = adapters.quantise_base(base, form="int8", targets=("q", "v"))
    adapter = adapters.lora(adapters.LoRAConfig(targets=("q", "up")))
    params = cases.stirred(adapter.init(jax.random.key(0), model, small))
    merged = adapters.merge(small, params, adapter).params
    assert get(merged, "layers/attention/q/kernel").dtype == jnp.float32
    ids = cases.tokens()
    got, expected = model.apply(merged, ids)[0], cases.forward(model, adapter)(small, params, ids)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_bad_input_is_refused():
    _, _, base = cases.network()
    with pytest.raises(ValueError, match="form is 'int4', expected int8 or nf4"):
        adapters.quantise_base(base, form="int4")
    with pytest.raises(ValueError, match="quantise_base: targets"):
        adapters.quantise_base(base, targets=("embed",))
    with pytest.raises(ValueError, match=r"shape \(3, 2\), expected an even number of inputs"):
        to_nf4(jnp.ones((3, 2)))
    assert NF4.__doc__
