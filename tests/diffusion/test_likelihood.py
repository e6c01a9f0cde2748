"""The bound on the likelihood: exact by enumeration, at its limits, and blind to what it must not see."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import diffusion
from jaxrl.diffusion.likelihood import others
from jaxrl.kernels.attention import Causal
from jaxrl.posttrain import update
from jaxrl.types import TokenBatch
from tests.diffusion.stubs import TINY, exact, joint, stub, tiny
from tests.oracles import diffusion as oracle

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MASK = 8


def key(seed=0):
    return jax.random.key(seed)


PARAMS = jax.jit(tiny.init, compiler_options=QUICK)(jax.random.key(1))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(MASK, size=(3, 12)))
BATCH = TokenBatch(TOKENS, jnp.ones(TOKENS.shape))
values = jax.jit(partial(diffusion.values, tiny), static_argnames=("mask_id", "block"), compiler_options=QUICK)
STATIC = ("mask_id", "form", "block")
jitted = jax.jit(diffusion.noised, static_argnames=STATIC, compiler_options=QUICK)
log_probs_of = jax.jit(partial(diffusion.log_probs_of, tiny), static_argnames=STATIC[::2], compiler_options=QUICK)
apply = jax.jit(tiny.apply, compiler_options=QUICK)


def noised(batch, **options):
    return jitted(key(), batch, mask_id=MASK, **options)


def assert_close(actual, expected, **kwargs):
    np.testing.assert_allclose(actual, expected, **{"rtol": 2e-5, "atol": 2e-5, **kwargs})


def test_the_loss_is_unbiased_under_exact_enumeration():
    """Over all masks of three tokens the 1 / t form, the n / m form and the mean over orders are one number."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 2, 2, 3, 6))  # another answer for every set of masked tokens
    model = stub(lambda params, tokens: jnp.float32(table)[tuple((tokens == 5).astype(jnp.int32).T)])
    tokens = np.array([4, 0, 2])
    log_p = table[..., :5] - np.log(np.exp(table[..., :5]).sum(-1, keepdims=True))
    log_prob = {
        mask: log_p[tuple(map(int, mask))][np.arange(3), tokens] for mask in [(False,) * 3, *oracle.all_masks(3)]
    }
    masks = oracle.all_masks(3)
    sizes = np.array([sum(mask) for mask in masks])
    batch = TokenBatch(jnp.tile(jnp.asarray(tokens)[None], (7, 1)), jnp.ones((7, 3)))
    part = diffusion.masked_by(batch, jnp.array(masks), jnp.float32(3 / sizes)[:, None] * jnp.ones((7, 3)), mask_id=5)
    by_mask = np.asarray(diffusion.values(model, None, part, mask_id=5).sum(1))
    by_count = (by_mask / 3 / np.array([0, 3, 3, 1])[sizes]).sum()
    want = oracle.any_order(log_prob, 3)
    assert_close(by_count, want, rtol=0, atol=1e-5)
    assert_close(oracle.bound_by_time(log_prob, 3), want, rtol=0, atol=1e-9)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    by_time = sum(
        w / 2 * (by_mask * sizes / 3 / t * t**sizes * (1 - t) ** (3 - sizes)).sum()
        for t, w in zip((nodes + 1) / 2, weights, strict=True)
    )
    assert_close(by_time, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["count", "time"])
def test_estimates_of_an_exact_model_are_its_likelihood(form):
    p = joint(0, 3, 4)
    model, rows = exact(p), np.random.default_rng(1).integers(3, size=(64, 4))
    batch = TokenBatch(jnp.asarray(rows), jnp.ones(rows.shape))
    estimate = partial(diffusion.log_likelihood, model, None, batch, mask_id=3, form=form, samples=256)
    truth, found = np.log(p[tuple(rows.T)]), np.asarray(jax.jit(estimate)(key()))
    error = found - truth
    assert abs(error.mean()) < (0.03 if form == "count" else 0.15)
    repeated = np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(key(3), 8)))
    spread = repeated.std(0).mean()
    assert (spread < 0.09) if form == "count" else (spread > 0.1), spread  # exactly m masked varies less


def test_part_of_a_row_given_the_rest():
    p = joint(1, 3, 4)
    rows = np.random.default_rng(1).integers(3, size=(5, 4))
    batch = TokenBatch(jnp.asarray(rows), jnp.tile(jnp.array([[0, 1.0, 0, 1.0]]), (5, 1)), jnp.ones((5, 4), jnp.int32))
    with pytest.raises(ValueError, match="batch has segments"):
        diffusion.log_likelihood(exact(p), None, batch, key(), mask_id=3)
    batch = batch.replace(segments=None)  # pyright: ignore
    found = diffusion.log_likelihood(exact(p), None, batch, key(), mask_id=3, samples=2000)
    given = p.sum(axis=(1, 3))[rows[:, 0], rows[:, 2]]
    assert_close(found, np.log(p[tuple(rows.T)] / given), atol=0.05)


def test_the_mask_token_is_ruled_out():
    part = noised(BATCH, form="count")
    log_probs, entropy = log_probs_of(PARAMS, part, mask_id=MASK)
    hidden, _ = apply(PARAMS, part.tokens, mask=diffusion.likelihood.Segments(jnp.ones_like(TOKENS)))
    x = np.asarray(hidden @ tiny.unembedding(PARAMS), np.float64)[..., :MASK]
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    assert_close(log_probs, np.log(np.take_along_axis(p, np.asarray(TOKENS)[..., None], -1))[..., 0])
    assert_close(entropy, -(p * np.log(p)).sum(-1))
    gradient = jax.grad(lambda params: diffusion.loss(tiny, params, part, mask_id=MASK)[0].total)(PARAMS)
    assert not np.asarray(gradient["unembed"]["kernel"])[:, MASK].any()
    columns, ids = others(jnp.arange(5.0)[None], jnp.arange(5), 2)
    np.testing.assert_array_equal(columns, [[0, 1, 3, 4]])
    np.testing.assert_array_equal(ids, [0, 1, 2, 2, 3])
    with pytest.raises(ValueError, match="mask_id is 9 of 9"):
        diffusion.log_probs_of(tiny, PARAMS, part, mask_id=9)


def test_blocks_of_one_all_masked_are_autoregressive():
    """Each token is -log p(x_i | x_<i) of the same network, read at a mask behind the prefix."""
    part = noised(BATCH, block=1, span=(1.0, 1.0))
    assert part.masked.all()
    found = values(PARAMS, part, mask_id=MASK, block=1)
    for i in range(TOKENS.shape[1]):
        prefix = jnp.concatenate([TOKENS[:, :i], jnp.full((3, 12 - i), MASK)], axis=1)  # what is right of i is not seen
        hidden, _ = apply(PARAMS, prefix, mask=Causal())
        log_p = jax.nn.log_softmax((hidden[:, i] @ tiny.unembedding(PARAMS))[:, :MASK])
        assert_close(found[:, i], -np.asarray(log_p)[np.arange(3), TOKENS[:, i]])


def test_one_block_is_masked_diffusion():
    part = noised(BATCH)
    assert_close(values(PARAMS, part, mask_id=MASK, block=12), values(PARAMS, part, mask_id=MASK))


@pytest.mark.parametrize("block", [1, 4, 5])
def test_a_block_sees_itself_and_clean_blocks_before_it(block):
    part = noised(BATCH, block=block, span=(0.5, 0.5))
    base = values(PARAMS, part, mask_id=MASK, block=block)
    for i in range(12):
        other = BATCH.tokens.at[:, i].set((BATCH.tokens[:, i] + 1) % MASK)
        # the clean half changes at i, and token i's target; the noisy half does not
        changed = part.replace(batch=BATCH.replace(tokens=other))  # pyright: ignore
        log_probs, _ = log_probs_of(PARAMS, changed, mask_id=MASK, block=block)
        now = -part.weight * log_probs * part.masked
        first = (i // block + 1) * block
        keep = np.arange(12) != i
        assert_close(now[:, keep][:, : first - 1], base[:, keep][:, : first - 1])
        if first < 12 and part.masked[:, first:].any():
            assert not np.allclose(now[:, first:], base[:, first:])


def test_each_block_equals_a_pass_over_clean_blocks_and_one_noisy_one():
    block, part = 4, noised(BATCH, block=4)
    found = values(PARAMS, part, mask_id=MASK, block=block)
    for at in range(0, 12, block):
        tokens = jnp.concatenate([TOKENS[:, :at], part.tokens[:, at:]], axis=1)  # later blocks are not seen
        hidden, _ = apply(PARAMS, tokens, mask=Causal() | diffusion.sample.Chunked(block))
        log_p = jax.nn.log_softmax((hidden[:, at : at + block] @ tiny.unembedding(PARAMS))[..., :MASK])
        chosen = jnp.take_along_axis(log_p, TOKENS[:, at : at + block, None], -1)[..., 0]
        inside = slice(at, at + block)
        assert_close(found[:, inside], -part.weight[:, inside] * chosen * part.masked[:, inside])


@pytest.mark.parametrize("block", [None, 4])
def test_padding_and_neighbours_are_not_seen(block):
    counted = (jnp.arange(12)[None] < jnp.array([[12], [9], [5]])) * 1.0
    part = noised(TokenBatch(TOKENS, counted), block=block)
    found = values(PARAMS, part, mask_id=MASK, block=block)
    short = jax.tree.map(lambda x: x[2:, :5], part)
    assert_close(found[2, :5], values(PARAMS, short, mask_id=MASK, block=block)[0])
    assert not found[2, 5:].any()
    if block is None:
        both = jnp.array([[1] * 5 + [2] * 7])
        packed = noised(TokenBatch(TOKENS[:1], jnp.ones((1, 12)), both))
        apart = [jax.tree.map(lambda x: x[:, rows], packed) for rows in (slice(0, 5), slice(5, 12))]
        together = [values(PARAMS, one, mask_id=MASK) for one in apart]
        assert_close(values(PARAMS, packed, mask_id=MASK), jnp.concatenate(together, axis=1))


@pytest.mark.parametrize("reduction", ["tokens", "sequences"])
def test_micro_batches_add_up(reduction):
    counted = (jnp.arange(12)[None] >= jnp.array([[0], [3], [7], [11]])) * 1.0
    part = noised(TokenBatch(TOKENS[jnp.array([0, 1, 2, 0])], counted))
    loss = lambda params, part: diffusion.loss(tiny, params, part, mask_id=MASK, reduction=reduction)
    one, two = (
        jax.jit(partial(update.value_and_grad, loss, micro_batches=n), compiler_options=QUICK)(PARAMS, part)
        for n in (1, 2)
    )
    jax.tree.map(partial(assert_close, rtol=1e-4), one, two)
    value = diffusion.values(tiny, PARAMS, part, mask_id=MASK)
    per_row = np.asarray(value.sum(1) / counted.sum(1))
    assert_close(one[0], per_row.mean() if reduction == "sequences" else value.sum() / counted.sum())
    assert_close(one[1]["diffusion/masked"], part.masked.sum() / counted.sum())


def test_gradients_of_the_likelihood():
    few = TokenBatch(TOKENS[:, :5], jnp.ones((3, 5)))
    of = lambda params: diffusion.log_likelihood(tiny, params, few, key(), mask_id=MASK, samples=3, block=2).sum()
    value_and_grad = jax.jit(jax.value_and_grad(of), compiler_options=QUICK)
    of, gradient = lambda params: value_and_grad(params)[0], value_and_grad(PARAMS)[1]
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(5), x.shape), PARAMS)
    move = lambda step: jax.tree.map(lambda p, d: p + step * d, PARAMS, direction)
    want = (of(move(1e-3)) - of(move(-1e-3))) / 2e-3
    found = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
    assert_close(found, want, rtol=2e-2)


def test_variances_are_of_block_means_and_clipping_lowers_them():
    model = stub(lambda params, tokens: jnp.zeros((*tokens.shape, 9)))
    batch = TokenBatch(jnp.tile(TOKENS, (100, 1)), jnp.ones((300, 12)))
    spans = np.array([(1e-3, 1.0), (0.3, 0.8), (0.5, 1.0)], np.float32)
    # log p is the same for every token, so a block's value is log(8) * share / t
    value_of = partial(diffusion.values, model, None, mask_id=MASK, block=4)
    search = jax.jit(partial(diffusion.variances, value_of, block=4, mask_id=MASK), compiler_options=QUICK)
    found = np.asarray(search(batch, key(), spans))
    part = diffusion.noised(key(), batch, mask_id=MASK, block=4, span=(0.3, 0.8), confine=True)
    means = np.log(8) * np.asarray(part.weight * part.masked).reshape(300, 3, 4).mean(-1)
    assert_close(found[1], means.var(), rtol=1e-4)
    assert found[1] < found[0] and found[2] < found[0]


def test_bfloat16_is_as_near_as_its_arithmetic():
    import dataclasses

    from jaxrl.nets.language_model import language_model

    half = language_model(dataclasses.replace(TINY, dtype="bfloat16"))
    part = noised(BATCH)
    fine, rough = (diffusion.log_probs_of(model, PARAMS, part, mask_id=MASK)[0] for model in (tiny, half))
    assert rough.dtype == jnp.float32
    assert np.abs(fine - rough).max() < 0.05
