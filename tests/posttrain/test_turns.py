"""Completions with tools: every row is read again token by token, and its log-probs are those of one forward pass."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import metrics
from jaxrl.data.tokenizer import CharTokenizer
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import grpo, recipes, turns
from jaxrl.posttrain.rollout import Sampling, completion_log_probs, rollout
from jaxrl.posttrain.tools import Tool, tags
from jaxrl.types import Finish, Prompts

TOKENIZER = CharTokenizer("01[=]x")
FORM = tags("[", "=", "", "]")
TWICE = Tool("twice", "says it twice", lambda text: text + text)
BUDGET = 24
SAMPLING = Sampling(max_tokens=BUDGET, temperature=1.3)
TURNS = 3


@pytest.fixture(scope="module")
def model():
    size = TOKENIZER.vocab_size
    return language_model(
        TransformerConfig(vocab_size=size, width=16, layers=1, heads=2, kv_heads=1, ffn=16, max_length=64)
    )


@pytest.fixture(scope="module")
def params(model):
    """Random, with a liking for calls."""
    return jax.jit(model.init)(jax.random.key(1))


@pytest.fixture(scope="module")
def prompts():
    tokens = np.full((4, 3), TOKENIZER.pad_id, np.int32)
    rows = ["0", "1x", "10", "01x"]
    for place, text in zip(tokens, rows, strict=True):
        place[3 - len(text) :] = TOKENIZER.encode(text)
    return Prompts(jnp.asarray(tokens), jnp.asarray([len(text) for text in rows]))


@pytest.fixture(scope="module")
def talk(model):
    return turns.make_talk(model, TOKENIZER, [TWICE], sampling=SAMPLING, form=FORM, turns=TURNS, samples=16)


@pytest.fixture(scope="module")
def said(talk, params, prompts):
    return talk(params, prompts, jax.random.key(5))


def reread(ids, tool):
    """What a row should be, from its tokens alone: (tokens that are given, calls, how it ends)."""
    given, calls, turn, start, i = [], 0, 1, 0, 0
    while i < len(ids):
        given.append(False)
        i += 1
        if ids[i - 1] == TOKENIZER.eos_id:
            return given, calls, Finish.EOS
        if i == BUDGET and ids[i - 1] != TOKENIZER.token_id("="):
            return given, calls, Finish.LENGTH
        if ids[i - 1] != TOKENIZER.token_id("="):
            continue
        text = TOKENIZER.decode(ids[start : i - 1])
        if "[" not in text or turn == TURNS:
            return given, calls, Finish.STOP
        calls += 1
        result = TOKENIZER.encode(tool(text[text.rindex("[") + 1 :]) + "]")
        if i + len(result) >= BUDGET:
            return given, calls, Finish.LENGTH
        assert ids[i : i + len(result)] == result
        given += [True] * len(result)
        i += len(result)
        turn, start = turn + 1, i
    raise AssertionError("a row without an end")


def test_rows_are_what_their_tokens_say(said):
    made, seen = said.rollout, set()
    for i, length in enumerate(np.asarray(made.lengths)):
        ids = np.asarray(made.completions)[i, :length].tolist()
        given, calls, finish = reread(ids, lambda text: text.strip() * 2)
        assert len(given) == length <= BUDGET
        np.testing.assert_array_equal(made.given[i], given + [False] * (BUDGET - length))
        assert (calls, finish) == (said.calls[i], made.finish[i])
        assert (np.asarray(made.completions)[i, length:] == TOKENIZER.pad_id).all()
        seen.add((calls, int(finish)))
    ends = {finish for _, finish in seen}
    assert ends == {Finish.EOS, Finish.LENGTH, Finish.STOP}, seen
    assert {calls for calls, _ in seen} == {0, 1, 2}, seen
    assert said.failures.sum() == 0


def test_log_probs_are_those_of_one_pass(said, model, params):
    made = said.rollout
    for temperature, kept in ((1.0, made.log_probs), (SAMPLING.temperature, made.behaviour_log_probs)):
        once, _ = completion_log_probs(model, params, made, temperature=temperature)
        np.testing.assert_allclose(once * made.mask, kept, atol=3e-5)
    assert (kept != 0).sum() == made.mask.sum() > 0
    assert made.mask.sum() == made.lengths.sum() - made.given.sum()


def test_without_calls_it_is_the_sampler(model, params, prompts):
    """A form that never appears: the very tokens of `rollout`."""
    silent = turns.make_talk(model, TOKENIZER, [TWICE], sampling=SAMPLING, form=tags("xxxxxxxx", "xxxxxxx", "", ""))
    made = silent(params, prompts, jax.random.key(0)).rollout
    plain = jax.jit(partial(rollout, model, sampling=SAMPLING, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id))
    want = plain(params, prompts, jax.random.fold_in(jax.random.key(0), 0))
    np.testing.assert_array_equal(made.tokens, want.tokens)
    np.testing.assert_array_equal(made.finish, want.finish)
    assert not made.given.any()


def test_same_key_same_talk(talk, said, params, prompts):
    again = talk(params, prompts, jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, again.rollout, said.rollout)
    assert (talk(params, prompts, jax.random.key(6)).rollout.tokens != said.rollout.tokens).any()


def test_bad_tools_are_errors_never_crashes(model, params, prompts):
    """A tool that raises, one whose answer the tokeniser cannot write, one that gives too much."""

    def moody(text):
        if text.startswith("0"):
            raise RuntimeError("0")
        return "?" if text.startswith("1") else "x" * 100

    talk = turns.make_talk(
        model, TOKENIZER, [Tool("moody", "", moody)], sampling=SAMPLING, form=FORM, samples=16, limit=50
    )
    said = talk(params, prompts, jax.random.key(5))
    assert said.calls.sum() > 10
    np.testing.assert_array_equal(said.failures, said.calls)
    texts = [TOKENIZER.decode(np.asarray(row)[flag].tolist()) for row, flag in zip(
        said.rollout.completions, np.asarray(said.rollout.given), strict=True)]  # fmt: skip
    assert set("".join(texts)) == {"]"}  # neither "error: ..." nor "error" can be written in this alphabet


def test_a_call_spelled_by_other_tokens_is_found():
    """`=>` may come as one token or two; the sampler stops at one of them only, and the rest is cut."""

    class Joined(CharTokenizer):
        """Character 5 stands for the two letters `=]`."""

        def decode(self, ids):
            return "".join("=]" if i == 5 else super(Joined, self).decode([i]) for i in ids)

    tokenizer, form = Joined(TOKENIZER.alphabet), tags("[", "=]", "", "")
    ids = [2, 0, 5, 1, 1]
    assert turns._first_end(ids, tokenizer, form) == 3 and turns._first_end([2, 0, 3, 4, 1], tokenizer, form) == 4
    assert turns._first_end([2, 0, 3], tokenizer, form) == 3


def test_learning_leaves_given_tokens_out(said, model, params, prompts):
    """The update does not change when the log-probs at given tokens do, and does when others do."""
    config = grpo.GRPOConfig(variant="dapo", prompts=4, group=16, epochs=2, importance_cap=2.0, sampling=SAMPLING)
    recipe = grpo.make(config, model, optax.sgd(0.5), eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id)
    learn, state = jax.jit(recipe.learn), recipe.init(jax.random.key(0), params)
    rewards = jnp.asarray(np.random.default_rng(0).random(64), jnp.float32)
    after, metric = learn(state, said.rollout, rewards)
    blind = jnp.where(said.rollout.given, -50.0, said.rollout.behaviour_log_probs)
    same, _ = learn(state, said.rollout.replace(behaviour_log_probs=blind), rewards)
    jax.tree.map(np.testing.assert_array_equal, same.params, after.params)
    everything = said.rollout.replace(given=jnp.zeros_like(said.rollout.given))
    other, _ = learn(state, everything, rewards)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (other.params, after.params)), strict=True))
    assert metric["sampler/log_prob_gap"] < 0.1


def test_steps_with_tools(model, params, prompts):
    """`grpo.hosted` over turns: counts in the metrics, both cursors move, and a step repeats itself bitwise."""
    config = grpo.GRPOConfig(prompts=2, group=8, kl_coef=0.0, sampling=SAMPLING)
    plain = grpo.make(config, model, optax.sgd(0.5), eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id)
    talk = turns.make_talk(model, TOKENIZER, [TWICE], sampling=SAMPLING, form=FORM, turns=2, samples=8)
    seen = []

    def reward(completions, rows):
        seen.append(np.asarray(rows).tolist())
        return np.asarray(completions.given).sum(axis=1)

    step = grpo.hosted(plain, reward, config, sample=turns.sampler(turns.asking(config), talk))
    problems = grpo.Problems(prompts, None)
    state = plain.init(jax.random.key(0), params)
    again = jax.tree.map(jnp.copy, state)
    first, metric = step(state, problems)
    same, _ = step(again, problems)
    jax.tree.map(np.testing.assert_array_equal, first.params, same.params)
    assert first.step == first.drawn == 1 and metric["tools/calls"] > 0 and metric["tools/errors"] == 0
    assert metric["reward/mean"] > 0 and any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (first.params, params)), strict=True)
    )
    step(first, problems)
    assert seen[0] == seen[1] and sorted(seen[1] + seen[2]) == [0, 1, 2, 3]


TRACES = [f"{a}+{b}" for a in range(10) for b in range(10)]


def test_a_run_with_tools_resumes(tmp_path):
    """`jaxrl train grpo --tools`: a run resumed after two of four steps ends alike."""
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "answer": str(eval(text))}) + "\n" for text in TRACES))
    run = recipes.GRPORun(
        data=str(data),
        tokenizer="char:0123456789+<>/tolresu",
        model=recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=1, ffn=16),
        **{"held_out": 8, "chunk": 2, "eval_every": 2, "save_every": 2, "steps": 4, "out": str(tmp_path / "whole")},
        **{"tools": "calculator", "turns": 2, "reward": "number"},
        grpo=grpo.GRPOConfig(prompts=2, group=2, sampling=Sampling(max_tokens=12)),
    )
    whole = recipes.train_grpo(run)
    shutil.copytree(whole.folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
    half = recipes.train_grpo(dataclasses.replace(run, out=str(tmp_path / "half")), resume=True)
    jax.tree.map(np.testing.assert_array_equal, half.state.params, whole.state.params)
    rows = list(metrics.read(whole.folder / "metrics.jsonl"))
    assert len([row for row in rows if "tools/calls" in row and "tools/errors" in row]) == 4
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turns": 0}, "turns is 0 with 1 tools"),
        ({"tools": []}, "with 0 tools"),
        ({"tools": [TWICE, TWICE._replace(name="thrice")]}, "2 tools and calls without a name"),
        ({"form": tags()}, "cannot write '<tool>', the begin of a call's form"),
    ],
)
def test_bad_talks_are_refused(options, message, model):
    given = {"tools": [TWICE], "form": FORM, **options}
    with pytest.raises(ValueError, match=message):
        turns.make_talk(model, TOKENIZER, given.pop("tools"), sampling=SAMPLING, **given)
