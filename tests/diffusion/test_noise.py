"""Which tokens are masked, how often, and what they weigh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import diffusion
from jaxrl.diffusion.noise import uniforms, visible
from jaxrl.types import TokenBatch

MASK = 9
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
STATIC = ("mask_id", "form", "schedule", "block", "confine")
jitted = jax.jit(diffusion.noised, static_argnames=STATIC, compiler_options=QUICK)


def noised(batch, seed=0, **options):
    return jitted(jax.random.key(seed), batch, mask_id=MASK, **options)


def batch_of(rows, length, loss_mask=None, segments=None):
    tokens = jnp.arange(rows * length).reshape(rows, length) % 8
    counted = jnp.ones((rows, length)) if loss_mask is None else jnp.broadcast_to(loss_mask, (rows, length))
    return TokenBatch(tokens, counted, segments)


def test_uniforms_lie_one_to_a_stratum():
    u = np.asarray(uniforms(jax.random.key(0), 3, 10))
    assert (u >= 0).all() and (u < 1).all()
    for row in u:
        shifted = np.sort((row - row.min()) * 10)
        np.testing.assert_allclose(shifted, np.arange(10), atol=1e-4)
    assert not np.allclose(u[0], u[1])
    many = uniforms(jax.random.key(1), 4000, 3)
    assert abs(float((many[:, 1] < 0.3).mean()) - 0.3) < 0.03  # each one of them is uniform


def test_counts_are_uniform_and_so_are_the_places():
    rows, n = 24_000, 3
    part = noised(batch_of(rows, n), form="count")
    masked, weight = np.asarray(part.masked), np.asarray(part.weight)
    np.testing.assert_allclose(weight, np.broadcast_to(n / masked.sum(1, keepdims=True), weight.shape), rtol=1e-6)
    for mask in itertools.product([False, True], repeat=n):
        share = (masked == np.array(mask)).all(1).mean()
        expected = 0 if not any(mask) else 1 / n / [1, 3, 3, 1][sum(mask)]
        assert abs(share - expected) < 0.01
    np.testing.assert_array_equal(part.tokens, np.where(masked, MASK, part.batch.tokens))


def test_times_give_the_share_and_the_weight():
    rows = 4000
    part = noised(batch_of(rows, 50))
    t = 1 / np.asarray(part.weight)
    assert (t[:, :1] == t).all()
    assert t.min() >= 1e-3 * 0.99 and t.max() <= 1.0
    np.testing.assert_allclose(np.sort(t[:, 0]), np.linspace(1e-3, 1, rows), atol=2e-3)
    gap = np.asarray(part.masked) - t
    assert abs(gap.mean()) < 0.003
    assert abs(gap[t < 0.3].mean()) < 0.01 and abs(gap[t > 0.7].mean()) < 0.01
    some = noised(batch_of(100, 5), span=(0.3, 0.8))
    assert 0.299 < 1 / some.weight.max() and 1 / some.weight.min() < 0.801
    whole = noised(batch_of(3, 5), span=(1.0, 1.0))
    assert whole.masked.all() and (whole.weight == 1).all()


@pytest.mark.parametrize("schedule", ["cosine", "square"])
def test_the_weight_of_a_schedule_makes_up_for_its_times(schedule):
    length = 4000
    part = noised(batch_of(400, length), schedule=schedule, span=(0.0, 1.0))
    # the mean of weight * masked is the integral of -alpha', which is 1
    assert abs(float((part.weight * part.masked).mean()) - 1.0) < 0.02


@pytest.mark.parametrize("form", ["time", "count"])
def test_prompts_are_never_masked(form):
    prompt = jnp.arange(6)[None] >= 2
    part = noised(batch_of(200, 6, prompt * 1.0), form=form)
    assert not part.masked[:, :2].any() and part.masked[:, 2:].any()
    if form == "count":
        assert part.masked.sum(1).max() == 4
        np.testing.assert_allclose(part.weight[:, 2:].min(), 1.0)
    empty = noised(batch_of(2, 6, jnp.zeros((1, 6))), form=form)
    assert not empty.masked.any() and np.isfinite(empty.weight).all()


@pytest.mark.parametrize("form", ["time", "count"])
def test_blocks_and_packed_sequences_have_times_of_their_own(form):
    ids = jnp.broadcast_to(jnp.array([1] * 4 + [2] * 4 + [3] * 2)[None], (50, 10))
    blocks = noised(batch_of(50, 10), block=4, form=form)
    packed = noised(batch_of(50, 10, segments=ids), form=form)
    for part in (blocks, packed):
        weight, masked = np.asarray(part.weight), np.asarray(part.masked)
        for group in (slice(0, 4), slice(4, 8), slice(8, 10)):
            np.testing.assert_array_equal(
                weight[:, group], np.broadcast_to(weight[:, group][:, :1], weight[:, group].shape)
            )
            if form == "count":
                size = group.stop - group.start
                np.testing.assert_allclose(masked[:, group].sum(1), size / weight[:, group][:, 0], rtol=1e-5)
        assert len(np.unique(weight[:, ::4])) > 3
        assert (weight[:, 0] != weight[:, 4]).any()
    times = 1 / noised(batch_of(50, 10), block=1, form="time").weight
    np.testing.assert_allclose(np.sort(times.ravel()), np.linspace(1e-3, 1, 500), atol=4e-3)  # stratified over all


def test_confined_shares_lie_in_the_span():
    options = {"block": 4, "span": (0.3, 0.8)}
    part = noised(batch_of(500, 16), confine=True, **options)
    shares = np.asarray(part.masked).reshape(500, 4, 4).mean(-1)
    assert set(np.unique(shares)) == {0.5, 0.75}
    free = np.asarray(noised(batch_of(500, 16), **options).masked).reshape(500, 4, 4).mean(-1)
    assert {0.0, 0.25, 1.0} & set(np.unique(free))
    np.testing.assert_allclose(np.sort(1 / part.weight.ravel()), np.linspace(0.3, 0.8, 8000), atol=2e-3)
    full = noised(batch_of(500, 16), confine=True, block=4)
    np.testing.assert_array_equal(full.masked, noised(batch_of(500, 16), block=4).masked)
    # a block of one has no share in the span: it is drawn a hundred times and then left
    assert noised(batch_of(2, 3), block=1, span=(0.3, 0.8), confine=True).masked.shape == (2, 3)


def test_padding_is_hidden_or_becomes_the_end():
    counted = jnp.array([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1.0]])
    batch = batch_of(2, 5, counted)
    np.testing.assert_array_equal(visible(batch), [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    ended = diffusion.ended(batch, 7)
    np.testing.assert_array_equal(ended.loss_mask, [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(ended.tokens[0, 3:], [7, 7])
    np.testing.assert_array_equal(ended.tokens[:, :3], batch.tokens[:, :3])


def test_one_batch_in_a_hundred_is_short():
    shortened = jax.jit(jax.vmap(lambda key: visible(diffusion.shortened(key, batch_of(1, 6), share=0.3)).sum()))
    lengths = np.asarray(shortened(jax.random.split(jax.random.key(0), 3000)))
    assert abs((lengths < 6).mean() - 0.3 * 5 / 6) < 0.03
    counts = [(lengths == n).mean() for n in range(1, 6)]
    np.testing.assert_allclose(counts, 0.05, atol=0.02)


def test_intervals():
    spans = diffusion.intervals()
    assert spans.shape == (11 + 9 + 7 + 5 + 3, 2)
    assert (spans[:, 0] >= 1e-3).all() and (spans[:, 1] <= 1.0).all()
    assert any(np.allclose(span, (0.3, 0.8)) for span in spans)


@pytest.mark.parametrize(
    "options, message",
    [({"form": "rows"}, "form is 'rows'"), ({"schedule": "cosine", "form": "count"}, "masked shares only")],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        noised(batch_of(1, 3), **options)
