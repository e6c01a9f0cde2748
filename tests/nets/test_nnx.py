"""An NNX decoder behind the LanguageModel contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl.kernels.attention import Causal, attention
from jaxrl.nets.language_model import from_nnx, logits
from jaxrl.nets.transformer import Cache


class Decoder(nnx.Module):
    """One attention layer with learned positions: a small module that keeps the contract."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)
        self.place = nnx.Embed(16, 8, rngs=rngs)
        self.qkv = nnx.Linear(8, 24, rngs=rngs)
        self.out = nnx.Linear(8, 12, use_bias=False, rngs=rngs)

    def __call__(self, tokens, *, positions=None, mask=None, cache=None):
        offset = 0 if cache is None else cache.length
        if positions is None:
            positions = jnp.broadcast_to(offset + jnp.arange(tokens.shape[1])[None], tokens.shape)
        x = self.embed(tokens) + self.place(positions)
        q, k, v = (y[:, :, None] for y in jnp.split(self.qkv(x), 3, axis=-1))
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache.k, k, (0, offset, 0, 0))
            v = jax.lax.dynamic_update_slice(cache.v, v, (0, offset, 0, 0))
            cache = Cache(k, v, offset + tokens.shape[1])
        return x + attention(q, k, v, mask=mask, q_offset=offset)[:, :, 0], cache


def init_cache(batch, length):
    empty = jnp.zeros((batch, length, 1, 8))
    return Cache(empty, empty, jnp.int32(0))


def decoder():
    return from_nnx(Decoder, lambda params: params["out"]["kernel"], init_cache)


def test_params_are_a_plain_dict_and_the_functions_are_pure():
    model = decoder()
    init = jax.jit(model.init)
    params = init(jax.random.key(0))
    assert type(params) is dict and all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
    assert params["qkv"]["kernel"].shape == (8, 24)
    again, other = init(jax.random.key(0)), init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert np.abs(params["qkv"]["kernel"] - other["qkv"]["kernel"]).max() > 1e-3
    seeds = jax.eval_shape(jax.vmap(model.init), jax.random.split(jax.random.key(2), 3))
    assert seeds["qkv"]["kernel"].shape == (3, 8, 24)


def test_an_nnx_decoder_trains_and_decodes_behind_the_contract():
    model = decoder()
    params, apply = jax.jit(model.init)(jax.random.key(0)), jax.jit(model.apply)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 12)

    @jax.jit
    def step(params):
        def loss(params):
            scores = logits(model.apply(params, tokens[:, :-1])[0], model.unembedding(params))
            return -jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[:, 1:, None], axis=-1).mean()

        value, grad = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, grad)

    values = []
    for _ in range(60):
        value, params = step(params)
        values.append(float(value))
    assert values[-1] < 0.2 * values[0]

    full, _ = apply(params, tokens)
    prompt, cache = apply(params, tokens[:, :4], cache=model.init_cache(2, 7))
    out = [prompt]
    for t in range(4, 7):
        hidden, cache = apply(params, tokens[:, t : t + 1], mask=Causal(), cache=cache)
        out.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), full, atol=1e-5)


def test_a_module_with_other_state_than_parameters_is_refused():
    class Noisy(Decoder):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

    with pytest.raises(ValueError, match="[Nn]on-exhaustive"):
        from_nnx(Noisy, lambda params: params["out"]["kernel"], init_cache)
