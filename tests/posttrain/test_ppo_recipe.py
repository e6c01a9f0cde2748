"""Whole runs of PPO at toy size: exact answers, a Python reward, a reward model with PPO-ptx, resuming, bad options."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrl import checkpoint, metrics, runs
from jaxrl.data.tokenizer import load_tokenizer
from jaxrl.nets.language_model import language_model
from jaxrl.nets.scalar_model import with_head
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import ppo, recipes
from jaxrl.posttrain.recipes.ppo import PPO_MAX_RUN, PPORun, train_ppo
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.update import OptimizerConfig, init_state, make_optimizer

TOKENIZER = "char:0123456789="
NAMES = {
    "reward/score", "reward/kl", "policy/kl_completion", "policy/approx_kl", "policy/kl_coef", "policy/clip_dual",
    "reference/perplexity", "value/explained_variance", "value/grad_norm", "ptx/loss",
}  # fmt: skip
SIZES = {"prompts": 4, "group": 2, "epochs": 1, "sampling": Sampling(max_tokens=3)}
RUN = PPORun(
    tokenizer=TOKENIZER,
    model=recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=1, ffn=16),
    held_out=8,
    steps=2,
    chunk=1,
    eval_every=0,
    save_every=1,
    ppo=ppo.PPOConfig(**SIZES),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`digits.jsonl`, whose answers are last digits; `texts.jsonl` with completions; `judge`, a reward model's run."""
    path = tmp_path_factory.mktemp("ppo")
    numbers = range(100, 140)
    write = lambda name, rows: (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("digits.jsonl", [{"prompt": f"{a}=", "answer": str(a % 10)} for a in numbers])
    write("texts.jsonl", [{"prompt": f"{a}=", "completion": str(a % 10)} for a in numbers])
    tokenizer = load_tokenizer(TOKENIZER)
    transformer = TransformerConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=1, heads=2, kv_heads=1, ffn=16, max_length=4
    )
    model = language_model(transformer)
    params = with_head(model, jax.jit(model.init)(jax.random.key(2)))
    params["head"]["kernel"] = jax.random.normal(jax.random.key(3), (32,))
    state = init_state(params, make_optimizer(OptimizerConfig()), jax.random.key(0))
    (path / "judge").mkdir()
    runs.write_model(path / "judge", transformer, tokenizer, marker="", max_tokens=1, example="")
    checkpoint.save(path / "judge" / runs.CHECKPOINTS, 0, state, keep=1)
    return path


def test_exact_answers_and_a_python_reward_are_the_same_run(folder, tmp_path):
    """And the folder holds a model that opens as any other; every metric has an agreed name."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def same(*, completions, answer, finish_reasons, **_):\n"
        "    right = lambda text, expected, why: why == 'eos' and text == expected\n"
        "    return [float(right(*row)) for row in zip(completions, answer, finish_reasons, strict=True)]\n"
    )
    base = dataclasses.replace(RUN, data=str(folder / "digits.jsonl"))
    exact = train_ppo(dataclasses.replace(base, out=str(tmp_path / "exact")))
    python = train_ppo(dataclasses.replace(base, out=str(tmp_path / "python"), reward=f"{reward}:same"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), exact.state.params, python.state.params)
    rows = list(metrics.read(exact.folder / runs.METRICS))
    assert set().union(*rows) - {"step"} <= metrics.GLOSSARY.keys() | NAMES
    assert "accuracy_after" in exact.summary and "reward_after" in python.summary
    model = runs.load_model(exact.folder)
    jax.tree.map(np.testing.assert_array_equal, model.params, exact.state.params)


def test_reward_model_gives_reward_and_critic_and_resumes(folder, tmp_path):
    """PPO-max with a larger reward model and PPO-ptx: two iterations and one more are three, bitwise."""
    best = dataclasses.replace(PPO_MAX_RUN.ppo, **SIZES, critic_warmup=1, ptx_coef=1.0, ptx_batch=4)
    run = dataclasses.replace(
        RUN, data=str(folder / "digits.jsonl"), reward_model=str(folder / "judge"), ppo=best,
        pretraining=str(folder / "texts.jsonl"), critic_optimizer=OptimizerConfig(learning_rate=0.0),
    )  # fmt: skip
    whole = train_ppo(dataclasses.replace(run, out=str(tmp_path / "whole"), steps=3))
    part = dataclasses.replace(run, out=str(tmp_path / "part"))
    train_ppo(part)
    resumed = train_ppo(dataclasses.replace(part, steps=3), resume=True)
    numbers = lambda state: [state.params, state.opt_state, state.critic.params, state.scores, state.skipped]
    jax.tree.map(np.testing.assert_array_equal, numbers(resumed.state), numbers(whole.state))
    with pytest.raises(ValueError, match="holds a reward model, which writes no text"):
        runs.load_model(folder / "judge")
    judge = runs.load_model(folder / "judge", rewards=True).params
    jax.tree.map(np.testing.assert_array_equal, whole.state.critic.params, judge)  # its learning rate is 0
    rows = [row for row in metrics.read(whole.folder / runs.METRICS) if "reward/mean" in row]
    assert len(rows) == 3 and all(row["ptx/loss"] > 0 for row in rows)
    assert "reward_after" in whole.summary and whole.state.scores.count == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "a.py:f", "reward_model": "judge"}, "both --reward a.py:f and --reward-model judge are given"),
        ({"pretraining": "texts.jsonl"}, "pretraining is 'texts.jsonl' and ppo.ptx_coef 0.0; PPO-ptx needs both"),
        ({"ppo": ppo.PPOConfig(prompts=64)}, "a step takes 64 prompts and .* leaves 32 for training"),
        ({"reward_model": "nowhere"}, "nowhere holds no model"),
        ({"reward_model": "JUDGE", "tokenizer": "byte"}, "has another tokenizer than the policy"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes, message, folder, tmp_path):
    changes = {name: str(folder / "judge") if value == "JUDGE" else value for name, value in changes.items()}
    run = dataclasses.replace(RUN, data=str(folder / "digits.jsonl"), out=str(tmp_path / "run"), **changes)
    with pytest.raises(ValueError, match=message):
        train_ppo(run)
    assert not (tmp_path / "run").exists()
