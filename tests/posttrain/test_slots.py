"""Continuous batching against the plain loop, the trainer's forward pass, and a queue written out in Python."""

import collections
import dataclasses
import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets import adapters
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain.rollout import Sampling, completion_log_probs, rollout
from jaxrl.posttrain.slots import rollout_in_slots
from jaxrl.types import Finish, Prompts

EOS, PAD, WIDTH = 1, 0, 24
SIZES = {"vocab_size": 13, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 32, "tie_embeddings": False}


@pytest.fixture(scope="module")
def params(model):
    """Spread out so far that greedy rows differ, end at different places and depend on all they see."""
    fresh = jax.jit(model.init)(jax.random.key(3))
    return jax.tree.map_with_path(lambda path, x: x if path[-1].key == "scale" else 20.0 * x, fresh)


@functools.cache
def compiled(sampler, model, **options):
    def run(params, prompts, key, pad_id):
        return sampler(model, params, prompts, key, eos_id=EOS, pad_id=pad_id, **options)

    return jax.jit(run)


def sample(model, params, prompts, sampling, *, seed=0, pad_id=PAD, sampler=rollout_in_slots, **options):
    run = compiled(sampler, model, sampling=sampling, **options)
    return jax.device_get(run(params, prompts, jax.random.key(seed), pad_id))


@functools.cache
def scorer(model):
    """The trainer's forward pass."""
    return jax.jit(lambda params, made, temperature: completion_log_probs(model, params, made, temperature=temperature))


def counted(model, calls):
    """The model with a note of every forward pass of one token."""

    def apply(*args, cache=None, **kwargs):
        if cache is not None and args[1].shape[1] == 1:
            jax.debug.callback(lambda: calls.append(1))
        return model.apply(*args, cache=cache, **kwargs)

    return model._replace(apply=apply)


def same(first, second, atol=2e-5):
    """Equal completions, equal ends, log-probs but for rounding."""
    for name in ("tokens", "lengths", "finish", "prompt_lengths"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    for name in ("log_probs", "behaviour_log_probs"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=atol, err_msg=name)
    assert first.prompt_width == second.prompt_width


@functools.cache
def changed(**changes):
    return language_model(TransformerConfig(**SIZES, max_length=64, **changes))


MODELS = {
    "plain": {},
    "window": {"window": 5, "window_layers": (1,)},
    "bfloat16": {"cache_dtype": "bfloat16"},
}
GREEDY = Sampling(temperature=0.0, max_tokens=WIDTH)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_the_plain_loop(name, params, prompts):
    """Two slots, so that the columns slide several times; a group shares its prompt."""
    model = changed(**MODELS[name])
    plain = sample(model, params, prompts, GREEDY, samples=3, sampler=rollout)
    slots = sample(model, params, prompts, GREEDY, samples=3, slots=2)
    same(slots, plain, 0.02 if name == "bfloat16" else 2e-5)  # a number between two steps may fall to either side
    assert len(set(plain.lengths.tolist())) > 2 and plain.lengths.sum() > 3 * WIDTH
    assert all(len(set(row.tolist())) > 3 for row in plain.completions if EOS not in row)


COLD = Sampling(max_tokens=WIDTH, temperature=0.6)
FILTERS = Sampling(max_tokens=WIDTH, temperature=1.3, top_k=6, top_p=0.9, min_p=0.05)


def test_the_number_of_slots_changes_nothing(model, params, prompts):
    """One, three, more than rows."""
    first, *others = (sample(model, params, prompts, FILTERS, samples=4, slots=slots) for slots in (1, 3, 100))
    for other in others:
        same(other, first)
    assert len(set(first.lengths.tolist())) > 4 and len({row.tobytes() for row in first.completions}) > 8


def test_log_probs_are_those_of_the_trainer(model, params, prompts):
    for sampling in (FILTERS, COLD):
        made = sample(model, params, prompts, sampling, samples=4, slots=3)
        at_one, _ = scorer(model)(params, made, 1.0)
        np.testing.assert_allclose(at_one * made.mask, made.log_probs, atol=2e-5)
    tempered, _ = scorer(model)(params, made, 0.6)
    np.testing.assert_allclose(tempered * made.mask, made.behaviour_log_probs, atol=2e-5)


def test_an_int8_cache_samples_alike_in_any_number_of_slots(model, params, prompts):
    small = changed(cache_dtype="int8")
    few, all_at_once = (sample(small, params, prompts, FILTERS, samples=4, slots=slots) for slots in (3, 16))
    np.testing.assert_array_equal(few.tokens, all_at_once.tokens)
    error = np.abs(scorer(model)(params, few, 1.0)[0] * few.mask - few.log_probs)
    assert 0 < error.max() < 0.3 and error.mean() < 0.02


def test_a_row_depends_on_its_key_its_number_and_its_prompt_alone(model, params, prompts):
    """Prompts that come later in the queue change nothing; another key does."""
    whole, again = (sample(model, params, prompts, COLD, samples=4, slots=3) for _ in range(2))
    half = sample(model, params, jax.tree.map(lambda x: x[:2], prompts), COLD, samples=4, slots=3)
    np.testing.assert_array_equal(whole.tokens, again.tokens)
    np.testing.assert_array_equal(whole.tokens[:8], half.tokens)
    other = sample(model, params, prompts, COLD, samples=4, slots=3, seed=1)
    assert (whole.tokens != other.tokens).any()


def test_draws_follow_the_distribution(model, params):
    """Pairs of first and second token of 4,000 rows, against the probabilities that their log-probs say."""
    one = Prompts(jnp.asarray([[2, 3]]), jnp.asarray([2]))
    result = sample(model, params, one, Sampling(max_tokens=2, temperature=1.3), samples=4000, slots=500)
    pairs, first, counts = np.unique(result.completions, axis=0, return_index=True, return_counts=True)
    expected = np.exp(result.behaviour_log_probs[first].sum(axis=1))
    assert len(pairs) > 20 and expected.sum() > 0.97
    error = np.abs(counts / 4000 - expected) / np.sqrt(expected * (1 - expected) / 4000)
    assert error[expected > 0.002].max() < 5


def test_ends(model, params, prompts):
    """Every way to end, also at the first token; nothing after it; a padding id that is EOS is not confused with it."""
    stops, options = ((5, 2), (4,)), {"samples": 16, "slots": 5}
    sampling = Sampling(max_tokens=8, temperature=3.0)
    apart = sample(model, params, prompts, sampling, pad_id=12, stop=stops, **options)
    after = np.arange(8) >= apart.lengths[:, None]
    assert (apart.completions[after] == 12).all() and not apart.log_probs[after].any()
    assert set(apart.finish.tolist()) == {Finish.EOS, Finish.LENGTH, Finish.STOP}
    for row, length, finish in zip(apart.completions.tolist(), apart.lengths, apart.finish, strict=True):
        ends = [i + 1 for i in range(8) if row[i] in (EOS, 4) or row[max(i - 1, 0) : i + 1] == [5, 2]]
        assert length == min([*ends, 8])
        hit = row[length - 1] == 4 or row[max(length - 2, 0) : length] == [5, 2]
        assert finish == (Finish.EOS if row[length - 1] == EOS else Finish.STOP if hit else Finish.LENGTH)
    assert ((apart.lengths == 1) & (apart.finish == Finish.EOS)).any()
    assert any(row[:2] == [5, 2] for row in apart.completions.tolist())
    padded = sample(model, params, prompts, sampling, pad_id=EOS, stop=stops, **options)
    np.testing.assert_array_equal(padded.mask, apart.mask)
    np.testing.assert_array_equal(padded.log_probs, apart.log_probs)


def test_a_stop_sequence_does_not_begin_in_the_row_before(model, params, prompts):
    """Sequences that would end a row only together with the EOS of the row that had its slot before."""
    sampling, options = Sampling(max_tokens=8, temperature=3.0), {"samples": 16, "slots": 5}
    free = sample(model, params, prompts, sampling, stop=((5, 2), (4,)), **options)
    begins = collections.Counter(tuple(row[:2].tolist()) for row in free.completions[free.lengths > 2])
    stops = ((5, 2), (4,), *((EOS, *pair) for pair, _ in begins.most_common(4)))
    same(sample(model, params, prompts, sampling, stop=stops, **options), free)


def test_one_token_needs_no_loop(params, prompts):
    calls = []
    model = counted(changed(), calls)
    result = sample(model, params, prompts, dataclasses.replace(GREEDY, max_tokens=1), slots=3)
    jax.effects_barrier()
    assert not calls and (result.lengths == 1).all()
    longer = sample(changed(), params, prompts, GREEDY, samples=3, sampler=rollout)
    np.testing.assert_array_equal(result.tokens, longer.tokens[::3, :5])


def steps_of_a_queue(work, slots):
    """When the last slot is done, if each in turn takes the next piece of work as soon as it is free."""
    free = [0] * slots
    for n in work:
        heapq.heappush(free, heapq.heappop(free) + n)
    return max(free)


def test_steps_are_those_of_the_work(model, params, prompts):
    """Forward passes are the rows' tokens over the slots and a tail, not the longest row of each wave."""
    sampling, slots, calls = Sampling(max_tokens=58, temperature=2.2), 8, []
    result = sample(counted(model, calls), params, prompts, sampling, samples=24, slots=slots)
    jax.effects_barrier()
    work = result.lengths - 1  # the first token is drawn from the prompt
    assert len(calls) == steps_of_a_queue(work, slots)
    assert len(calls) <= np.ceil(work.sum() / slots) + work.max()
    waves = work.reshape(-1, slots).max(axis=1).sum()
    assert work.max() > 2 * work.mean() and waves > 1.7 * len(calls)


def test_prompts_are_read_once_for_a_group(model, params, prompts):
    shapes = []

    def apply(*args, **kwargs):
        shapes.append(args[1].shape)
        return model.apply(*args, **kwargs)

    options = {"sampling": Sampling(max_tokens=3), "eos_id": EOS, "pad_id": PAD, "samples": 5, "slots": 2}
    sampler = functools.partial(rollout_in_slots, model._replace(apply=apply), **options)
    jax.eval_shape(sampler, params, prompts, jax.random.key(0))
    assert set(shapes) == {(4, 4), (2, 1)}


def test_an_adapter_decodes_in_slots(params, prompts):
    """Its cache carries more than keys and values, here with scales too; both samplers leave that as it is."""
    base = changed(cache_dtype="int8")
    adapter = adapters.lora(adapters.LoRAConfig(rank=2))
    tuned = adapters.adapt(base, params, adapter)
    small = jax.jit(tuned.init)(jax.random.key(0))
    small = jax.tree.map(lambda x: x + 0.2 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), small)
    slots = sample(tuned, small, prompts, GREEDY, samples=3, slots=3)
    same(slots, sample(tuned, small, prompts, GREEDY, samples=3, sampler=rollout), 0.02)
    bare = sample(changed(), params, prompts, GREEDY, samples=3, sampler=rollout)
    assert (slots.tokens != bare.tokens).any()


def test_devices_have_queues_of_their_own(params, prompts):
    def sampler(params, prompts):
        options = {"sampling": GREEDY, "eos_id": EOS, "pad_id": PAD, "samples": 3, "slots": 2}
        return rollout_in_slots(changed(), params, prompts, jax.random.key(0), **options)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = jax.sharding.PartitionSpec("data")
    everywhere = jax.sharding.PartitionSpec()
    apart = jax.shard_map(sampler, mesh=mesh, in_specs=(everywhere, rows), out_specs=rows, check_vma=False)
    plain = sample(changed(), params, prompts, GREEDY, samples=3, sampler=rollout)
    same(jax.device_get(jax.jit(apart)(params, prompts)), plain)


def test_a_context_that_rollout_fills_is_filled(params, prompts):
    """The columns to slide through are no part of the context; one token more is refused, as by rollout."""
    model = language_model(TransformerConfig(**SIZES, max_length=12))
    full = sample(model, params, prompts, dataclasses.replace(GREEDY, max_tokens=8), slots=2)
    longer = sample(changed(), params, prompts, GREEDY, samples=3, sampler=rollout)
    np.testing.assert_array_equal(full.tokens, longer.tokens[::3, :12])
    with pytest.raises(ValueError, match="cache of 13 columns was asked for, but the config's max_length is 12"):
        sample(model, params, prompts, Sampling(max_tokens=9), slots=2)


def test_bad_input_is_refused(model, params, prompts):
    two = Sampling(max_tokens=2)
    for slots in (0, -3):
        with pytest.raises(ValueError, match=f"slots is {slots}; expected at least 1"):
            sample(model, params, prompts, two, slots=slots)
    with pytest.raises(ValueError, match="expected \\[N, P\\] and \\[N\\]"):
        sample(model, params, prompts.replace(lengths=prompts.lengths[:2]), two, slots=2)
    with pytest.raises(ValueError, match="stop sequence is empty"):
        sample(model, params, prompts, two, stop=((),), slots=2)
    turned = lambda *sizes: jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2) if x.ndim else x, model.init_cache(*sizes))
    with pytest.raises(ValueError, match=r"cache of 2 rows and 6 columns holds an array of shape \(2, 1, 2, 6, 8\)"):
        sample(model._replace(init_cache=turned), params, prompts, two, slots=2)
    with pytest.raises(ValueError, match="sampling max_tokens is 0"):
        dataclasses.replace(two, max_tokens=0)
