"""Recurrent networks: against torch and a loop in numpy, episodes, lengths, truncation, and as a language model."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import loop
from jaxrl.kernels.attention import Causal, Full, Segments, Window
from jaxrl.nets.language_model import logits
from jaxrl.nets.recurrent import (
    CELLS,
    GRU,
    RNN,
    SIZES,
    Recurrent,
    RecurrentConfig,
    RNNConfig,
    recurrent_language_model,
    truncated,
)
from jaxrl.nets.weights import torch_rnn
from jaxrl.nets.weights.maps import from_checkpoint, nested, shapes, to_checkpoint
from jaxrl.posttrain import grpo, sft
from jaxrl.posttrain.rollout import Sampling, completion_log_probs, rollout
from jaxrl.types import Prompts, TokenBatch

GOLDEN = Path(__file__).parents[1] / "golden" / "recurrent.npz"
TORCH = {
    "tanh": RNNConfig("tanh", 5),
    "relu": RNNConfig("relu", 5, layers=3),
    "lstm": RNNConfig("lstm", 5, forget_bias=0.0),
    "gru": RNNConfig("gru", 5, layers=2),
    "lstm_both": RNNConfig("lstm", 5, layers=2, bidirectional=True, forget_bias=0.0),
    "gru_both": RNNConfig("gru", 5, layers=2, bidirectional=True),
}
T, N, D, H = 6, 3, 2, 4


def stored(case):
    with np.load(GOLDEN) as arrays:
        return {k.removeprefix(f"{case}/"): arrays[k] for k in arrays if k.startswith(f"{case}/")}


def parts(arrays, kind):
    return {k.removeprefix(f"{kind}/"): v for k, v in arrays.items() if k.startswith(f"{kind}/")}


def weighed(x):
    return (x.reshape(-1) * jnp.cos(jnp.arange(x.size, dtype=jnp.float32))).sum()


def close(got, want, tolerance=1e-5, **more):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max(), **more)


def streams(seed=0, cell="gru", **config):
    """(net, params, x [T, N, D], starts [T, N]) of a small random network with biases."""
    net = RNN(RNNConfig(cell, H, **config))
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(T, N, D)), jnp.float32)
    params = nested({path: jnp.asarray(rng.normal(0, 0.5, s), jnp.float32) for path, s in shapes(net, x).items()})
    return net, {"params": params}, x, jnp.asarray(rng.random((T, N)) < 0.4)


@pytest.mark.parametrize("case", TORCH)
def test_outputs_and_gradients_equal_those_of_torch(case):
    net, want = RNN(TORCH[case]), stored(case)
    names, ours = torch_rnn.names(TORCH[case]), shapes(net, want["x"])
    params = from_checkpoint(names, ours, parts(want, "weight"))

    def loss(params, x, state):
        y, final = net.apply({"params": params}, x, state, lengths=jnp.asarray(want["lengths"]))
        return weighed(y) + weighed(final), (y, final)

    gradient, (y, final) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, want["x"], want["state"])
    close(y, want["y"])
    close(final, want["final"])
    close(gradient[1], want["dx"])
    close(gradient[2], want["dstate"])
    theirs = to_checkpoint(names, gradient[0])
    assert theirs.keys() == parts(want, "grad").keys()
    for name, array in parts(want, "grad").items():
        close(theirs[name], array, err_msg=name)
    for name, array in to_checkpoint(names, params).items():
        np.testing.assert_array_equal(array, want[f"weight/{name}"])


@pytest.mark.parametrize("size", ["zaremba_medium", "zaremba_large"])
def test_parameters_of_published_sizes(size):
    """Those of torch's LSTM, and two tables of embeddings."""
    config = SIZES[size]
    params = jax.eval_shape(recurrent_language_model(config).init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == stored("COUNT")[size] + 2 * config.vocab_size * config.width


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_unroll_equals_a_loop_with_resets():
    T, N, D, H = 5, 3, 2, 4
    rng = np.random.default_rng(0)
    x, h = rng.normal(size=(T, N, D)), rng.normal(size=(N, H))
    starts = rng.random((T, N)) < 0.4
    gru = GRU(H)
    params = gru.init(jax.random.key(0), jnp.zeros((N, D)), jnp.zeros((N, H)))
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases away from zero
    w = jax.tree.map(np.asarray, params["params"])
    out = gru.apply(params, jnp.asarray(x, jnp.float32), starts, jnp.asarray(h, jnp.float32), method="unroll")
    for t in range(T):
        h = np.where(starts[t][:, None], 0.0, h)
        from_x = x[t] @ w["input"]["kernel"] + w["input"]["bias"]
        from_h = h @ w["memory"]["kernel"] + w["memory"]["bias"]
        r, z = sigmoid(from_x[:, :H] + from_h[:, :H]), sigmoid(from_x[:, H : 2 * H] + from_h[:, H : 2 * H])
        c = np.tanh(from_x[:, 2 * H :] + r * from_h[:, 2 * H :])
        h = (1 - z) * c + z * h
        np.testing.assert_allclose(out[t], h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_through_the_scan_are_those_of_steps(cell):
    net, (_, of_stack, x, starts) = Recurrent(H, cell), streams(cell=cell)
    x, starts, params = x[:3], starts[:3], {"params": of_stack["params"]["first"]["forward"]}
    state = jnp.full((N, CELLS[cell].states * H), 0.3)

    def scanned(params, x, state):
        states = net.apply(params, x, starts, state, method="unroll")
        return weighed(states), states

    def stepped(params, x, state):
        states = []
        for t in range(len(x)):
            state = net.apply(params, x[t], jnp.where(starts[t][:, None], 0.0, state))
            states.append(state)
        return weighed(jnp.stack(states)), jnp.stack(states)

    got, want = (jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(params, x, state) for f in (scanned, stepped))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_both_directions_stay_inside_episodes(cell):
    """A stream of several episodes gives what each of them gives alone."""
    net, params, x, _ = streams(cell=cell, layers=2, bidirectional=True)
    apply = jax.jit(net.apply)
    starts = jnp.zeros((T, N), bool).at[jnp.array([2, 4])].set(True)
    y, final = apply(params, x, jnp.zeros(net.config.state_shape(N)), starts=starts)
    alone = [apply(params, x[start : start + 2]) for start in (0, 2, 4)]
    np.testing.assert_allclose(y, jnp.concatenate([y for y, _ in alone]), atol=1e-6)
    np.testing.assert_allclose(final[:, 0], alone[-1][1][:, 0], atol=1e-6)  # forward, it ends with the last episode
    np.testing.assert_allclose(final[:, 1], alone[0][1][:, 1], atol=1e-6)  # backward, with the first
    assert np.abs(y - apply(params, x)[0]).max() > 1e-2


def test_state_and_episodes_carry_over_between_calls():
    net, params, x, starts = streams(cell="lstm", layers=2)
    apply = jax.jit(net.apply)
    whole, last = apply(params, x, starts=starts)
    first, state = apply(params, x[:3], starts=starts[:3])
    second, again = apply(params, x[3:], state, starts=starts[3:])
    np.testing.assert_allclose(jnp.concatenate([first, second]), whole, atol=1e-6)
    np.testing.assert_allclose(again, last, atol=1e-6)
    nothing, same = apply(params, x[:0], state)
    assert nothing.shape == (0, N, H)
    np.testing.assert_array_equal(same, state)


def test_forget_bias_is_that_part_of_the_bias():
    net, params, x, _ = streams(cell="lstm", forget_bias=1.0)
    plain = RNN(RNNConfig("lstm", H, forget_bias=0.0))
    moved = jax.tree.map(lambda p: p, params)
    bias = moved["params"]["first"]["forward"]["input"]["bias"]
    moved["params"]["first"]["forward"]["input"]["bias"] = bias.at[H : 2 * H].add(1.0)
    np.testing.assert_allclose(net.apply(params, x)[0], plain.apply(moved, x)[0], atol=1e-6)
    with pytest.raises(ValueError, match="forget_bias is 1.0"):
        torch_rnn.names(net.config)


def test_states_are_float32_when_compute_is_not():
    net, params, x, _ = streams(cell="lstm", dtype="bfloat16")
    y, state = net.apply(params, x)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    want = RNN(RNNConfig("lstm", H)).apply(params, x)[1]
    assert np.abs(state - want).max() < 0.03


def test_networks_of_many_seeds_in_one_program():
    net, _, x, _ = streams(layers=2)
    many = jax.jit(jax.vmap(lambda key: net.init(key, x)))(jax.random.split(jax.random.key(0), 3))
    out = jax.jit(jax.vmap(lambda params: net.apply(params, x)[0]))(many)
    assert out.shape == (3, T, N, H) and np.abs(out[0] - out[1]).max() > 1e-3
    kernels = np.asarray(many["params"]["rest"]["forward"]["memory"]["kernel"])[0, 0]
    for block in np.split(kernels, 3, axis=1):  # each gate's own is orthogonal
        np.testing.assert_allclose(block @ block.T, np.eye(H), atol=1e-5)


@pytest.mark.parametrize("chunk", [T, 3, 1])
def test_truncated_gradients(chunk):
    """Values are always those of the whole; the gradient is that of a loop over chunks with constants in between."""
    net, params, x, _ = streams()
    start = jnp.full(net.config.state_shape(N), 0.2)

    def run(state, x):
        y, state = net.apply(params, x, state)
        return state, y

    def last(through, x, state):
        return weighed(through(state, x)[1][-1])

    def by_hand(state, x):
        ys = []
        for t in range(0, T, chunk):
            state, y = run(jax.lax.stop_gradient(state) if t else state, x[t : t + chunk])
            ys.append(y)
        return state, jnp.concatenate(ys)

    ours = partial(truncated, run, chunk=chunk)
    forms = {"full": run, "by hand": by_hand, "ours": lambda state, x: ours(state, x)}
    found = {name: jax.jit(jax.value_and_grad(partial(last, f), (0, 1)))(x, start) for name, f in forms.items()}
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found["ours"], found["by hand"])
    np.testing.assert_allclose(found["ours"][0], found["full"][0], atol=1e-6)
    gradient, whole = np.abs(found["ours"][1][0]).sum((1, 2)), np.abs(found["full"][1][0]).sum((1, 2))
    assert (whole > 0).all()
    np.testing.assert_array_equal(gradient > 0, np.arange(T) >= T - chunk)


def test_truncation_refuses_chunks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"chunk is 4 for arrays of \[6\] steps"):
        truncated(lambda state, x: (state, x), 0.0, jnp.zeros((6, 2)), chunk=4)


BAD = {
    "cell": (lambda: RNNConfig("rnn", 3), "cell is 'rnn', expected one of tanh, relu, lstm, gru"),
    "features": (lambda: RNNConfig("gru", 0), "features is 0"),
    "x": (lambda: RNN(RNNConfig("gru", 3)).init(jax.random.key(0), jnp.zeros((5, 2))), r"\[T, N, D\]"),
    "state": (
        lambda: RNN(RNNConfig("lstm", 3)).init(jax.random.key(0), jnp.zeros((5, 2, 1)), jnp.zeros((1, 1, 2, 3))),
        r"\(1, 1, 2, 6\)",
    ),
    "lengths": (
        lambda: RNN(RNNConfig("gru", 3)).init(jax.random.key(0), jnp.zeros((5, 2, 1)), lengths=jnp.ones(5, int)),
        r"lengths \(5,\)",
    ),
    "window": (lambda: language(mask=Causal() & Window(2)), "cannot follow the mask Window"),
    "full": (lambda: language(mask=Full()), "the mask is Full"),
    "not causal": (lambda: language(mask=Segments(jnp.zeros((1, 3), int))), "the mask is Segments"),
    "tokens": (lambda: language(jnp.zeros(3, int)), r"tokens have shape \(3,\)"),
}


def language(tokens=None, **given):
    model = recurrent_language_model(RecurrentConfig(vocab_size=5, width=3))
    return model.apply(model.init(jax.random.key(0)), jnp.zeros((1, 3), int) if tokens is None else tokens, **given)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_shapes_are_named():
    gru = GRU(4)
    params = gru.init(jax.random.key(0), jnp.zeros((3, 2)), jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"\[T, N, D\]"):
        gru.apply(params, jnp.zeros((5, 3, 2)), jnp.zeros(5, bool), jnp.zeros((3, 4)), method="unroll")


VOCABULARY, EOS, PAD = 13, 1, 0
LANGUAGE = {
    "lstm": RecurrentConfig(vocab_size=VOCABULARY, width=16, layers=2),
    "gru": RecurrentConfig(vocab_size=VOCABULARY, width=16, cell="gru", tie_embeddings=True),
}


@pytest.fixture(scope="module", params=LANGUAGE)
def model(request):
    return recurrent_language_model(LANGUAGE[request.param])


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(3))


@pytest.fixture(scope="module")
def prompts():
    """Four prompts of 1, 2, 4 and 4 tokens, padded on the left."""
    rows = [[5], [6, 7], [2, 3, 4, 5], [9, 8, 7, 6]]
    tokens = np.zeros((4, 4), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[4 - len(ids) :] = ids
    return Prompts(jnp.asarray(tokens), jnp.asarray([len(ids) for ids in rows]))


def test_packed_texts_are_read_as_if_alone(model, params):
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, VOCABULARY, (1, 9)))
    ids = jnp.asarray([[1, 1, 1, 1, 2, 2, 3, 3, 0]])
    packed = jax.jit(model.apply)(params, tokens, mask=Causal() & Segments(ids))[0]
    for start, stop in ((0, 4), (4, 6), (6, 8)):
        alone = model.apply(params, tokens[:, start:stop])[0]
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-6)
    assert np.abs(packed - model.apply(params, tokens)[0])[:, 4:].max() > 1e-2


def test_a_token_is_read_by_those_behind_it_alone(model, params):
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, VOCABULARY, (1, 7)))
    embedding = jax.nn.one_hot(tokens, VOCABULARY)

    def scores(change):
        """Logits, with the embedding of one token moved by way of its own row of the table."""
        own = jnp.arange(7)[None]
        table = (embedding[0] @ params["embed"]["embedding"]) + change
        moved = {**params, "embed": {"embedding": table}, "unembed": {"kernel": jnp.zeros((16, 7))}}
        return other.apply(moved, own)[0][0].sum(-1)

    base = LANGUAGE["lstm" if "unembed" in params else "gru"]
    other = recurrent_language_model(RecurrentConfig(7, base.width, base.layers, base.cell))
    jacobian = np.abs(jax.jit(jax.jacobian(scores))(jnp.zeros((7, 16)))).sum(-1)
    np.testing.assert_array_equal(jacobian > 1e-12, np.tril(np.ones((7, 7), bool)))


def test_sampling_with_a_state_is_scored_alike_by_a_whole_pass(model, params, prompts):
    """Left padding, samples that share a prompt and the advancing state: as one pass over the text says."""
    sampling = Sampling(max_tokens=6, temperature=1.5)

    @jax.jit
    def run(params, key):
        found = rollout(model, params, prompts, key, sampling=sampling, eos_id=EOS, pad_id=PAD, samples=3)
        return found, completion_log_probs(model, params, found)[0]

    found, log_probs = run(params, jax.random.key(0))
    np.testing.assert_allclose(log_probs * found.mask, found.log_probs, atol=1e-5)
    starts = 4 - np.asarray(found.prompt_lengths)
    texts = jnp.asarray([np.roll(row, -start) for row, start in zip(found.tokens, starts, strict=True)])
    hidden = jax.jit(model.apply)(params, texts)[0]
    scores = np.asarray(jax.nn.log_softmax(logits(hidden, model.unembedding(params))))
    for row in range(12):
        ends = int(found.prompt_lengths[row]) + np.arange(int(found.lengths[row]))
        want = scores[row, ends - 1, texts[row, ends]]
        np.testing.assert_allclose(found.log_probs[row, : len(ends)], want, atol=1e-5)
    assert model.init_cache(2, 10).k.shape == model.init_cache(2, 10_000).k.shape


def test_supervised_steps_learn(model, params):
    rng = np.random.default_rng(1)
    tokens = jnp.asarray((rng.integers(2, 13, (16, 1)) + np.arange(8)) % 11 + 2)  # the next id is one more
    segments = jnp.asarray(np.repeat([[1, 2]], 4, axis=1).repeat(16, axis=0))  # packed: two texts a row
    data = TokenBatch(tokens, jnp.ones((16, 8)), segments)
    recipe = sft.make(sft.SFTConfig(batch=8), model, optax.adam(0.03))
    state = recipe.init(jax.random.key(0), jax.tree.map(jnp.copy, params))
    (result,) = loop.run(recipe.step, state, data, steps=30, chunk=30)
    losses = [row["train/loss"] for row in result.metrics]
    assert losses[-1] < 0.3 * losses[0], losses


def test_grpo_steps_learn(model, params, prompts):
    """Reward: the share of even tokens. Sampler and trainer agree while the policy moves."""
    config = grpo.GRPOConfig(prompts=4, group=4, sampling=Sampling(max_tokens=6))
    recipe = grpo.make(config, model, optax.adam(0.01), eos_id=EOS, pad_id=PAD)
    reward = lambda found, _: ((found.completions % 2 == 0) * found.mask).sum(1) / found.lengths
    step = jax.jit(grpo.fused(recipe, reward, config))
    problems = grpo.Problems(prompts, jnp.zeros(4))
    state, rewards = recipe.init(jax.random.key(0), jax.tree.map(jnp.copy, params)), []
    for _ in range(25):
        state, metrics = step(state, problems)
        rewards.append(float(metrics["reward/mean"]))
        assert metrics["sampler/log_prob_gap"] < 1e-5
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2, rewards


def test_slots_refuse_a_cache_without_columns(model, params, prompts):
    config = grpo.GRPOConfig(prompts=4, group=4, slots=8, sampling=Sampling(max_tokens=6))
    recipe = grpo.make(config, model, optax.sgd(0.1), eos_id=EOS, pad_id=PAD)
    with pytest.raises(ValueError, match="decode with rollout"):
        recipe.sample(recipe.init(jax.random.key(0), params), grpo.Problems(prompts, jnp.zeros(4)))
