"""Speculative decoding against the plain sampler, the trainer's forward pass and exact enumeration."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.nets.latent_attention import LatentConfig
from jaxrl.nets.moe import MoEConfig
from jaxrl.nets.multi_token import multi_token_model
from jaxrl.posttrain import sft, update
from jaxrl.posttrain.rollout import Sampling, behaviour_logits, completion_log_probs, rollout
from jaxrl.posttrain.speculative import own_drafter, small_drafter, speculative_rollout
from jaxrl.types import Prompts, TokenBatch

EOS, PAD = 1, 0
PLAIN = presets.tiny(13, width=16, heads=2, kv_heads=1, ffn=32, max_length=64, tie_embeddings=False)
LATENT = LatentConfig(kv_rank=12, nope=6, rope=4, value=5, q_rank=10)
EXPERTS = MoEConfig(4, 2, 8, shared=8, first_dense=1, score="sigmoid", bias=True)
CONFIGS = {
    "plain": PLAIN,
    "window": dataclasses.replace(PLAIN, window=3, cache_dtype="int8"),
    "deepseek": dataclasses.replace(PLAIN, kv_heads=2, latent=LATENT, experts=EXPERTS),
}


@functools.cache
def network(name):
    """Far from uniform, so that drafts are kept and rejected."""
    ahead = multi_token_model(CONFIGS[name])
    params = jax.jit(ahead.model.init)(jax.random.key(2))
    return ahead, {**params, "unembed": jax.tree.map(lambda w: 40.0 * w, params["unembed"])}


def run(sampler, model, params, prompts, **options):
    options = {"eos_id": EOS, "pad_id": PAD, **options}
    sample = jax.jit(lambda params, prompts, key: sampler(model, params, prompts, key, **options))
    return jax.device_get(sample(params, prompts, jax.random.key(0)))


@pytest.mark.parametrize(
    ("name", "drafter", "drafts"),
    [
        ("window", "own", 3),
        ("deepseek", "own", 2),
        ("plain", "itself", 3),
        pytest.param("plain", "own", 1, marks=pytest.mark.slow),
        pytest.param("plain", "other", 2, marks=pytest.mark.slow),
    ],
)
def test_greedy_is_rollout_s(name, drafter, drafts, prompts):
    ahead, params = network(name)
    model = ahead.model
    options = {"sampling": Sampling(temperature=0.0, max_tokens=9), "samples": 2, "stop": [(3, 3), (8,)]}
    other = language_model(PLAIN)
    given = {
        "own": {"drafter": own_drafter(ahead)},
        "itself": {"drafter": small_drafter(model)},
        "other": {"drafter": small_drafter(other), "draft_params": jax.jit(other.init)(jax.random.key(5))},
    }[drafter]
    want = run(rollout, model, params, prompts, **options)
    got, drafted = run(speculative_rollout, model, params, prompts, drafts=drafts, **options, **given)
    for field in ("tokens", "lengths", "finish", "prompt_lengths"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)
    tolerance = 3e-2 if name == "window" else 2e-5  # keys in 8 bits are rounded once and read alike, but for blocks
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=tolerance)
    assert len(set(want.lengths.tolist())) > 1 or name != "plain", "rows should end at different places"
    if drafter == "itself":
        assert drafted.kept == drafted.drafted and drafted.passes == -(-(want.lengths.max() - 1) // (drafts + 1))
    else:
        assert drafted.kept < drafted.drafted and drafted.passes <= want.lengths.max() - 1


def test_drafts_are_those_of_the_training_time_modules():
    """How many are kept follows from the greedy text and from what `ahead` says of it without any cache."""
    config = presets.tiny(4, width=16, heads=2, kv_heads=1, ffn=32, max_length=32, layers=1, tie_embeddings=False)
    ahead = multi_token_model(config)
    params = jax.tree.map(lambda w: 10.0 * w if w.ndim > 1 else w, jax.jit(ahead.model.init)(jax.random.key(4)))
    rng, width, new = np.random.default_rng(0), 5, 12
    lengths = rng.integers(1, width + 1, 24)
    tokens = np.where(np.arange(width) >= width - lengths[:, None], rng.integers(0, 4, (24, width)), 0)
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(lengths))
    options = {"sampling": Sampling(temperature=0.0, max_tokens=new), "drafter": own_drafter(ahead), "eos_id": -1}
    got, drafted = run(speculative_rollout, ahead.model, params, prompts, **options)

    @jax.jit
    def guesses(tokens):
        hidden, _ = ahead.model.apply(params, tokens)
        return jnp.argmax(ahead.ahead(params, hidden, tokens)[0] @ ahead.model.unembedding(params), axis=-1)

    texts = np.zeros((24, width + new), np.int32)
    for text, row, length in zip(texts, got.tokens, lengths, strict=True):
        text[: length + new] = row[width - length :]
    kept = tried = 0
    for text, guess, length in zip(texts, np.asarray(guesses(jnp.asarray(texts))), lengths, strict=True):
        column = length  # of the last token that is known
        while column < length + new - 1:
            right = guess[column - 1] == text[column + 1]
            kept, tried, column = kept + right, tried + 1, column + 1 + right
    assert (drafted.kept, drafted.drafted) == (kept, tried) and 20 < kept < tried - 20


def test_log_probs_are_the_trainer_s(prompts):
    sampling = Sampling(temperature=0.7, top_k=5, max_tokens=7)
    ahead, params = network("plain")
    model = ahead.model
    options = {"sampling": sampling, "drafter": own_drafter(ahead), "drafts": 2, "samples": 3}
    got, drafted = run(speculative_rollout, model, params, prompts, **options)
    assert 0 < drafted.kept < drafted.drafted
    mask = got.mask
    found = jax.jit(lambda p, x: completion_log_probs(model, p, x)[0])(params, got)
    np.testing.assert_allclose(got.log_probs * mask, found * mask, atol=2e-5)
    assert (got.behaviour_log_probs * mask > got.log_probs * mask).any()
    assert not (got.log_probs * (1 - mask)).any() and not (got.behaviour_log_probs * (1 - mask)).any()
    again, _ = run(speculative_rollout, model, params, prompts, **options)
    jax.tree.map(np.testing.assert_array_equal, got, again)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(max_tokens=3), marks=pytest.mark.slow),
        Sampling(temperature=1.5, top_p=0.8, max_tokens=3),
    ],
)
def test_completions_have_the_model_s_distribution(sampling):
    """All 4^3 completions of a vocabulary of 4, no end among them, by enumeration."""
    config = presets.tiny(4, width=8, heads=1, kv_heads=1, ffn=16, max_length=16, layers=1, tie_embeddings=False)
    ahead = multi_token_model(config)
    model = ahead.model
    params = jax.tree.map(lambda w: 6.0 * w if w.ndim > 1 else w, jax.jit(model.init)(jax.random.key(1)))
    prompt = [2, 1]
    every = np.array(list(itertools.product(range(4), repeat=3)))
    rows = jnp.asarray(np.concatenate([np.tile(prompt, (64, 1)), every], axis=1))
    logits = jax.jit(lambda p, x: model.apply(p, x)[0] @ model.unembedding(p))(params, rows)[:, 1:-1]
    log_probs = jax.nn.log_softmax(behaviour_logits(logits, sampling))
    want = np.exp(np.take_along_axis(np.asarray(log_probs, np.float64), every[..., None], axis=2)[..., 0].sum(1))
    assert abs(want.sum() - 1) < 1e-5

    n = 6000
    prompts = Prompts(jnp.asarray([prompt]), jnp.asarray([2]))
    options = {"sampling": sampling, "drafter": own_drafter(ahead), "drafts": 2, "samples": n, "eos_id": 99}
    got, drafted = run(speculative_rollout, model, params, prompts, **options)
    assert 0.03 < drafted.acceptance < 0.95
    counts = np.bincount(got.completions @ [16, 4, 1], minlength=64)
    possible = want > 1e-9
    assert counts[~possible].sum() == 0
    often = want * n >= 5
    expected, seen = np.append(want[often], want[~often].sum()) * n, np.append(counts[often], counts[~often].sum())
    expected, seen = expected[expected > 0], seen[expected > 0]
    chi, free = ((seen - expected) ** 2 / expected).sum(), len(expected) - 1
    assert free > 5 and chi < free + 3.7 * np.sqrt(2 * free), (chi, free)


def test_refuses(prompts):
    ahead, params = network("plain")
    model = ahead.model
    options = {"drafter": own_drafter(ahead), "sampling": Sampling(max_tokens=2), "eos_id": EOS, "pad_id": PAD}
    with pytest.raises(ValueError, match="drafts is 0"):
        speculative_rollout(model, params, prompts, jax.random.key(0), drafts=0, **options)
    with pytest.raises(ValueError, match="max_length is 64"):
        run(speculative_rollout, model, params, prompts, **{**options, "sampling": Sampling(max_tokens=60)})


@pytest.mark.slow
def test_drafts_on_a_deterministic_sequence_are_kept():
    """Each symbol follows from the two before it; a trained module says the one after the next as well."""
    ahead = multi_token_model(presets.tiny(5, width=32, heads=2, kv_heads=1, ffn=64, max_length=48))
    table = jax.random.randint(jax.random.key(3), (5, 5), 0, 5)

    def rows(key):
        pairs = jax.random.randint(key, (32, 2), 0, 5)
        step = lambda pair, _: (jnp.stack([pair[:, 1], table[pair[:, 0], pair[:, 1]]], axis=1), pair[:, 0])
        return jax.lax.scan(step, pairs, None, 14)[1].T

    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=5e-3, warmup_steps=20))
    objective = functools.partial(sft.multi_token_loss, ahead=ahead.ahead)
    run_sft = sft.make(sft.SFTConfig(batch=32), ahead.model, optimizer, objective=objective)
    mask = jnp.broadcast_to((jnp.arange(14) >= 2)[None], (32, 14)).astype(jnp.float32)

    def step(state, key):
        state, figures = run_sft.step(state, TokenBatch(rows(key), mask))
        return state, (figures["train/loss"], figures["train/multi_token_loss"])

    state = run_sft.init(jax.random.key(0), ahead.model.init(jax.random.key(1)))
    state, losses = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(2), 300)))(state)
    prompts = Prompts(rows(jax.random.key(9))[:, :4], jnp.full(32, 4))
    options = {"sampling": Sampling(max_tokens=20), "drafter": own_drafter(ahead), "eos_id": -1}
    _, drafted = run(speculative_rollout, ahead.model, state.params, prompts, **options)
    assert drafted.acceptance > 0.85, (drafted, losses[0][-1], losses[1][-1])
    assert drafted.passes <= 14  # of 19 that one token a pass takes
