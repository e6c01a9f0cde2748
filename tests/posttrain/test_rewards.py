"""Exact answers on tokens and on text, and Python rewards from files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.data import arithmetic
from jaxrl.posttrain import rewards
from jaxrl.types import Finish, Rollout

TOKENIZER = arithmetic.tokenizer()
CASES = [  # completion, answer, how it ended, reward
    ("120+12=132", "132", Finish.EOS, 1),
    ("132", "132", Finish.EOS, 1),
    ("120+12=133", "132", Finish.EOS, 0),
    ("120+12=1322", "132", Finish.EOS, 0),
    ("120+12=13", "132", Finish.EOS, 0),
    ("132=120+12", "132", Finish.EOS, 0),
    ("1=132=132", "132", Finish.EOS, 1),
    ("120+12=132=", "132", Finish.EOS, 0),
    ("120+12=132", "132", Finish.LENGTH, 0),
    ("12=32", "32", Finish.STOP, 1),
    ("", "132", Finish.EOS, 0),
]


def make_rollout(completions, finish, width=12):
    tokens = np.full((len(completions), 2 + width), TOKENIZER.pad_id, np.int32)
    lengths = []
    for row, (text, reason) in enumerate(zip(completions, finish, strict=True)):
        ids = TOKENIZER.encode(text) + [TOKENIZER.eos_id] * (reason == Finish.EOS)
        tokens[row, 2 : 2 + len(ids)] = ids
        lengths.append(len(ids))
    zeros = jnp.zeros((len(completions), width))
    two = jnp.full(len(completions), 2)
    return Rollout(jnp.asarray(tokens), two, jnp.asarray(lengths), jnp.asarray(finish), zeros, zeros, prompt_width=2)


def test_exact_answer_on_tokens_and_text():
    texts, answers, finish, expected = zip(*CASES, strict=True)
    padded = np.zeros((len(CASES), 3), np.int32)  # padding is a digit: only lengths may decide
    for row, answer in zip(padded, answers, strict=True):
        row[: len(answer)] = TOKENIZER.encode(answer)
    given = rewards.Answers(jnp.asarray(padded), jnp.asarray([len(a) for a in answers]))
    marker = TOKENIZER.token_id("=")
    on_tokens = jax.jit(lambda rollout: rewards.exact_answer(rollout, given, marker=marker))(
        make_rollout(texts, finish)
    )
    np.testing.assert_array_equal(on_tokens, expected)
    reasons = [Finish(reason).name.lower() for reason in finish]
    on_text = rewards.exact_text(completions=texts, answer=answers, finish_reasons=reasons, marker="=")
    assert on_text == list(expected)


def test_without_a_marker_the_whole_completion_counts():
    texts, finish = ["132", "120+12=132"], [Finish.EOS] * 2
    given = rewards.Answers(jnp.asarray([TOKENIZER.encode("132")] * 2), jnp.full(2, 3))
    np.testing.assert_array_equal(rewards.exact_answer(make_rollout(texts, finish), given), [1, 0])
    assert rewards.exact_text(completions=texts, answer=["132"] * 2, finish_reasons=["eos"] * 2) == [1, 0]


def test_python_reward_sees_what_it_needs(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def graded(*, prompts, completions, completion_ids, lengths, finish_reasons, answer, level):\n"
        "    seen.append((prompts, completions, completion_ids, lengths, finish_reasons, answer, level))\n"
        "    return [1, None, 0.5, 2]\n"
        "seen = []\n"
    )
    reward = rewards.load_reward(f"{file}:graded")
    rollout = make_rollout(["1", "22", "", "3+3"], [Finish.EOS, Finish.LENGTH, Finish.EOS, Finish.STOP])
    columns = {"answer": ["a", "b"], "level": [1, 2]}
    scores = rewards.score(reward, rollout, TOKENIZER, ["p=", "q="], columns, samples=2)
    np.testing.assert_array_equal(scores, np.asarray([1, np.nan, 0.5, 2], np.float32))
    assert reward.__globals__["seen"] == [
        (
            ["p=", "p=", "q=", "q="],
            ["1", "22", "", "3+3"],
            [[1], [2, 2], [], [3, 10, 3]],
            [2, 2, 1, 3],
            ["eos", "length", "eos", "stop"],
            ["a", "a", "b", "b"],
            [1, 1, 2, 2],
        )
    ]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        (3.0, "returned float for 2"),
        (["a", 1], "something that is no number"),
    ],
)
def test_bad_reward_results_are_refused(returned, message):
    rollout = make_rollout(["1", "2"], [Finish.EOS] * 2)
    with pytest.raises(ValueError, match=message):
        rewards.score(lambda **_: returned, rollout, TOKENIZER, ["p", "q"], {}, samples=1)


def test_any_row_of_numbers_is_a_result():
    rollout = make_rollout(["1", "2"], [Finish.EOS] * 2)
    for returned in (jnp.asarray([1.0, 2.0]), np.asarray([1, 2]), (1, 2)):
        scores = rewards.score(lambda returned=returned, **_: returned, rollout, TOKENIZER, ["p", "q"], {}, samples=1)
        np.testing.assert_array_equal(scores, [1, 2])


def test_columns_do_not_hide_what_the_sampler_gives():
    rollout = make_rollout(["1"], [Finish.EOS])
    with pytest.raises(ValueError, match="the data has a column 'lengths', a name that rewards get from the sampler"):
        rewards.score(lambda **_: [1], rollout, TOKENIZER, ["p"], {"lengths": [3]}, samples=1)


def test_bad_reward_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a Python file; expected path/to/rewards.py:function"):
        rewards.load_reward(str(tmp_path / "none.py"))
    (tmp_path / "mine.py").write_text("def score(**_): ...\n")
    with pytest.raises(ValueError, match="no function 'reward' in .*mine.py; found score"):
        rewards.load_reward(str(tmp_path / "mine.py"))
