"""Whole runs of networks that fill in masks: from nothing or from a model, with another order, and what is refused."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import diffusion, pretrained, runs
from jaxrl.posttrain import evaluation, recipes, sft, talk
from jaxrl.posttrain.filling import DiffusionOptions, Filling
from jaxrl.posttrain.grpo import GRPOConfig
from jaxrl.posttrain.preference import DPOConfig
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.sft import SFTConfig
from jaxrl.posttrain.unmasking import Unmasking
from jaxrl.posttrain.update import OptimizerConfig
from jaxrl.types import TokenBatch

SMALL = {
    "model": recipes.ModelConfig(like="llada-8b", width=32, layers=1, heads=2, ffn=64),
    "tokenizer": "char:0123456789=",
    "held_out": 16,
    "chunk": 50,
    "eval_every": 0,
    "save_every": 0,
    "optimizer": OptimizerConfig(learning_rate=1e-2),
}
SFT = recipes.SFTRun(**SMALL, steps=200, max_tokens=2, sft=SFTConfig(batch=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`digits.jsonl`, where the answer to `137=` is its last digit, and `pairs.jsonl`, which prefers it."""
    path = tmp_path_factory.mktemp("runs")
    numbers = range(100, 260)
    rows = [{"prompt": f"{a}=", "completion": str(a % 10), "answer": str(a % 10)} for a in numbers]
    pairs = [{"prompt": f"{a}=", "chosen": str(a % 10), "rejected": str((a + 1) % 10)} for a in numbers]
    for name, records in (("digits", rows), ("pairs", pairs)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def masked(folder):
    return recipes.train_sft(dataclasses.replace(SFT, data=str(folder / "digits.jsonl"), out=str(folder / "masked")))


@pytest.fixture(scope="module")
def blocks(folder):
    given = {"data": str(folder / "digits.jsonl"), "out": str(folder / "blocks")}
    return recipes.train_sft(dataclasses.replace(SFT, **given, diffusion=DiffusionOptions(block=1)))


def test_sft_from_nothing_learns_and_is_opened_again(masked):
    assert masked.summary["accuracy_after"] == 1.0 and masked.summary["accuracy_before"] < 0.5
    model = runs.load_model(masked.folder)
    assert (
        not model.transformer.causal and model.mask_id == 14 and model.block is None
    )  # behind 11 characters and what a tokenizer adds
    speaker = talk.open_run(str(masked.folder), sampling=Sampling(temperature=0.0, max_tokens=2))
    assert speaker.complete("137=")[0].text == "7"
    other = Unmasking(steps=1, order="random")
    assert evaluation.evaluate(str(masked.folder), unmasking=other).figures["accuracy"][0] > 0.9


def test_the_loss_is_that_of_masked_diffusion(model, params):
    """`sft.make` under a filling: masks by its noise, the end of rows learnt, each response by its own length."""
    tokens = jnp.array([[3, 4, 5, 1, 0, 0], [6, 7, 8, 9, 10, 1]])
    batch = TokenBatch(tokens, jnp.array([[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1.0]]))
    known = Filling(12).sft(DiffusionOptions(low=0.4, high=0.6), eos_id=1, packed=False)
    part = known["prepare"](jax.random.key(0), batch)
    np.testing.assert_array_equal(part.batch.tokens[0], [3, 4, 5, 1, 1, 1])
    np.testing.assert_array_equal(part.batch.loss_mask[0], [0, 0, 1, 1, 1, 1])
    weight = np.asarray(part.weight)[np.asarray(part.masked)]
    assert ((1 / 0.6 <= weight) & (weight <= 1 / 0.4)).all()
    (total, count), _ = known["objective"](model, params, part)
    log_probs = diffusion.log_probs_of(model, params, part, mask_id=12)[0]
    want = -(log_probs * part.weight * part.masked).sum(1) / part.batch.loss_mask.sum(1)
    np.testing.assert_allclose([total, count], [want.sum(), 2], rtol=1e-5)


def test_blocks_are_kept_in_the_folder_and_sampled_by(folder, blocks):
    assert blocks.summary["accuracy_after"] == 1.0
    model = runs.load_model(blocks.folder)
    assert model.block == 1
    again = dataclasses.replace(SFT, data=str(folder / "digits.jsonl"), out=str(blocks.folder), steps=210)
    again = dataclasses.replace(again, diffusion=DiffusionOptions(block=1))
    assert recipes.train_sft(again, resume=True).summary["accuracy_after"] == 1.0
    pretrained.save_pretrained(model, folder / "published")
    opened = pretrained.load_pretrained(folder / "published")
    assert (opened.mask_id, opened.block) == (14, 1)
    with pytest.raises(ValueError, match=r"unmasking.block is 2 and the network was trained with blocks of 1"):
        talk.generator(model, Sampling(max_tokens=2), unmasking=Unmasking(block=2))


def test_dpo_compares_under_the_same_masks(folder, masked):
    run = recipes.DPORun(
        **SMALL | {"optimizer": OptimizerConfig(learning_rate=1e-3)},
        steps=10,
        max_tokens=2,
        data=str(folder / "pairs.jsonl"),
        init=str(masked.folder),
        out=str(folder / "dpo"),
        dpo=DPOConfig(batch=16),
    )
    outcome = recipes.train_dpo(dataclasses.replace(run, tokenizer=""))
    rows = map(json.loads, (outcome.folder / runs.METRICS).read_text().splitlines())
    first = next(row for row in rows if "train/loss" in row)
    np.testing.assert_allclose([first["train/loss"], first["rewards/margins"]], [np.log(2), 0], atol=1e-6)
    assert outcome.summary["pair_accuracy_after"] == 1.0
    assert outcome.state.reference is not None  # scored in each step
    assert runs.read_config(outcome.folder)[1]["dpo"]["reference_every"] == 0  # as it was asked for
    with pytest.raises(ValueError, match="packing is for networks that write from left to right"):
        recipes.train_dpo(dataclasses.replace(run, tokenizer="", packing=True, out=str(folder / "no")))


@pytest.mark.parametrize("kind", ["masked", "blocks"])
def test_grpo_samples_by_filling_in(folder, kind, request):
    run = recipes.GRPORun(
        **SMALL | {"tokenizer": ""},
        steps=2,
        data=str(folder / "digits.jsonl"),
        init=str(request.getfixturevalue(kind).folder),
        out=str(folder / f"grpo_{kind}"),
        grpo=GRPOConfig(prompts=4, group=4, sampling=Sampling(max_tokens=2)),
        unmasking=Unmasking(order="random"),
    )
    outcome = recipes.train_grpo(run)
    model = runs.load_model(outcome.folder)
    assert (model.mask_id, model.block) == (14, {"masked": None, "blocks": 1}[kind])
    for changes in ({"segment": 2}, {"tools": "calculator"}):
        with pytest.raises(ValueError, match="fills in masks, whole completions at a time"):
            recipes.train_grpo(dataclasses.replace(run, out=str(folder / "no"), **changes))
    assert not (folder / "no").exists()


def test_what_does_not_go_together_is_refused(folder, masked):
    known = {"data": str(folder / "digits.jsonl"), "tokenizer": "", "out": str(folder / "no")}
    with pytest.raises(ValueError, match="this training is of networks that write from left to right"):
        recipes.train_ppo(recipes.PPORun(init=str(masked.folder), **known))
    plain = partial(dataclasses.replace, SFT, model=recipes.ModelConfig(width=16, layers=1, heads=2, ffn=16))
    with pytest.raises(ValueError, match="diffusion is for networks that fill in masks"):
        recipes.train_sft(plain(**known, diffusion=DiffusionOptions(block=4)))
    with pytest.raises(ValueError, match="unmasking is for networks that fill in masks"):
        recipes.train_sft(plain(**known, unmasking=Unmasking(steps=4)))
    with pytest.raises(ValueError, match=r"low is 0\.5, high 0\.2"):
        DiffusionOptions(low=0.5, high=0.2)
    assert not (folder / "no").exists() and sft.SFTConfig().z_loss == 0
