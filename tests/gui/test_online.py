"""GRPO on episodes: groups begin alike, the update is the one written by hand, and nothing but responses is learnt."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import gui
from jaxrl.envs import gui as env
from jaxrl.gui import episodes, online, screens, sight, window
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.nets.vision_language import SIZES
from jaxrl.posttrain import grpo
from jaxrl.posttrain.rollout import Sampling, completion_log_probs
from jaxrl.types import Finish

SCREEN = env.Screen(buttons=4, targets=2)
WORLD = window.window(SCREEN)
TOKENIZER = window.tokenizer(SCREEN, sight.PLACEHOLDER)
SHOW = screens.mosaic(SCREEN.palette, patch=SCREEN.cell)
CONFIG = presets.tiny(TOKENIZER.vocab_size, width=16, layers=1, heads=2, kv_heads=2, ffn=16)
MODEL = language_model(CONFIG)
KEEP, STEPS, TOKENS = 2, 2, 16
KNOBS: dict[str, Any] = {"width": 112, "keep": KEEP}
RUN = grpo.GRPOConfig(prompts=2, group=3, kl_coef=0.0, scale="none", sampling=Sampling(max_tokens=TOKENS))


def scripted(show):
    """The demonstrator, who slips, as if a network had drawn what it says."""
    says = window.demonstrator(SCREEN, slip=0.5)

    def respond(tasks, pasts, seen, states, key):
        texts = says(tasks, pasts, seen, states, key)
        ids = [np.asarray([*TOKENIZER.encode(text), TOKENIZER.eos_id]) for text in texts]
        asked = zip(tasks, pasts, seen, strict=True)
        prompts = [np.asarray(TOKENIZER.encode(gui.prompt(*one, show=show, keep=KEEP))) for one in asked]
        drawn = [
            episodes.Drawn(before, row, np.zeros(len(row)), np.zeros(len(row)), int(Finish.EOS))
            for before, row in zip(prompts, ids, strict=True)
        ]
        return [episodes.Said(text, how) for text, how in zip(texts, drawn, strict=True)]

    return respond


def group_traces(show=SHOW, seed=0):
    return gui.play(WORLD, scripted(show), jax.random.key(seed), episodes=6, steps=STEPS, alike=3)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def test_groups_begin_alike():
    traces = group_traces()
    firsts = [(trace.task, np.asarray(trace.turns[0].screen).tobytes()) for trace in traces]
    assert firsts[0] == firsts[1] == firsts[2] != firsts[3] == firsts[4] == firsts[5]
    assert 0 < sum(trace.success for trace in traces) < 6
    with pytest.raises(ValueError, match="alike is 4; expected a divisor of the 6 episodes"):
        gui.play(WORLD, scripted(SHOW), jax.random.key(0), episodes=6, steps=1, alike=4)


def test_rows_are_steps_and_only_responses_are_learnt():
    traces = group_traces()
    short = traces[0]._replace(turns=traces[0].turns[:1])
    said, _ = online.rollout_of([short, *traces[1:]], TOKENIZER, steps=STEPS, tokens=TOKENS, show=SHOW, **KNOBS)
    assert said.tokens.shape == (6 * STEPS, 112 + TOKENS) and said.mask[1].sum() == said.lengths[1] == 0
    letters = TOKENIZER.encode(SHOW(traces[0].turns[0].screen))
    for i, trace in enumerate([short, *traces[1:]]):
        for j, turn in enumerate(trace.turns):
            row = i * STEPS + j
            whole = said.tokens[row, 112 - said.prompt_lengths[row] :].tolist()
            before = TOKENIZER.encode(gui.prompt(trace.task, trace.turns[:j], turn.screen, show=SHOW, keep=KEEP))
            answer = [*TOKENIZER.encode(turn.response), TOKENIZER.eos_id]
            assert whole[: len(before) + len(answer)] == before + answer
            assert said.completions[row][said.mask[row] > 0].tolist() == answer
            assert not set(letters) & set(answer) and set(letters) <= set(before)
    with pytest.raises(ValueError, match="a turn does not say how it was drawn"):
        undrawn = short._replace(turns=(short.turns[0]._replace(drawn=None),))
        online.rollout_of([undrawn], TOKENIZER, steps=1, tokens=TOKENS, show=SHOW, **KNOBS)


def test_an_update_is_the_policy_gradient_of_the_responses(params, monkeypatch):
    """Against log-probs of each step alone, advantages by hand: what else is in a row has no gradient."""
    monkeypatch.setattr(online, "make_respond", lambda *_, **__: lambda params: scripted(SHOW))
    run = online.make(RUN, WORLD, MODEL, TOKENIZER, optax.sgd(1.0), show=SHOW, steps=STEPS, max_grad_norm=0.0, **KNOBS)
    state = run.init(jax.random.key(0), params)
    after, metrics = run.step(state)
    key = jax.random.fold_in(jax.random.fold_in(state.key, online.EPISODES), 0)
    traces = gui.play(WORLD, scripted(SHOW), key, episodes=6, steps=STEPS, alike=3)
    success = np.asarray([trace.success for trace in traces], float).reshape(2, 3)
    assert metrics["episode/return"] == success.mean() and 0 < success.mean() < 1
    assert metrics["episode/length"] == np.mean([len(trace.turns) for trace in traces])
    advantages = (success - success.mean(axis=1, keepdims=True)).reshape(-1)

    @jax.jit
    def mean_log_prob(params, tokens, start, end):
        hidden, _ = MODEL.apply(params, tokens[None, :-1])
        logits = jax.nn.log_softmax(hidden[0] @ MODEL.unembedding(params))
        values = jnp.take_along_axis(logits, tokens[1:, None], axis=1)[:, 0]
        at = jnp.arange(1, len(tokens))
        inside = (at >= start) & (at < end)
        return jnp.where(inside, values, 0.0).sum() / (end - start)

    def loss(params):
        values = []
        for advantage, trace in zip(advantages, traces, strict=True):
            for turn in trace.turns:
                row = np.concatenate([turn.drawn.prompt, turn.drawn.tokens])
                padded = jnp.asarray(np.pad(row, (0, 128 - len(row))))
                values.append(advantage * mean_log_prob(params, padded, len(turn.drawn.prompt), len(row)))
        return -sum(values) / len(values)

    wanted = jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), after.params, wanted)
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), after.params, params))) > 1e-3
    assert int(after.drawn) == int(after.step) == 1


def test_what_a_network_drew_is_what_the_trainer_scores(params):
    """Log-probs of the sampler, step by step, are the trainer's; steps that were never taken are empty."""
    sampling = Sampling(max_tokens=TOKENS, temperature=1.2)
    agent = gui.make_respond(MODEL, TOKENIZER, show=SHOW, sampling=sampling, rows=4, record=True, **KNOBS)(params)

    def patient(*asked):
        return [said._replace(text="Action: wait()") for said in agent(*asked)]

    traces = gui.play(WORLD, patient, jax.random.key(1), episodes=4, steps=2, alike=2)
    said, _ = online.rollout_of(traces, TOKENIZER, steps=3, tokens=TOKENS, show=SHOW, **KNOBS)
    assert said.lengths.reshape(4, 3)[:, 2].tolist() == [0] * 4 and (said.lengths.reshape(4, 3)[:, :2] > 0).all()
    log_probs, _ = jax.jit(lambda params, said: completion_log_probs(MODEL, params, said))(params, said)
    np.testing.assert_allclose(log_probs * said.mask, said.log_probs, atol=1e-5)
    heated, _ = jax.jit(lambda params, said: completion_log_probs(MODEL, params, said, temperature=1.2))(params, said)
    np.testing.assert_allclose(heated * said.mask, said.behaviour_log_probs, atol=1e-5)


def test_grpo_from_pixels_takes_one_program(monkeypatch):
    tiny = SIZES["tiny"]
    config = dataclasses.replace(tiny, text=dataclasses.replace(tiny.text, vocab_size=TOKENIZER.vocab_size))
    eye, decoder, traced = gui.Sight(config, length=36), language_model(config.text), []
    params = jax.jit(
        lambda seen: seen.model(config).init(jax.random.key(0)),
    )(sight.sft_batch(eye, group_traces()[:1], TOKENIZER, keep=1))

    def apply(*args, **options):
        traced.append(len(args))
        return decoder.apply(*args, **options)

    monkeypatch.setattr(online, "make_respond", lambda *_, **__: lambda params: scripted(eye.show))
    counted = decoder._replace(apply=apply)
    run = online.make(RUN, WORLD, counted, TOKENIZER, optax.sgd(0.1), show=eye, steps=STEPS, **KNOBS)
    state, calls = run.init(jax.random.key(1), params), []
    for _ in range(2):
        before = state.params
        state, metrics = run.step(state)
        calls.append(len(traced))
        moved = jnp.abs(state.params["vision"]["patches"]["kernel"] - before["vision"]["patches"]["kernel"]).max()
        assert moved > 0 and jnp.isfinite(metrics["train/loss"])
    assert calls[0] == calls[1] > 0


def test_settings_that_choose_problems_are_refused():
    with pytest.raises(ValueError, match="leave them out"):
        config = dataclasses.replace(RUN, dynamic_rounds=2)
        online.make(config, WORLD, MODEL, TOKENIZER, optax.sgd(1.0), show=SHOW, steps=1, **KNOBS)
