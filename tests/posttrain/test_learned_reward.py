"""A reward model as a Python reward: the very scores of `score_rollout`, and beside rules in R1's last stage."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import checkpoint, metrics, runs
from jaxrl.data.tokenizer import CharTokenizer
from jaxrl.nets.language_model import language_model
from jaxrl.nets.scalar_model import with_head
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import learned_reward, reward_model, rewards, task
from jaxrl.posttrain.learned_reward import where_answered
from jaxrl.posttrain.recipes import r1
from jaxrl.types import Finish, Rollout

TOKENIZER = CharTokenizer("0123456789=:a")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, width=16, layers=1, heads=2, kv_heads=1, ffn=16, max_length=8
)


def write(folder, params):
    """A run folder with these parameters, as a finished run leaves it."""
    folder.mkdir()
    runs.write_model(folder, CONFIG, TOKENIZER, marker="=", max_tokens=4, example="1:")
    checkpoint.save(folder / runs.CHECKPOINTS, 1, {"params": params})
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`judge`, a reward model with a random head, and `policy`, a language model."""
    path, model = tmp_path_factory.mktemp("learned"), language_model(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    head = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), with_head(model, params)["head"])
    write(path / "judge", {"model": params, "head": head})
    write(path / "policy", params)
    return path


PROMPTS = ["12:", "7:", "345:"]
TEXTS = ["a=3", "", "99999"]  # with EOS, only an EOS, cut off
REASONS = [Finish.EOS, Finish.EOS, Finish.LENGTH]


def given(texts=TEXTS):
    """What a sampler hands to a reward."""
    ids = [TOKENIZER.encode(text) for text in texts]
    reasons = [reason.name.lower() for reason in REASONS]
    lengths = [len(row) + (reason == Finish.EOS) for row, reason in zip(ids, REASONS, strict=True)]
    inputs = {"prompts": PROMPTS, "completions": texts, "completion_ids": ids, "finish_reasons": reasons}
    return inputs | {"lengths": lengths}


def test_scores_are_those_of_the_rollout(folder):
    reward = learned_reward.learned_reward(str(folder / "judge"))
    scores = reward(**given())
    prompts = task.prompts_of([{"prompt": prompt} for prompt in PROMPTS], TOKENIZER)
    rows = np.full((3, 5), TOKENIZER.pad_id, np.int32)
    for row, ids, reason in zip(rows, given()["completion_ids"], REASONS, strict=True):
        row[: len(ids)] = ids
        if reason == Finish.EOS:
            row[len(ids)] = TOKENIZER.eos_id
    zeros = jnp.zeros(rows.shape)
    rollout = Rollout(
        jnp.concatenate([prompts.tokens, rows], axis=1), prompts.lengths, jnp.asarray(given()["lengths"]),
        jnp.asarray(REASONS), zeros, zeros, prompts.tokens.shape[1],
    )  # fmt: skip
    opened = reward_model.load(folder / "judge")
    wide = language_model(dataclasses.replace(CONFIG, max_length=16))
    np.testing.assert_allclose(scores, reward_model.score_rollout(wide, opened.params, rollout), atol=1e-5)
    assert np.ptp(scores) > 0.1
    alone = [reward(**{name: column[i : i + 1] for name, column in given().items()})[0] for i in range(3)]
    np.testing.assert_allclose(alone, scores, atol=1e-5)
    assert reward(**{name: [] for name in given()}) == []


def test_another_tokenizer_and_another_model_are_refused(folder):
    reward = learned_reward.learned_reward(str(folder / "judge"))
    with pytest.raises(ValueError, match="has another tokenizer than the policy: it reads 'b=3' as 'a=3'"):
        reward(**{**given(), "completions": ["b=3", *TEXTS[1:]]})
    with pytest.raises(ValueError, match="holds a language model, which gives no rewards"):
        learned_reward.learned_reward(str(folder / "policy"))


def test_rules_judge_where_there_is_an_answer(folder):
    model = learned_reward.learned_reward(str(folder / "judge"))
    reward = where_answered(rewards.load_reward("exact(marker='=') + 0.5*format(pattern='...=...')"), model)
    plain = model(**given())
    mixed = reward(**given(), answer=["3", None, None])
    np.testing.assert_allclose(mixed, [1.5, *plain[1:]], rtol=1e-6)
    assert mixed.metrics["rewards/rules/missing"] == pytest.approx(2 / 3)
    assert mixed.metrics["rewards/otherwise/mean"] == pytest.approx(np.mean(plain[1:]))
    assert mixed.metrics["rewards/exact/mean"] == 1
    for answers in ({"answer": ["3", "4", "5"]}, {}):  # the same metrics in each step, whatever was drawn
        values = reward(**given(), **answers)
        assert values.metrics.keys() == mixed.metrics.keys()
        assert math.isnan(values.metrics["rewards/otherwise/mean"]) == bool(answers)
        np.testing.assert_allclose(values, [1.5, 0.0, 0.0] if answers else plain, rtol=1e-6)


def test_r1s_last_stage(folder, tmp_path):
    """Both kinds of problems in one run."""
    for name, rows in (
        ("training", [{"prompt": f"{a}:", "answer": str(a % 10)} for a in range(100, 200)]),
        ("general", [{"prompt": f"{a}:"} for a in range(10, 99)]),
    ):
        r1.write_lines(tmp_path / "run" / "data" / f"{name}.jsonl", rows)
    r1.write_lines(tmp_path / "run" / "data" / "held_out.jsonl", [{"prompt": "1:", "answer": "1"}] * 4)
    (tmp_path / "run" / "sft2").mkdir()
    for part in (folder / "policy").iterdir():
        (tmp_path / "run" / "sft2" / part.name).symlink_to(part)
    (tmp_path / "run" / "sft2" / runs.SUMMARY).write_text(json.dumps({"steps": 1}))
    run = r1.R1Run(
        out=str(tmp_path / "run"), init=str(folder / "policy"), stages="all", held_out=4, chunk=1, save_every=1,
        all_data=str(tmp_path / "run" / "data" / "general.jsonl"), all_reward_model=str(folder / "judge"),
        data=str(tmp_path / "run" / "data" / "training.jsonl"), steps=r1.Steps(all=2),
        grpo=r1.GRPOConfig(prompts=8, group=2, sampling=r1.Sampling(max_tokens=3)),
    )  # fmt: skip
    runs.write_config(tmp_path / "run", "r1", run)
    done = r1.train_r1(run, resume=True)
    rows = [row for row in metrics.read(done.folder / "all" / "metrics.jsonl") if "train/loss" in row]
    assert len(rows) == 2
    assert all(0 < row["rewards/rules/missing"] < 1 for row in rows)
    for row in rows:
        assert row["rewards/rules/missing"] + row["rewards/otherwise/missing"] == pytest.approx(1)
        assert {"rewards/exact/mean", "rewards/language/mean"} <= row.keys()
    saved = rewards.load_reward(runs.read_config(done.folder / "all")[1]["reward"])
    np.testing.assert_allclose(saved(**given()), learned_reward.learned_reward(str(folder / "judge"))(**given()))
    with pytest.raises(ValueError, match="holds a language model, which gives no rewards"):
        bad = dataclasses.replace(run, out=str(tmp_path / "bad"), all_reward_model=str(folder / "policy"))
        r1.train_r1(dataclasses.replace(bad, stages="zero"))
    assert not (tmp_path / "bad").exists()
