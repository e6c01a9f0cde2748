"""KTO as steps: mismatched responses, the batch's one reference point, gradients, parts and devices."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import loop, parallel
from jaxrl.posttrain import kto
from jaxrl.types import Labelled, TokenBatch
from tests.oracles import losses_preference as oracle
from tests.posttrain.tabular import bandit, one_token

EOS = 1


@pytest.fixture(scope="module")
def labelled():
    """Sixteen responses to five prompts of one to three tokens; neighbours share a prompt, as in data sets."""
    rng = np.random.default_rng(0)
    tokens, mask = np.full((16, 8), EOS, np.int32), np.zeros((16, 8), np.float32)
    for row in range(16):
        prompt = [5 + row // 4] * (1 + row // 4 % 3)
        response = [*rng.integers(2, 13, size=rng.integers(0, 4)), EOS]
        tokens[row, : len(prompt) + len(response)] = [*prompt, *response]
        mask[row, len(prompt) : len(prompt) + len(response)] = 1
    return Labelled(TokenBatch(jnp.asarray(tokens), jnp.asarray(mask)), jnp.asarray(rng.random(16) < 0.5))


def split_row(tokens, mask):
    start, end = int(mask.argmax()), int(np.flatnonzero(mask)[-1]) + 1
    return tuple(tokens[:start].tolist()), tuple(tokens[start:end].tolist())


def test_mismatched_responses_belong_to_other_prompts(labelled):
    """Every prompt keeps its row, and gets a whole response that was given to a different prompt."""
    tokens, mask = np.asarray(labelled.examples.tokens), np.asarray(labelled.examples.loss_mask)
    own = [split_row(*row) for row in zip(tokens, mask, strict=True)]
    mixed = kto.mismatched(labelled, seed=3)
    for row, (prompt, _) in enumerate(own):
        kept, response = split_row(np.asarray(mixed.tokens)[row], np.asarray(mixed.loss_mask)[row])
        assert kept == prompt
        assert any(other == response and asked != prompt for asked, other in own)
    assert mixed.tokens.shape[1] <= 3 + 4
    again, different = kto.mismatched(labelled, seed=3), kto.mismatched(labelled, seed=4)
    np.testing.assert_array_equal(mixed.tokens, again.tokens)
    assert mixed.tokens.shape != different.tokens.shape or (mixed.tokens != different.tokens).any()


def test_one_prompt_only_still_has_partners():
    labelled = Labelled(one_token([1, 2, 3]), jnp.array([True, False, True]))
    mixed = np.asarray(kto.mismatched(labelled).tokens)
    assert (mixed[:, 0] == 0).all() and sorted(mixed[:, 1]) == [1, 2, 3] and (mixed[:, 1] != [1, 2, 3]).all()


def test_step_against_the_oracle_and_finite_differences():
    """Loss, reference point and gradient on the bandit, where log-ratios can be written down."""
    responses, wanted = np.array([0, 1, 2, 3, 1, 2]), np.array([1, 0, 0, 1, 1, 0], bool)
    labelled = Labelled(one_token(responses), jnp.asarray(wanted))
    mixed = kto.mismatched(labelled)
    partners = np.asarray(mixed.tokens)[:, 1]
    reference, start = np.array([0.3, -0.5, 0.8, 0.1]), np.array([0.4, 1.5, 0.5, -0.4])
    config = kto.KTOConfig(batch=6, beta=0.6, desirable_weight=1.3, undesirable_weight=0.7)
    recipe = kto.make(config, bandit(4), optax.sgd(1.0), max_grad_norm=0.0)
    data = recipe.reference({"logits": jnp.asarray(reference, jnp.float32)}, labelled, mixed)
    state = recipe.init(jax.random.key(0), {"logits": jnp.asarray(start, jnp.float32)})
    after, metrics = jax.jit(recipe.step)(state, data)

    ratios = lambda logits: (logits - np.log(np.exp(logits).sum())) - (reference - np.log(np.exp(reference).sum()))
    point = max(0.0, ratios(start)[partners].mean())  # a constant: it does not move with the logits
    assert point > 0

    def total(logits):
        rows = zip(ratios(logits)[responses], wanted, strict=True)
        return np.mean([oracle.kto(x, good, point, 0.6, 1.3, 0.7) for x, good in rows])

    np.testing.assert_allclose(metrics["rewards/reference_point"], 0.6 * point, rtol=1e-5)
    np.testing.assert_allclose(metrics["train/loss"], total(start), rtol=1e-5)
    moved = [(total(start + 1e-5 * e) - total(start - 1e-5 * e)) / 2e-5 for e in np.eye(4)]
    np.testing.assert_allclose(state.params["logits"] - after.params["logits"], moved, atol=2e-6)
    rewards = 0.6 * ratios(start)[responses]
    np.testing.assert_allclose(metrics["rewards/chosen"], rewards[wanted].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], rewards[wanted].mean() - rewards[~wanted].mean(), rtol=1e-5)
    np.testing.assert_allclose(recipe.rewards(state.params, data), rewards, rtol=1e-5)


@pytest.mark.parametrize(("micro_batches", "mesh"), [(4, ""), (1, "data=4,fsdp=2")], ids=["parts", "devices"])
def test_parts_and_devices_change_nothing(micro_batches, mesh, model, params, labelled):
    """The reference point is that of the whole batch, so parts of it give the same steps."""
    mixed = kto.mismatched(labelled)
    reference = jax.tree.map(lambda x: x * 1.1, params)  # so that the KL's estimate is not 0
    data = jax.jit(kto.make(kto.KTOConfig(batch=5), model, optax.sgd(0.1)).reference)(reference, labelled, mixed)
    outcomes = []
    for parts, devices in ((1, ""), (micro_batches, mesh)):
        place = parallel.make_mesh(devices) if devices else None
        options = {"constrain": partial(parallel.shard_batch, mesh=place)} if place else {}
        recipe = kto.make(kto.KTOConfig(batch=8, micro_batches=parts), model, optax.sgd(0.3), **options)
        state = recipe.init(jax.random.key(0), params)
        if place:
            state = jax.device_put(state, parallel.state_shardings(state, place))
        (result,) = loop.run(recipe.step, state, data, steps=3, chunk=3)
        outcomes.append((jax.device_get(result.state.params), result.metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), *(params for params, _ in outcomes))
    for row, expected in zip(*(metrics for _, metrics in outcomes), strict=True):
        np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-4, atol=1e-5)
    points = [row["rewards/reference_point"] for row in outcomes[0][1]]
    assert max(points) > 0 and len(set(points)) > 1


def test_learns_what_is_wanted_without_pairs():
    """Responses that are wanted nine and six times out of ten rise, in that order; those wanted less often fall."""
    shares = np.array([9, 6, 4, 1])
    rows = [(y, n < share) for (y, share), n in itertools.product(enumerate(shares), range(10))]
    labelled = Labelled(one_token([y for y, _ in rows]), jnp.array([good for _, good in rows]))
    recipe = kto.make(kto.KTOConfig(batch=40, beta=0.5), bandit(4), optax.adam(0.02))
    state = recipe.init(jax.random.key(0), {"logits": jnp.zeros(4)})
    data = recipe.reference(state.params, labelled, kto.mismatched(labelled))
    *_, last = loop.run(recipe.step, state, data, steps=100, chunk=100)
    policy = np.asarray(jax.nn.softmax(last.state.params["logits"]))
    assert policy[0] > policy[1] > 0.25 > policy[2:].max(), policy


def test_bad_input_is_refused(labelled):
    with pytest.raises(ValueError, match="beta is 0"):
        kto.KTOConfig(beta=0.0)
    with pytest.raises(ValueError, match="batch is 9 and micro_batches is 2"):
        kto.KTOConfig(batch=9, micro_batches=2)
    with pytest.raises(ValueError, match="the examples are packed"):
        packed = labelled.examples.replace(segments=jnp.ones((16, 8), jnp.int32))
        kto.mismatched(labelled.replace(examples=packed))
    with pytest.raises(ValueError, match="16 examples, 15 of them with a response"):
        empty = labelled.examples.replace(loss_mask=labelled.examples.loss_mask.at[2].set(0.0))
        kto.mismatched(labelled.replace(examples=empty))
