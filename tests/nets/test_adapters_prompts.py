"""Prompts and prefixes: as real positions in front, under packing and padding, in the sampler."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import Causal, Segments
from jaxrl.nets import adapters
from jaxrl.nets.adapters.prompts import encoded
from jaxrl.posttrain.rollout import Sampling, completion_log_probs, rollout
from jaxrl.posttrain.score import log_probs_of
from jaxrl.types import Prompts, TokenBatch
from tests.nets import adapter_cases as cases


def ready(kind, **changes):
    """(model, base, adapter, params) with values of their own."""
    _, model, base = cases.network(**changes)
    adapter = {
        "prompt": lambda: adapters.prompt(adapters.PromptConfig(length=3)),
        "mlp": lambda: adapters.prompt(adapters.PromptConfig(length=3, encoder="mlp", hidden=6)),
        "lstm": lambda: adapters.prompt(adapters.PromptConfig(length=3, encoder="lstm", hidden=6)),
        "prefix": lambda: adapters.prefix(adapters.PrefixConfig(length=3)),
        "prefix_mlp": lambda: adapters.prefix(adapters.PrefixConfig(length=3, hidden=6)),
    }[kind]()
    return model, base, adapter, cases.stirred(adapter.init(jax.random.key(0), model, base), std=0.5)


KINDS = ["prompt", "lstm", "prefix"]


@pytest.mark.parametrize("kind", ["prompt", "lstm"])
def test_a_prompt_is_embeddings_in_front(kind):
    model, base, adapter, params = ready(kind)
    ids = cases.tokens()
    got = cases.forward(model, adapter)(base, params, ids)
    front = jnp.broadcast_to(encoded(params)[None], (2, 3, 16))
    whole = jnp.concatenate([front, base["embed"]["embedding"][ids]], axis=1)
    expected = jax.jit(model.apply)(base, whole)[0][:, 3:]
    np.testing.assert_allclose(got, expected, atol=2e-5)

    def value(apply):
        return lambda params: (apply(params) ** 3).sum()

    def in_front(params):
        front = jnp.broadcast_to(encoded(params)[None], (2, 3, 16))
        return model.apply(base, jnp.concatenate([front, base["embed"]["embedding"][ids]], axis=1))[0][:, 3:]

    ours = lambda params: adapters.adapt(model, base, adapter).apply(params, ids)[0]
    gradients = [jax.jit(jax.grad(value(apply)))(params) for apply in (ours, in_front)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *gradients)


def test_a_prefix_of_real_tokens_is_those_tokens():
    """Started from activations, it gives what the tokens would give; so does a prompt from their embeddings."""
    _, model, base = cases.network(qk_norm=True)
    front, ids = (5, 6, 7), cases.tokens()
    whole = jnp.concatenate([jnp.broadcast_to(jnp.asarray(front)[None], (2, 3)), ids], axis=1)
    expected = jax.jit(model.apply)(base, whole)[0][:, 3:]
    for adapter in (
        adapters.prefix(adapters.PrefixConfig(length=3, start=front)),
        adapters.prompt(adapters.PromptConfig(length=3, start=front)),
    ):
        params = adapter.init(jax.random.key(0), model, base)
        np.testing.assert_allclose(cases.forward(model, adapter)(base, params, ids), expected, atol=2e-5)
        away = cases.forward(model, adapter)(base, cases.stirred(params, std=0.5), ids)
        assert np.abs(away - expected).max() > 0.05


def test_two_kinds_of_layers():
    """With windows in some layers the prefix is seen in all, and a window as wide as everything changes nothing."""
    _, model, base = cases.network(window=64, window_layers=(1,))
    plain = cases.network()[1]
    adapter = adapters.prefix(adapters.PrefixConfig(length=3))
    params = cases.stirred(adapter.init(jax.random.key(0), model, base), std=0.5)
    ids = cases.tokens()
    got, expected = (cases.forward(m, adapter)(base, params, ids) for m in (model, plain))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    narrow = cases.network(window=1)[1]
    seen = cases.forward(narrow, adapter)(base, params, ids)
    unseen = jax.jit(narrow.apply)(base, ids)[0]
    assert np.abs(seen - unseen)[:, -1].max() > 0.05


@pytest.mark.parametrize("kind", ["mlp", "prefix"])
def test_packed_examples_each_see_it(kind):
    model, base, adapter, params = ready(kind)
    score = jax.jit(lambda params, batch: log_probs_of(adapters.adapt(model, base, adapter), params, batch)[0])
    ids = cases.tokens(2, 6)
    alone = score(params, TokenBatch(ids, jnp.ones((2, 6))))
    segments = jnp.asarray([[1] * 6 + [2] * 6])
    packed = score(params, TokenBatch(ids.reshape(1, 12), jnp.ones((1, 12)), segments))
    np.testing.assert_allclose(packed[0, :5], alone[0], atol=2e-5)
    np.testing.assert_allclose(packed[0, 6:], alone[1], atol=2e-5)


def test_left_padding_changes_nothing():
    model, base, adapter, params = ready("prompt")
    run = cases.forward(model, adapter)
    ids = cases.tokens(1, 6)
    padded = jnp.pad(ids, ((0, 0), (4, 0)))
    real = (jnp.arange(10)[None] >= 4).astype(jnp.int32)
    positions = jnp.maximum(jnp.arange(10)[None] - 4, 0)
    got = run(base, params, padded, positions=positions, mask=Causal() & Segments(real))
    np.testing.assert_allclose(got[:, 4:], run(base, params, ids), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_draws_from_the_adapted_model(kind):
    """Ratio 1: the sampler's log-probs are the trainer's, and greedy tokens are those of full forward passes."""
    model, base, adapter, params = ready(kind)
    prompts = Prompts(jnp.asarray([[0, 0, 5], [2, 3, 4]]), jnp.asarray([1, 3]))

    @partial(jax.jit, static_argnames="temperature")
    def sample(base, params, temperature):
        adapted = adapters.adapt(model, base, adapter)
        sampling = Sampling(max_tokens=5, temperature=temperature)
        made = rollout(adapted, params, prompts, jax.random.key(0), sampling=sampling, eos_id=1, pad_id=0, samples=2)
        return made, completion_log_probs(adapted, params, made)[0]

    made, log_probs = sample(base, params, 1.0)
    mask = np.asarray(made.mask)
    np.testing.assert_allclose(made.log_probs * mask, log_probs * mask, atol=2e-5)
    made, _ = sample(base, params, 0.0)
    run = cases.forward(model, adapter)
    text = np.asarray(made.tokens)[0, 2 : 3 + int(made.lengths[0])]
    hidden = run(base, params, jnp.asarray(text)[None])
    best = np.asarray(hidden[0, :-1] @ model.unembedding(base)).argmax(-1)
    np.testing.assert_array_equal(best, text[1:])


def test_over_a_quantised_base():
    model, base, adapter, params = ready("prompt")
    small = adapters.quantise_base(base)
    got = cases.forward(model, adapter)(small, params, cases.tokens())
    expected = cases.forward(model, adapter)(adapters.dequantise_base(small), params, cases.tokens())
    np.testing.assert_allclose(got, expected, atol=2e-5)


BAD = {
    "length": (lambda: adapters.PromptConfig(length=0), "prompt length is 0"),
    "encoder": (lambda: adapters.PromptConfig(encoder="gru"), "encoder is 'gru'; expected none, mlp or lstm"),
    "prefix": (lambda: adapters.PrefixConfig(length=0), "prefix length is 0"),
    "start": (lambda: adapters.PrefixConfig(length=3, start=(1, 2)), "as many tokens as the length"),
    "both": (lambda: adapters.PrefixConfig(length=1, hidden=2, start=(1,)), "hidden 0: a network cannot"),
    "tree": (
        lambda: adapters.prefix(adapters.PrefixConfig()).graft({"embed": 0}, {}),
        "no layers/attention alone in the base",
    ),
    "width": (lambda: cases.network()[1].apply(cases.network()[2], jnp.ones((1, 2, 5))), r"expected \[B, T, D = 16\]"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
