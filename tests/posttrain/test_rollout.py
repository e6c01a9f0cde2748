"""The sampler against plain Python, token by token, and against the trainer's own forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain.rollout import Sampling, behaviour_logits, completion_log_probs, rollout
from jaxrl.types import Finish, Prompts

EOS, PAD, WIDTH = 1, 0, 8


def sample(model, params, prompts, sampling, *, seed=0, **options):
    options = {"eos_id": EOS, "pad_id": PAD, **options}
    run = jax.jit(lambda params, prompts, key: rollout(model, params, prompts, key, sampling=sampling, **options))
    return jax.device_get(run(params, prompts, jax.random.key(seed)))


def all_logits(model, params, rows):
    """Logits after every token of some lists of ids: no cache, padded on the right, where causality hides it."""
    width = 4 + WIDTH  # one shape, one compilation
    tokens = np.zeros((len(rows), width), np.int32)
    for line, ids in zip(tokens, rows, strict=True):
        line[: len(ids)] = ids
    forward = jax.jit(lambda params, tokens: model.apply(params, tokens)[0] @ model.unembedding(params))
    return np.asarray(forward(params, jnp.asarray(tokens)), np.float64)


def texts(prompts, result):
    """Prompt and completion of every row, without padding."""
    starts = prompts.tokens.shape[1] - result.prompt_lengths
    ends = prompts.tokens.shape[1] + result.lengths
    return [row[start:end].tolist() for row, start, end in zip(result.tokens, starts, ends, strict=True)]


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def filtered(logits, sampling):
    """Temperature, top-k, top-p, min-p in plain Python, from their definitions."""
    logits = logits / sampling.temperature
    keep = np.ones(len(logits), bool)
    if sampling.top_k:
        keep &= logits >= np.sort(logits)[-min(sampling.top_k, len(logits))]
    if sampling.top_p < 1:
        probabilities = np.exp(log_softmax(np.where(keep, logits, -np.inf)))
        total, chosen = 0.0, np.zeros(len(logits), bool)
        for token in np.argsort(-probabilities):
            if total >= sampling.top_p:
                break
            chosen[token], total = True, total + probabilities[token]
        keep &= chosen
    if sampling.min_p:
        keep &= logits >= logits[keep].max() + np.log(sampling.min_p)
    return np.where(keep, logits, -np.inf)


def test_greedy_is_the_argmax_of_uncached_forwards(model, params, prompts):
    result = sample(model, params, prompts, Sampling(temperature=0.0, max_tokens=WIDTH))
    logits = all_logits(model, params, texts(prompts, result))
    for row, start in enumerate(np.asarray(prompts.lengths) - 1):
        length = result.lengths[row]
        written, seen = result.completions[row, :length], logits[row, start : start + length]
        np.testing.assert_array_equal(written, seen.argmax(-1))
        expected = [log_softmax(line)[token] for line, token in zip(seen, written, strict=True)]
        np.testing.assert_allclose(result.log_probs[row, :length], expected, atol=1e-5)
        assert EOS not in written[:-1]
        assert result.finish[row] == (Finish.EOS if written[-1] == EOS else Finish.LENGTH)
        assert written[-1] == EOS or length == WIDTH
    assert not result.behaviour_log_probs.any()  # greedy is certain


SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ratio_is_one_on_policy(name, model, params, prompts):
    """Both log-probs of the sampler equal those of a full forward pass: of the model, and of the filtered one."""
    sampling = Sampling(max_tokens=WIDTH, **SETTINGS[name])
    result = sample(model, params, prompts, sampling, samples=3)
    logits = all_logits(model, params, texts(prompts, result))
    for row, start in enumerate(result.prompt_lengths - 1):
        for column in range(result.lengths[row]):
            line, token = logits[row, start + column], result.completions[row, column]
            np.testing.assert_allclose(result.log_probs[row, column], log_softmax(line)[token], atol=2e-5)
            behaviour = log_softmax(filtered(line, sampling))[token]
            np.testing.assert_allclose(result.behaviour_log_probs[row, column], behaviour, atol=2e-5)


def test_trainer_and_sampler_agree(model, params, prompts):
    """The trainer's forward pass gives the sampler's log-probs back, at temperature 1 and at the sampler's."""
    result = sample(model, params, prompts, Sampling(max_tokens=WIDTH, temperature=0.7), samples=2)
    at_one, entropy = completion_log_probs(model, params, result)
    tempered, _ = completion_log_probs(model, params, result, temperature=0.7)
    np.testing.assert_allclose(at_one * result.mask, result.log_probs, atol=2e-5)
    np.testing.assert_allclose(tempered * result.mask, result.behaviour_log_probs, atol=2e-5)
    assert (entropy > 0).all()


def test_draws_follow_the_distribution(model, params):
    """4,000 first tokens against the filtered softmax: total variation within five standard errors."""
    sampling = Sampling(max_tokens=1, top_p=0.9, temperature=1.2)
    one = Prompts(jnp.asarray([[2, 3]]), jnp.asarray([2]))
    result = sample(model, params, one, sampling, samples=4000)
    expected = np.exp(log_softmax(filtered(all_logits(model, params, [[2, 3]])[0, 1], sampling)))
    counts = np.bincount(result.completions[:, 0], minlength=len(expected)) / 4000
    assert not counts[expected == 0].any()
    assert np.abs(counts - expected).max() < 5 * 0.5 / np.sqrt(4000)


def test_key_decides_and_rows_differ(model, params, prompts):
    sampling = Sampling(max_tokens=WIDTH)
    first, again = (sample(model, params, prompts, sampling, seed=5, samples=8) for _ in range(2))
    other = sample(model, params, prompts, sampling, seed=6, samples=8)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()
    assert len({row.tobytes() for row in first.completions[:8]}) > 1


def test_nothing_is_written_after_the_end(model, params, prompts):
    """Where padding has an id of its own, columns after the end hold it, with log-prob 0; the EOS itself is kept."""
    result = sample(model, params, prompts, Sampling(max_tokens=WIDTH, temperature=2.0), samples=16, pad_id=12)
    after = np.arange(WIDTH) >= result.lengths[:, None]
    assert (result.completions[after] == 12).all() and not result.log_probs[after].any()
    ended = result.finish == Finish.EOS
    assert ended.any() and not ended.all()
    assert (result.completions[ended, result.lengths[ended] - 1] == EOS).all()
    assert (result.lengths[~ended] == WIDTH).all()
    np.testing.assert_array_equal(result.mask, ~after)


def test_padding_that_is_eos_still_trains_the_eos(model, params, prompts):
    """pad == EOS: the mask counts one EOS and no padding, because it comes from lengths."""
    sampling = Sampling(max_tokens=WIDTH, temperature=2.0)
    apart = sample(model, params, prompts, sampling, samples=16, pad_id=12)
    same = sample(model, params, prompts, sampling, samples=16, pad_id=EOS)
    np.testing.assert_array_equal(apart.mask, same.mask)
    np.testing.assert_array_equal(apart.log_probs, same.log_probs)
    ended = same.finish == Finish.EOS
    assert ((same.completions == EOS) * same.mask).sum() == ended.sum() > 0


def test_stop_sequences(model, params, prompts):
    """A row stops at the first column that completes a sequence, which is kept; EOS comes first."""
    free = sample(model, params, prompts, Sampling(max_tokens=WIDTH, temperature=2.0), samples=16)
    stops = ((int(free.completions[0, 1]), int(free.completions[0, 2])), (4,))
    result = sample(model, params, prompts, Sampling(max_tokens=WIDTH, temperature=2.0), samples=16, stop=stops)
    hits = 0
    for row in range(64):
        written = free.completions[row, : free.lengths[row]].tolist()
        ends = [i + 1 for i in range(len(written)) if any(tuple(written[: i + 1][-len(s) :]) == s for s in stops)]
        if ends and written[ends[0] - 1] != EOS:
            hits += 1
            assert result.finish[row] == Finish.STOP and result.lengths[row] == ends[0]
        else:
            assert result.finish[row] == free.finish[row] and result.lengths[row] == free.lengths[row]
    assert 0 < hits < 64


def test_an_int8_cache_is_shared_by_a_group(params, prompts):
    """Scales are repeated with their values: the rows of a greedy group are equal, and near those of the trainer."""
    sizes = {"vocab_size": 13, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 32, "max_length": 64}
    model = language_model(TransformerConfig(**sizes, cache_dtype="int8"))
    result = sample(model, params, prompts, Sampling(temperature=0.0, max_tokens=WIDTH), samples=2)
    np.testing.assert_array_equal(result.tokens[::2], result.tokens[1::2])
    exact, _ = completion_log_probs(model, params, result)
    error = np.abs(exact * result.mask - result.log_probs)
    assert 1e-5 < error.max() < 0.03


def test_loop_leaves_early(model, params, prompts):
    """The decode loop runs as many steps as the longest completion, not `max_tokens`."""
    calls = []

    def counted(*args, cache=None, **kwargs):
        if cache is not None and args[1].shape[1] == 1:
            jax.debug.callback(lambda: calls.append(1))
        return model.apply(*args, cache=cache, **kwargs)

    counting = model._replace(apply=counted)
    three = jax.tree.map(lambda x: x[:3], prompts)
    result = sample(counting, params, three, Sampling(max_tokens=60, temperature=3.0))
    jax.effects_barrier()
    assert 1 < result.lengths.max() < 60 and len(calls) == result.lengths.max() - 1


def test_filters_are_those_of_their_definitions():
    logits = np.random.default_rng(0).normal(size=(50, 11)) * 2
    for options in SETTINGS.values():
        sampling = Sampling(**options)
        expected = np.stack([filtered(row, sampling) for row in logits])
        np.testing.assert_allclose(behaviour_logits(jnp.asarray(logits), sampling), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("min_p", 1.0), ("max_tokens", 0)]
)
def test_bad_sampling_is_refused(field, value):
    with pytest.raises(ValueError, match=f"sampling {field} is {value}; expected"):
        dataclasses.replace(Sampling(), **{field: value})


def test_bad_prompts_are_refused(model, params, prompts):
    with pytest.raises(ValueError, match="expected \\[N, P\\] and \\[N\\]"):
        sample(model, params, prompts.replace(lengths=prompts.lengths[:2]), Sampling(max_tokens=2))
    with pytest.raises(ValueError, match="stop sequence is empty"):
        sample(model, params, prompts, Sampling(max_tokens=2), stop=((),))
    with pytest.raises(ValueError, match="max_length is 64"):
        sample(model, params, prompts, Sampling(max_tokens=61))
