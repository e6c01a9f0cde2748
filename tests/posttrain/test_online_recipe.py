"""Whole runs of online DPO at toy size: every source of preferences, the folder, what comes next, and early errors."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrl import metrics, runs
from jaxrl.posttrain import online, recipes
from jaxrl.posttrain.recipes.online import OnlineRun, train_online
from jaxrl.posttrain.reward_model import RMConfig
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.update import OptimizerConfig

SMALL = {
    "tokenizer": "char:0123456789=",
    "model": recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=1, ffn=16),
    "held_out": 8,
    "chunk": 2,
    "eval_every": 0,
    "save_every": 0,
}
RUN = OnlineRun(
    **SMALL,
    steps=2,
    optimizer=OptimizerConfig(learning_rate=1e-2),
    online=online.OnlineConfig(prompts=8, group=4, sampling=Sampling(max_tokens=3)),
)
SOURCES = """
def ones(*, completions, **_):
    return [float(text.count("1")) for text in completions]

def same(prompts, completions):
    return [[float(text.count("1")) for text in texts] for texts in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("online")
    rows = [{"prompt": f"{a}=", "answer": str(a % 10)} for a in range(100, 140)]
    (path / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "asked.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    (path / "sources.py").write_text(SOURCES)
    return path


def train(folder, out, data="digits", **changes):
    return train_online(dataclasses.replace(RUN, data=str(folder / f"{data}.jsonl"), out=str(folder / out), **changes))


def rows_of(outcome, name="train/loss"):
    return [row for row in metrics.read(outcome.folder / "metrics.jsonl") if name in row]


def test_a_run_on_exact_answers(folder):
    outcome = train(folder, "exact", steps=4)
    rows = rows_of(outcome)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    named = set().union(*metrics.read(outcome.folder / "metrics.jsonl")) - {"step"}
    assert {"judge/decided", "rewards/margins", "reward/mean"} <= named <= metrics.GLOSSARY.keys()
    assert {"accuracy_before", "accuracy_after"} <= outcome.summary.keys()
    assert runs.read_config(outcome.folder)[0] == "online-dpo"
    steps = runs.next_steps(outcome.folder)
    assert f"jaxrl eval {outcome.folder}\n" in steps
    assert f"jaxrl train online-dpo --resume {outcome.folder} --steps 8" in steps


def test_a_judge_and_a_reward_that_agree_make_the_same_run(folder):
    """More of a digit is better: the reward is a mean in the evaluation, the judge has none without answers."""
    reward = train(folder, "reward", data="asked", reward=f"{folder / 'sources.py'}:ones", steps=8)
    judged = train(folder, "judged", data="asked", judge=f"{folder / 'sources.py'}:same", steps=8)
    jax.tree.map(np.testing.assert_array_equal, reward.state.params, judged.state.params)
    rows = rows_of(reward)
    assert rows[-1]["reward/mean"] > 2 * rows[0]["reward/mean"] and rows[0]["judge/decided"] > 0
    assert "reward_after" in reward.summary
    assert not [name for name in judged.summary if name.endswith("_after")]
    assert f"--reward {folder / 'sources.py'}:ones" in runs.next_steps(reward.folder)
    assert f"jaxrl eval {judged.folder} --data problems.jsonl" in runs.next_steps(judged.folder)


def test_a_reward_model_orders_the_completions(folder):
    pairs = [{"prompt": f"{a}=", "chosen": "11", "rejected": "2"} for a in range(100, 140)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    scorer = recipes.train_rm(
        recipes.RMRun(**SMALL, data=str(folder / "pairs.jsonl"), out=str(folder / "rm"), steps=8,
                      optimizer=OptimizerConfig(learning_rate=1e-2), rm=RMConfig(batch=16))
    )  # fmt: skip
    outcome = train(folder, "model", reward_model=str(scorer.folder))
    assert np.isfinite(outcome.summary["reward_after"]) and rows_of(outcome)[0]["judge/decided"] == 1
    steps = runs.next_steps(scorer.folder)
    assert f"jaxrl train ppo-rlhf --reward-model {scorer.folder} --init MODEL" in steps and "jaxrl chat" not in steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "number", "judge": "x.py:f"}, "reward and judge are given; expected one source of preferences"),
        ({"judge": "number"}, "is no function of .prompts, completions. but a reward; give it as --reward"),
        ({"judge": "no.py:f"}, "'no.py' is not a Python file"),
        ({"data": "asked"}, "no column 'answer'"),
        ({"online": online.OnlineConfig(prompts=64)}, "a step takes 64 prompts and .* leaves 32 for training"),
        ({"reward_model": "nowhere"}, "nowhere holds no model"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes, message, folder):
    with pytest.raises(ValueError, match=message):
        train(folder, "refused", **changes)
    assert not (folder / "refused").exists()
