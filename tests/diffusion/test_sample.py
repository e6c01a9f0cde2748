"""Samplers against loops in numpy, and against distributions that are known exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import diffusion
from jaxrl.diffusion import Unmasking
from jaxrl.kernels.attention import Causal, Chunked, Segments
from jaxrl.posttrain.rollout import Sampling
from jaxrl.types import Finish, Prompts, TokenBatch
from tests.diffusion.stubs import exact, joint, stub, tiny

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MASK, EOS, PAD = 8, 7, 0
PARAMS = jax.jit(tiny.init, compiler_options=QUICK)(jax.random.key(1))
PARAMS["unembed"]["kernel"] = 30.0 * PARAMS["unembed"]["kernel"]  # so that it is sure of something
NO_EOS = {"eos_id": -1, "pad_id": PAD}


def jitted(sampler, model=tiny, **options):
    return jax.jit(partial(sampler, model, **options), compiler_options=QUICK)


def prompts_of(*rows):
    width = max(map(len, rows))
    tokens = np.array([[0] * (width - len(row)) + list(row) for row in rows], np.int32)
    return Prompts(jnp.asarray(tokens), jnp.array([len(row) for row in rows], jnp.int32))


apply = jax.jit(tiny.apply, compiler_options=QUICK)


def logits_by_pass(tokens, mask=None):
    """[T, V] without the mask token, in float64."""
    padded = jnp.asarray([*tokens, *[0] * (16 - len(tokens))])[None]  # one program for all lengths
    own = Segments((jnp.arange(16) < len(tokens)).astype(jnp.int32)[None])
    hidden, _ = apply(PARAMS, padded, mask=own if mask is None else mask & own)
    x = np.asarray(hidden[0, : len(tokens)] @ tiny.unembedding(PARAMS), np.float64)
    x[:, MASK] = -np.inf
    return x


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_loops(prompt, length, block, steps, guidance=0.0, eos=None, late=False):
    """LLaDA's greedy sampler for one prompt."""
    row = np.array([*prompt, *[MASK] * length])
    log_probs = np.zeros(length)
    for start in range(0, length, block):
        inside = range(len(prompt) + start, len(prompt) + start + block)
        n = block
        for step in range(steps):
            own = logits_by_pass(row)
            mixed = own
            if guidance:
                free = logits_by_pass(np.array([MASK] * len(prompt) + list(row[len(prompt) :])))
                with np.errstate(invalid="ignore"):
                    mixed = np.where(np.isinf(own), -np.inf, free + (guidance + 1) * (own - free))
            choice, confidence = mixed.argmax(-1), softmax(mixed).max(-1)
            if late:
                confidence = confidence - (choice == eos)
            count = n // steps + (step < n % steps)
            left = [i for i in inside if row[i] == MASK]
            for i in sorted(left, key=lambda i: -confidence[i])[:count]:
                row[i] = choice[i]
                log_probs[i - len(prompt)] = np.log(softmax(own[i])[choice[i]])
    return row[len(prompt) :], log_probs


@pytest.mark.parametrize(
    "options",
    [
        {"block": 6, "steps": 4},
        {"block": 3, "steps": 2},
        {"block": 2, "steps": 2},
        {"block": 6, "steps": 3, "guidance": 1.5},
    ],
)
def test_greedy_sampling_is_the_published_loop(options):
    """Rows of unequal prompts, each as if it were alone."""
    prompts = [(1, 2, 3), (4,), (5, 6, 0, 2)]
    sampling, unmasking = Sampling(temperature=0.0, max_tokens=6), Unmasking(**options)
    sampler = jitted(diffusion.generate, sampling=sampling, unmasking=unmasking, mask_id=MASK, **NO_EOS)
    found = sampler(PARAMS, prompts_of(*prompts), jax.random.key(0))
    for i, prompt in enumerate(prompts):
        tokens, log_probs = by_loops(prompt, 6, **options)
        np.testing.assert_array_equal(found.completions[i], tokens)
        np.testing.assert_allclose(found.log_probs[i], log_probs, atol=2e-4)
    assert (found.finish == Finish.LENGTH).all() and (found.lengths == 6).all()
    assert not found.behaviour_log_probs.any()  # greedy draws with probability one


def test_late_and_absent_ends():
    prompts = [(1, 2, 3), (4,)]
    first = by_loops(prompts[0], 6, 6, 3)[0]
    eos = int(first[0])  # a token that it likes
    run = lambda rule: jitted(
        diffusion.generate, sampling=Sampling(temperature=0.0, max_tokens=6), mask_id=MASK, eos_id=eos, pad_id=PAD,
        unmasking=Unmasking(steps=3, eos=rule),
    )(PARAMS, prompts_of(*prompts), jax.random.key(0))  # fmt: skip
    free, late, never = run("free"), run("late"), run("never")
    assert free.finish[0] == Finish.EOS and free.lengths[0] == 1
    assert free.tokens[0, 3:].tolist() == [eos, *[PAD] * 5] and not free.log_probs[0, 1:].any()
    assert (never.finish == Finish.LENGTH).all() and not (never.completions == eos).any()
    for i, prompt in enumerate(prompts):
        tokens, _ = by_loops(prompt, 6, 6, 3, eos=eos, late=True)
        length = int(late.lengths[i])
        np.testing.assert_array_equal(late.completions[i, :length], tokens[:length])


def test_finished_rows_stop_the_blocks():
    calls = []

    def logits_of(params, tokens):
        if tokens.shape[1] == 13:
            jax.debug.callback(lambda: calls.append(1))
        return jnp.broadcast_to(jax.nn.one_hot(EOS, 9) * 50.0, (*tokens.shape, 9))

    sampler = jitted(
        diffusion.generate, stub(logits_of), sampling=Sampling(max_tokens=12), unmasking=Unmasking(block=4, steps=2),
        mask_id=MASK, eos_id=EOS, pad_id=PAD,
    )  # fmt: skip
    found = sampler(None, prompts_of((1,), (2,)), jax.random.key(0))
    jax.effects_barrier()
    assert len(calls) == 2 and (found.lengths == 1).all() and found.completions[0].tolist() == [EOS] + [PAD] * 11


def frequencies(tokens, symbols):
    found = np.zeros((symbols,) * tokens.shape[1])
    np.add.at(found, tuple(np.asarray(tokens).T), 1)
    return found / len(tokens)


@pytest.mark.parametrize(
    "unmasking",
    [Unmasking(order="random"), Unmasking(order="random", block=1), Unmasking(order="ancestral", steps=200)],
    ids=["one at a time", "left to right", "many small steps"],
)
def test_samples_of_an_exact_model_follow_its_distribution(unmasking):
    p, rows = joint(0, 3, 3), 20_000
    sampler = jitted(
        diffusion.generate, exact(p), sampling=Sampling(max_tokens=3), unmasking=unmasking, mask_id=3, **NO_EOS,
        samples=rows,
    )  # fmt: skip
    found = sampler(None, prompts_of((1,)), jax.random.key(0))
    # standard error of a cell is below 0.0036
    np.testing.assert_allclose(frequencies(found.completions, 3), p, atol=0.012)
    if unmasking.order == "random":  # one at a time: the path's log-prob is the sequence's
        np.testing.assert_allclose(found.log_probs.sum(1), np.log(p[tuple(found.completions.T)]), atol=1e-4)
        np.testing.assert_allclose(found.behaviour_log_probs, found.log_probs, atol=1e-5)


def test_all_at_once_loses_the_dependence():
    p = np.array([[0.5, 0.0], [0.0, 0.5]])
    sampler = jitted(
        diffusion.generate, exact(p + 1e-9), unmasking=Unmasking(order="random", steps=1),
        sampling=Sampling(max_tokens=2), mask_id=2, **NO_EOS, samples=4000,
    )  # fmt: skip
    np.testing.assert_allclose(
        frequencies(sampler(None, prompts_of((0,)), jax.random.key(0)).completions, 2), 0.25, atol=0.03
    )


def test_infilling_an_exact_model():
    p, rows = joint(2, 3, 4), 20_000
    tokens = jnp.tile(jnp.array([[2, 0, 1, 0]]), (rows, 1))
    open = jnp.tile(jnp.array([[False, True, False, True]]), (rows, 1))
    found = jitted(diffusion.infill, exact(p), mask_id=3, unmasking=Unmasking(order="random"))(
        None, tokens, open, jax.random.key(0)
    )
    assert (found.tokens[:, 0] == 2).all() and (found.tokens[:, 2] == 1).all()
    want = p[2, :, 1, :] / p[2, :, 1, :].sum()
    np.testing.assert_allclose(frequencies(found.tokens[:, 1::2], 3), want, atol=0.015)
    np.testing.assert_allclose(found.log_probs.sum(1), np.log(want[tuple(found.tokens[:, 1::2].T)]), atol=1e-4)
    np.testing.assert_array_equal(found.mask, open)
    assert found.prompt_width == 0 and not found.log_probs[:, 0].any()


def test_infilling_rows_of_unequal_length():
    tokens, open = jnp.array([[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]), jnp.array([[0, 1, 0, 1, 0], [0, 1, 0, 1, 1]]) > 0
    fill = lambda **options: jitted(diffusion.infill, sampling=Sampling(temperature=0.0), mask_id=MASK, **options)
    both = fill()(PARAMS, tokens, open, jax.random.key(0), lengths=jnp.array([5, 3]))
    alone = fill()(PARAMS, tokens[1:, :3], open[1:, :3], jax.random.key(0))
    np.testing.assert_array_equal(both.tokens[1, :3], alone.tokens[0])
    np.testing.assert_allclose(both.log_probs[1, :3], alone.log_probs[0], atol=1e-4)
    assert both.tokens[1, 3:].tolist() == [0, 0] and both.mask.sum() == 3


def test_temperature_and_filters_draw_what_they_say():
    """Tokens of probability 1e-4 come as often as they should: float32 noise does not thin them out."""
    x = np.array([4.0, 3.0, 1.0, -4.4, 0.5, -30.0, 2.0, 0.0, 9.0])
    model, n = stub(lambda params, tokens: jnp.broadcast_to(jnp.float32(x), (*tokens.shape, 9))), 1 << 18
    for sampling in (
        Sampling(max_tokens=64),
        Sampling(temperature=1.7, max_tokens=64),
        Sampling(top_p=0.9, max_tokens=64),
    ):
        logits = x[:8] / sampling.temperature
        want = softmax(logits)
        if sampling.top_p < 1:
            order = np.argsort(-want)
            keep = order[: int((np.cumsum(want[order]) < sampling.top_p).sum()) + 1]
            want = np.where(np.isin(np.arange(8), keep), want, 0.0) / want[keep].sum()
        sampler = jitted(
            diffusion.generate, model, sampling=sampling, unmasking=Unmasking(steps=1), mask_id=MASK, **NO_EOS,
            samples=n // 64,
        )  # fmt: skip
        found = sampler(None, prompts_of((1,)), jax.random.key(0))
        counts = np.bincount(np.asarray(found.completions).ravel(), minlength=9)
        assert counts[MASK] == 0
        assert (np.abs(counts[:8] - n * want) < 5 * np.sqrt(n * want) + 1).all(), (counts, n * want)
        token = np.asarray(found.completions)
        np.testing.assert_allclose(found.log_probs, np.log(softmax(x[:8]))[token], atol=1e-4)
        np.testing.assert_allclose(np.exp(found.behaviour_log_probs), want[token], rtol=1e-4)


def blocks_by_loops(prompt, length, block, steps):
    """Greedy block diffusion without a cache: blocks are counted from the first token of the prompt."""
    row = list(prompt)
    log_probs = {}
    while len(row) < len(prompt) + length:
        first = len(row) // block * block
        window = row[first:] + [MASK] * (first + block - len(row))
        for step in range(steps):
            left = [i for i, token in enumerate(window) if token == MASK]
            own = logits_by_pass([*row[:first], *window], Causal() | Chunked(block))[first:]
            choice, confidence = own.argmax(-1), softmax(own).max(-1)
            for i in sorted(left, key=lambda i: -confidence[i])[: -(-len(left) // (steps - step))]:
                window[i] = int(choice[i])
                log_probs[first + i] = np.log(confidence[i])
        row = row[:first] + window
    own = slice(len(prompt), len(prompt) + length)
    return row[own], [log_probs[i] for i in range(own.start, own.stop)]


@pytest.mark.parametrize("block, steps", [(4, 3), (2, 1), (1, 1), (3, 3)])
def test_blocks_with_a_cache_are_blocks_without(block, steps):
    prompts = [(1, 2, 3), (4,), (5, 6, 0, 2), (5, 6, 0, 2, 1, 1)]
    sampling, unmasking = Sampling(temperature=0.0, max_tokens=7), Unmasking(block=block, steps=steps)
    options = {"sampling": sampling, "unmasking": unmasking, "mask_id": MASK}
    found = jitted(diffusion.generate_in_blocks, **options, **NO_EOS)(PARAMS, prompts_of(*prompts), jax.random.key(0))
    for i, prompt in enumerate(prompts):
        tokens, log_probs = blocks_by_loops(prompt, 7, block, steps)
        np.testing.assert_array_equal(found.completions[i], tokens)
        np.testing.assert_allclose(found.log_probs[i], log_probs, atol=2e-4)
    np.testing.assert_array_equal(found.tokens[:, :6], prompts_of(*prompts).tokens)
    few = jitted(diffusion.generate_in_blocks, **options, eos_id=int(tokens[2]), pad_id=PAD)
    ended = few(PARAMS, prompts_of(*prompts), jax.random.key(0))
    at = tokens.index(tokens[2])
    assert ended.lengths[3] == at + 1 and ended.finish[3] == Finish.EOS
    np.testing.assert_array_equal(ended.completions[3], tokens[: at + 1] + [PAD] * (6 - at))


@pytest.mark.parametrize(
    "unmasking", [Unmasking(block=2, order="random"), Unmasking(block=2, order="ancestral", steps=5)]
)
def test_blocks_sample_what_training_scores(unmasking):
    """One token at a time, a sampled token's log-prob is what the training pass says of it; and runs repeat."""
    options = {"sampling": Sampling(max_tokens=4), "unmasking": unmasking, "mask_id": MASK, **NO_EOS}
    sampler = jitted(diffusion.generate_in_blocks, **options, samples=5)
    found = sampler(PARAMS, prompts_of((1, 2), (3, 4)), jax.random.key(3))
    again = sampler(PARAMS, prompts_of((1, 2), (3, 4)), jax.random.key(3))
    np.testing.assert_array_equal(found.tokens, again.tokens)
    other = sampler(PARAMS, prompts_of((1, 2), (3, 4)), jax.random.key(4))
    assert (found.tokens != other.tokens).any()
    batch = TokenBatch(found.tokens, jnp.ones(found.tokens.shape))
    scores, column = [], jnp.arange(6)[None]
    for masked in (column >= 2, (column >= 2) & (column % 2 == 1), (column >= 2) & (column % 2 == 0)):
        wide = jnp.broadcast_to(masked, found.tokens.shape)
        part = diffusion.masked_by(batch, wide, jnp.ones(wide.shape), mask_id=MASK)
        scores.append(np.asarray(diffusion.log_probs_of(tiny, PARAMS, part, mask_id=MASK, block=2)[0])[:, 2:])
    for row in range(10):
        for start in (0, 2):
            first, second = found.log_probs[row, start], found.log_probs[row, start + 1]
            one_by_one = [
                (scores[0][row, start], scores[1][row, start + 1]),  # the left one first
                (scores[2][row, start], scores[0][row, start + 1]),
                (scores[0][row, start], scores[0][row, start + 1]),  # both at once
            ][: 2 if unmasking.order == "random" else 3]
            assert any(np.allclose((first, second), pair, atol=1e-4) for pair in one_by_one)


def test_prompts_masked_out_of_guidance_do_not_count():
    """A model that ignores its prompt is not moved by guidance."""
    model = stub(lambda params, tokens: jnp.broadcast_to(jnp.arange(9.0), (*tokens.shape, 9)))
    for guidance in (0.0, 3.0):
        found = jitted(
            diffusion.generate, model, sampling=Sampling(max_tokens=2), unmasking=Unmasking(guidance=guidance),
            mask_id=MASK, **NO_EOS, samples=50,
        )(None, prompts_of((1, 2)), jax.random.key(0))  # fmt: skip
        np.testing.assert_allclose(found.behaviour_log_probs, found.log_probs, atol=1e-5)


BAD = {
    "order": (lambda: Unmasking(order="left"), "order is 'left'"),
    "eos": (lambda: Unmasking(eos="soon"), "eos is 'soon'"),
    "steps": (lambda: Unmasking(steps=-1), "expected 0 or more"),
    "block": (lambda: _run(diffusion.generate, Unmasking(block=4)), "block that divides max_tokens"),
    "no block": (lambda: _run(diffusion.generate_in_blocks, Unmasking()), "expected the block of training"),
    "guided blocks": (lambda: _run(diffusion.generate_in_blocks, Unmasking(block=2, guidance=1.0)), "no guidance"),
    "prompts": (lambda: _run(diffusion.generate, Unmasking(), jnp.ones(3, jnp.int32)), "expected \\[N, P\\]"),
    "mask": (lambda: _run(diffusion.generate, Unmasking(), mask_id=9), "mask_id is 9 of 9"),
    "open": (
        lambda: diffusion.infill(
            tiny, PARAMS, jnp.ones((2, 3), int), jnp.ones((2, 2), bool), jax.random.key(0), mask_id=MASK
        ),
        "expected \\[B, T\\] of both",
    ),
}


def _run(sampler, unmasking, tokens=None, mask_id=MASK):
    tokens = jnp.ones((1, 3), jnp.int32) if tokens is None else tokens
    prompts = Prompts(tokens, jnp.array([3], jnp.int32))
    sampling = Sampling(max_tokens=6)
    return sampler(
        tiny, PARAMS, prompts, jax.random.key(0), sampling=sampling, unmasking=unmasking, mask_id=mask_id, **NO_EOS
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
