"""Whole runs of DPO, KTO and reward models at toy size: folders, learning, resuming, meshes, and early errors."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxrl import checkpoint, metrics, runs
from jaxrl.data import preferences
from jaxrl.data.tokenizer import load_tokenizer
from jaxrl.posttrain import preference, recipes, reward_model, task
from jaxrl.posttrain.kto import KTOConfig
from jaxrl.posttrain.preference import DPOConfig
from jaxrl.posttrain.recipes import common
from jaxrl.posttrain.recipes.preference import DPORun, KTORun, train_dpo, train_kto
from jaxrl.posttrain.recipes.reward_model import RMRun, encode_steps, train_rm
from jaxrl.posttrain.reward_model import RMConfig
from jaxrl.posttrain.sft import SFTConfig
from jaxrl.posttrain.update import OptimizerConfig

DIGITS = "char:0123456789=+"
MODEL = recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=1, ffn=16)
SMALL = {"model": MODEL, "held_out": 16, "steps": 6, "chunk": 2, "eval_every": 0, "save_every": 2, "keep": 5}
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
DPO = DPORun(**SMALL, max_tokens=4, optimizer=OPTIMIZER, dpo=DPOConfig(batch=16))
KTO = KTORun(**SMALL, max_tokens=4, optimizer=OPTIMIZER, kto=KTOConfig(batch=16))
REWARD = RMRun(**SMALL, optimizer=OPTIMIZER, rm=RMConfig(batch=16))


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """After `137=` a 1 is better than a 2; longer answers than one digit exist on both sides."""
    path = tmp_path_factory.mktemp("runs")
    prompts = [f"{a}=" for a in range(100, 220)]
    tail = lambda i: "37"[: i % 3]
    write_lines(
        path / "pairs.jsonl",
        [{"prompt": p, "chosen": "1" + tail(i), "rejected": "2" + tail(i + 1)} for i, p in enumerate(prompts)],
    )
    write_lines(
        path / "labels.jsonl",
        [{"prompt": p, "completion": "12"[i % 2] + tail(i), "label": i % 2 == 0} for i, p in enumerate(prompts)],
    )
    write_lines(
        path / "steps.jsonl",
        [
            {"prompt": p, "completions": [str(i % 2), str(i // 2 % 2)], "labels": [i % 2 == 1, i // 2 % 2 == 1]}
            for i, p in enumerate(prompts)
        ],
    )
    examples = [{"prompt": p, "completion": str(i % 10), "answer": str(i % 10)} for i, p in enumerate(prompts)]
    write_lines(path / "examples.jsonl", examples)
    return path


@pytest.fixture(scope="module")
def warm(folder):
    """A model that answers with digits, to start from."""
    run = recipes.SFTRun(
        **SMALL, data=str(folder / "examples.jsonl"), tokenizer=DIGITS, out=str(folder / "warm"),
        max_tokens=4, sft=SFTConfig(batch=16), optimizer=OPTIMIZER,
    )  # fmt: skip
    return str(recipes.train_sft(run).folder)


@pytest.fixture(scope="module")
def dpo(folder, warm):
    return train_dpo(dataclasses.replace(DPO, data=str(folder / "pairs.jsonl"), init=warm, out=str(folder / "dpo")))


@pytest.fixture(scope="module")
def kto(folder, warm):
    return train_kto(dataclasses.replace(KTO, data=str(folder / "labels.jsonl"), init=warm, out=str(folder / "kto")))


def test_packed_pairs_train_as_pairs_of_their_own(folder, warm, tmp_path):
    """Two steps on all pairs, packed or not; the packed run resumes between them, with its reference from the file."""
    config = DPOConfig(mixture={"dpo": 1.0, "simpo": 0.5, "nll": 0.2}, batch=104)
    whole = dataclasses.replace(
        DPO, data=str(folder / "pairs.jsonl"), init=warm, out=str(tmp_path / "whole"), dpo=config, steps=2, chunk=1,
        save_every=1,
    )  # fmt: skip
    setup = common.prepare(whole, columns=("chosen", "rejected"), max_tokens=4)
    packed = preferences.pack_pairs(task.pairs_of(setup.task.training, setup.task.tokenizer), 24)
    chosen, rejected = (np.asarray(side.segments) for side in (packed.chosen, packed.rejected))
    assert chosen.shape == rejected.shape and chosen.shape[1] == 24 and len(chosen) < 104 / 2
    np.testing.assert_array_equal(chosen.max(axis=1), rejected.max(axis=1))  # as many of each in a row
    assert chosen.max(axis=1).sum() == 104
    for row in range(len(chosen)):
        for number in range(1, chosen[row].max() + 1):
            one, other = (
                np.asarray(side.tokens)[row][ids[row] == number].tolist()
                for side, ids in zip((packed.chosen, packed.rejected), (chosen, rejected), strict=True)
            )
            assert one[:4] == other[:4] and one[4] != other[4]  # of one prompt

    rows = dataclasses.replace(
        whole, out=str(tmp_path / "packed"), packing=True, width=24, dpo=dataclasses.replace(config, batch=len(chosen))
    )
    with pytest.raises(ValueError, match="a step takes 104 packed rows and .* leaves .. for training"):
        train_dpo(dataclasses.replace(rows, dpo=config))
    one = train_dpo(whole)
    train_dpo(dataclasses.replace(rows, steps=1))
    other = train_dpo(rows, resume=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other.state.params, one.state.params)
    tables = [[r for r in metrics.read(run.folder / "metrics.jsonl") if "train/loss" in r] for run in (one, other)]
    for left, right in zip(*tables, strict=True):
        names = [name for name in left if not name.startswith(("time/", "throughput/tokens_per"))]
        for name in names if left["step"] > 1 else set(names) - {"rewards/accuracies"}:  # all margins are 0 first
            np.testing.assert_allclose(right[name], left[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert abs(tables[0][1]["rewards/margins"]) > 1e-3
    assert other.summary["pair_accuracy_after"] == one.summary["pair_accuracy_after"]


def test_options_of_packing_that_are_refused():
    with pytest.raises(ValueError, match="width is 8, that of packed rows; add --packing"):
        DPORun(width=8)
    with pytest.raises(ValueError, match="which a sorted pairing cannot take"):
        DPORun(packing=True, dpo=DPOConfig(pairing="sorted_margins"))


@pytest.fixture(scope="module")
def reward(folder, warm):
    run = dataclasses.replace(REWARD, data=str(folder / "pairs.jsonl"), init=warm, out=str(folder / "rm"))
    return train_rm(run)


@pytest.mark.parametrize("kind", ["dpo", "kto", "reward"])
def test_runs_learn_and_leave_a_folder(kind, request):
    outcome = request.getfixturevalue(kind)
    files = {path.name for path in outcome.folder.iterdir()}
    own = {"reliability.json", "reliability.png"} if kind == "reward" else {"reference.npz"}
    assert {"config.json", "model.json", "metrics.jsonl", "summary.json", "checkpoints"} | own <= files
    before, after = (outcome.summary[f"pair_accuracy_{when}"] for when in ("before", "after"))
    assert after >= 0.9 and before == pytest.approx(0.5), outcome.summary  # at the reference all rewards are equal
    rows = [row for row in metrics.read(outcome.folder / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert rows[-1]["rewards/margins"] > 0 and rows[-1]["throughput/tokens"] > 0
    assert runs.read_config(outcome.folder)[0] == {"reward": "rm"}.get(kind, kind)


@pytest.mark.parametrize("kind", ["dpo", "kto", "reward"])
def test_a_resumed_run_ends_bitwise_where_the_whole_one_ends(kind, request, warm, tmp_path):
    """Stopped after four steps, and resumed when the model it began with has been trained on: the reference is the
    one in the run folder."""
    whole = request.getfixturevalue(kind)
    train, run = {"dpo": (train_dpo, DPO), "kto": (train_kto, KTO), "reward": (train_rm, REWARD)}[kind]
    start = tmp_path / "start"
    shutil.copytree(warm, start)
    data = runs.read_config(whole.folder)[1]["data"]
    run = dataclasses.replace(run, data=data, init=str(start), out=str(tmp_path / "part"))
    train(dataclasses.replace(run, steps=4))
    state, step = checkpoint.restore(start / "checkpoints")
    state["params"] = jax.tree.map(lambda x: 1.1 * x, state["params"])
    checkpoint.save(start / "checkpoints", step + 1, state)
    again = train(run, resume=True)
    jax.tree.map(np.testing.assert_array_equal, again.state.params, whole.state.params)
    assert again.summary["pair_accuracy_after"] == whole.summary["pair_accuracy_after"]


def test_the_reference_is_that_of_the_first_model(folder, dpo, warm):
    """The numbers in the folder are what the model of `init` says of the training pairs."""
    model = runs.load_model(warm)
    records = task.load_task(str(folder / "pairs.jsonl"), tokenizer=model.tokenizer, marker="", held_out=16,
                             columns=("chosen", "rejected")).training  # fmt: skip
    pairs = task.pairs_of(records[:8], model.tokenizer)
    sums, *_ = preference.responses(model.language_model, model.params, preference.interleave(pairs))
    with np.load(dpo.folder / "reference.npz") as stored:
        assert set(stored.files) == {f"{a}_{b}" for a in ("training", "held_out") for b in ("chosen", "rejected")}
        assert stored["training_chosen"].shape == (len(records),)
        np.testing.assert_allclose(stored["training_chosen"][:8], sums[::2], rtol=1e-5)
        np.testing.assert_allclose(stored["training_rejected"][:8], sums[1::2], rtol=1e-5)


def test_a_mesh_gives_the_same_run(folder, warm, dpo, tmp_path):
    run = dataclasses.replace(DPO, data=str(folder / "pairs.jsonl"), init=warm, out=str(tmp_path / "mesh"))
    spread = train_dpo(dataclasses.replace(run, mesh="data=2,fsdp=4"))
    compare = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3)  # Adam's steps, where gradients are near 0
    jax.tree.map(compare, jax.device_get(spread.state.params), jax.device_get(dpo.state.params))
    losses = [
        [row["train/loss"] for row in metrics.read(outcome.folder / "metrics.jsonl") if "train/loss" in row]
        for outcome in (spread, dpo)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_family_member_without_reference_stores_none(folder, warm, tmp_path):
    run = dataclasses.replace(DPO, data=str(folder / "pairs.jsonl"), init=warm, out=str(tmp_path / "simpo"), steps=2)
    outcome = train_dpo(dataclasses.replace(run, dpo=DPOConfig(variant="simpo", batch=16)))
    assert not (outcome.folder / "reference.npz").exists()


def test_a_reward_model_opens_again(reward, warm, folder):
    """Its scores order the pairs; a language model's folder is refused, and the calibration is written down."""
    opened = reward_model.load(reward.folder)
    pairs = task.pairs_of([{"prompt": "7=", "chosen": "1", "rejected": "23"}], opened.tokenizer)
    chosen, rejected = (
        reward_model.score(opened.language_model, opened.params, side) for side in (pairs.chosen, pairs.rejected)
    )
    assert chosen[0] > rejected[0]
    jax.tree.map(np.testing.assert_array_equal, opened.params, jax.device_get(reward.state.params))
    with pytest.raises(ValueError, match="holds a language model, which gives no rewards"):
        reward_model.load(warm)
    table = json.loads((reward.folder / "reliability.json").read_text())
    assert sum(row["count"] for row in table["table"]) == 16
    assert table["accuracy"] == reward.summary["pair_accuracy_after"]
    assert table["error"] == reward.summary["calibration_error"]


def test_process_rewards_from_stepwise_data(folder, warm, tmp_path):
    """A step is right if it says 1: the model finds out, and says how sure it is."""
    run = dataclasses.replace(
        REWARD, data=str(folder / "steps.jsonl"), init=warm, out=str(tmp_path / "prm"), step_separator="=", steps=40,
        rm=RMConfig(kind="process", batch=32),
    )  # fmt: skip
    outcome = train_rm(run)
    assert outcome.summary["step_accuracy_after"] > 0.9 and outcome.summary["calibration_error"] < 0.5
    assert checkpoint.steps(outcome.folder / "checkpoints")[-1] == 40


def test_steps_are_marked_at_their_last_token():
    tokenizer = load_tokenizer(DIGITS)
    records = [
        {"prompt": "1+2=", "completions": ["12", "3"], "labels": [True, False]},
        {"prompt": "4", "completions": ["5"], "labels": [1]},
    ]
    steps = encode_steps(records, tokenizer, separator="=")
    assert tokenizer.decode(np.asarray(steps.examples.tokens)[0].tolist()) == "1+2=12=3="
    assert np.flatnonzero(steps.examples.loss_mask[0]).tolist() == [6, 8]
    assert np.flatnonzero(steps.examples.loss_mask[1]).tolist() == [2]
    assert np.flatnonzero(steps.correct[0]).tolist() == [6] and steps.correct[1, 2] == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "1", "completions": ["2"]}, "record 0: no column 'labels'"),
        ({"prompt": "1", "completions": ["2"], "labels": [True, False]}, "expected two lists of one length"),
        ({"prompt": "1", "completions": [], "labels": []}, "expected two lists of one length"),
        ({"prompt": "1", "completions": ["2"], "labels": ["yes"]}, "expected true or false for each step"),
        ({"prompt": "1", "completions": [2], "labels": [True]}, "a step is 2; expected some text"),
        ({"prompt": "", "completions": ["2"], "labels": [True]}, "record 0: 'prompt' is empty"),
    ],
)
def test_bad_steps_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        encode_steps([record], load_tokenizer(DIGITS), separator="=")


@pytest.mark.parametrize(
    ("train", "run", "data", "message"),
    [
        (train_dpo, dataclasses.replace(DPO, dpo=DPOConfig(batch=500)), "pairs", "takes 500 pairs and .* leaves 104"),
        (train_dpo, DPO, "labels", "no column 'chosen'"),
        (train_kto, dataclasses.replace(KTO, kto=KTOConfig(batch=500)), "labels", "takes 500 examples"),
        (train_kto, KTO, "pairs", "no column 'completion'"),
        (train_rm, dataclasses.replace(REWARD, rm=RMConfig(batch=500)), "pairs", "takes 500 pairs"),
        (train_rm, dataclasses.replace(REWARD, rm=RMConfig(kind="process")), "pairs", "no column 'completions'"),
    ],
)
def test_what_cannot_serve_is_refused_before_anything_is_written(train, run, data, message, folder, warm, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(run, data=str(folder / f"{data}.jsonl"), init=warm, out=str(out)))
    assert not out.exists()


def test_a_folder_that_holds_a_run_is_left_alone(folder, dpo, warm):
    stored = (dpo.folder / "reference.npz").read_bytes()
    with pytest.raises(ValueError, match="holds a run already"):
        train_dpo(dataclasses.replace(DPO, data=str(folder / "pairs.jsonl"), init=warm, out=str(dpo.folder), seed=1))
    assert (dpo.folder / "reference.npz").read_bytes() == stored
