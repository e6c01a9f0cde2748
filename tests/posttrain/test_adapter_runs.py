"""Adapters in whole runs: what is trained, what is kept, the reference, resuming, opening again, and early errors."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import checkpoint, loop, metrics, runs
from jaxrl.nets import adapters, presets
from jaxrl.nets.language_model import language_model, logits
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import adapter as adapting
from jaxrl.posttrain import evaluation, grpo, kto, online, ppo, preference, recipes, reward_model, sft, talk
from jaxrl.posttrain.adapter import AdapterOptions
from jaxrl.posttrain.recipes.online import OnlineRun, train_online
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.sft import SFTConfig
from jaxrl.posttrain.update import OptimizerConfig
from jaxrl.types import Prompts, TokenBatch

LORA = AdapterOptions(kind="lora", rank=2, alpha=8.0)
SMALL = {"held_out": 8, "steps": 4, "chunk": 2, "eval_every": 0, "save_every": 2, "keep": 5}
OPTIMIZER = OptimizerConfig(learning_rate=2e-2)
SIZES = {"prompts": 4, "group": 2, "sampling": Sampling(max_tokens=3)}
RUNS = {
    "sft": (recipes.train_sft, recipes.SFTRun(**SMALL, max_tokens=3, sft=SFTConfig(batch=16), optimizer=OPTIMIZER)),
    "dpo": (recipes.train_dpo, recipes.DPORun(**SMALL, optimizer=OPTIMIZER, dpo=preference.DPOConfig(batch=16))),
    "kto": (recipes.train_kto, recipes.KTORun(**SMALL, optimizer=OPTIMIZER, kto=kto.KTOConfig(batch=16))),
    "rm": (recipes.train_rm, recipes.RMRun(**SMALL, optimizer=OPTIMIZER, rm=reward_model.RMConfig(batch=16))),
    "ppo": (
        recipes.train_ppo,
        recipes.PPORun(**SMALL, optimizer=OPTIMIZER, critic_optimizer=OPTIMIZER, ppo=ppo.PPOConfig(**SIZES, epochs=1)),
    ),
    "grpo": (
        recipes.train_grpo,
        recipes.GRPORun(**SMALL, optimizer=OPTIMIZER, grpo=grpo.GRPOConfig(**SIZES, kl_coef=0.01)),
    ),
    "online": (train_online, OnlineRun(**SMALL, optimizer=OPTIMIZER, online=online.OnlineConfig(**SIZES))),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data for every recipe, and `warm`, a base that answers with digits."""
    path = tmp_path_factory.mktemp("adapters")
    numbers = range(100, 164)
    records = [
        {"prompt": f"{a}=", "completion": str(a % 10), "answer": str(a % 10), "label": a % 3 > 0} for a in numbers
    ]
    pairs = [{"prompt": f"{a}=", "chosen": "1", "rejected": "23"} for a in numbers]
    texts = [{"prompt": f"{a}=", "completion": str(a % 10)} for a in numbers]
    for name, rows in (("digits", records), ("pairs", pairs), ("texts", texts)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipes.train_sft(
        dataclasses.replace(
            RUNS["sft"][1], data=str(path / "digits.jsonl"), tokenizer="char:0123456789=", out=str(path / "warm"),
            model=recipes.ModelConfig(width=16, layers=2, heads=2, kv_heads=1, ffn=32),
            adapter=AdapterOptions(), steps=30, chunk=10, save_every=0,
        )
    )  # fmt: skip
    return path


def start(folder, kind, out, adapter=LORA, **changes):
    """Trains one of `RUNS` over the warm base."""
    train, run = RUNS[kind]
    data = folder / ("pairs.jsonl" if kind in ("dpo", "rm") else "digits.jsonl")
    given = {"data": str(data), "init": str(folder / "warm"), "adapter": adapter, "out": str(out)} | changes
    resume = given.pop("resume", False)
    return train(dataclasses.replace(run, **given), resume=resume)


@pytest.fixture(scope="module")
def outcomes(folder):
    """A run of each kind, trained when it is first asked for."""
    return functools.cache(lambda kind: start(folder, kind, folder / kind))


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def sizes(tree):
    return sum(x.size for x in jax.tree.leaves(tree) if hasattr(x, "size"))


def said(model, params, tokens):
    hidden, _ = model.apply(params, tokens)
    return logits(hidden, model.unembedding(params))


TOKENS = jnp.asarray([[3, 4, 5, 6], [7, 8, 9, 2]])


@pytest.mark.parametrize("kind", RUNS)
def test_only_the_adapter_is_trained_and_kept(kind, folder, outcomes):
    outcome, base = outcomes(kind), runs.load_model(folder / "warm").params
    equal(outcome.state.base, base)
    saved, step = checkpoint.restore(outcome.folder / "checkpoints")
    assert step == 4
    own = saved["params"]["model"] if kind == "rm" else saved["params"]
    assert set(own) == {"layers"} and set(own["layers"]["attention"]["q"]) == {"a", "b"}
    assert np.abs(own["layers"]["attention"]["q"]["b"]).max() > 0
    states = 2 if kind == "ppo" else 1  # that of the critic is another adapter on the same base
    assert sizes(saved) < states * (3 * sizes(own) + 3 * 17 + 20) and saved["reference"] is None
    rows = [row for row in metrics.read(outcome.folder / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(np.isfinite(row["train/loss"]) for row in rows)


@pytest.mark.parametrize("kind", ["sft", "dpo", "ppo"])
def test_a_resumed_run_ends_bitwise_where_the_whole_one_ends(kind, folder, outcomes, tmp_path):
    start(folder, kind, tmp_path / "part", steps=2)
    again = start(folder, kind, tmp_path / "part", resume=True)
    equal(again.state.params, outcomes(kind).state.params)


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_run_opens_merged(kind, folder, outcomes):
    """With logits of the adapted model, for evaluation, chat and export; and the base of the next run."""
    outcome, warm = outcomes(kind), runs.load_model(folder / "warm")
    opened = runs.load_model(outcome.folder)
    carried = adapting.carried(warm.language_model, adapters.lora(LORA.config()))
    adapted = said(carried, adapting.whole(outcome.state), TOKENS)
    np.testing.assert_allclose(said(opened.language_model, opened.params, TOKENS), adapted, atol=2e-5)
    assert np.abs(adapted - said(warm.language_model, warm.params, TOKENS)).max() > 1e-3
    assert jax.tree.structure(opened.params) == jax.tree.structure(warm.params)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_the_opened_model_says_what_it_said_in_training(kind, folder, outcomes, tmp_path):
    """Merged, and beside its base: in evaluation and in conversation."""
    outcome = outcomes("sft")
    if kind == "prefix":
        outcome = start(folder, "sft", tmp_path / "run", AdapterOptions(kind="prefix", length=3, hidden=8))
    result = evaluation.evaluate(str(outcome.folder))
    assert result.figures["accuracy"].mean == pytest.approx(outcome.summary["accuracy_after"])
    speaker = talk.open_run(str(outcome.folder), sampling=Sampling(temperature=0.0, max_tokens=3))
    prompt = result.completions.problems[0]["prompt"]
    assert speaker.complete(prompt)[0].text == result.completions.texts[0][0] != ""
    assert ("train grpo --init" in runs.next_steps(outcome.folder)) == (kind == "lora")  # what merges is a base


def test_a_reward_model_opens_merged_and_scores(folder, outcomes):
    opened = reward_model.load(outcomes("rm").folder)
    warm = runs.load_model(folder / "warm")
    batch = TokenBatch(TOKENS, jnp.ones(TOKENS.shape))
    carried = adapting.carried(warm.language_model, adapters.lora(LORA.config()))
    expected = reward_model.score(carried, adapting.whole(outcomes("rm").state), batch)
    given = reward_model.score(opened.language_model, opened.params, batch)
    np.testing.assert_allclose(given, expected, atol=2e-5)
    assert outcomes("rm").summary["pair_accuracy_after"] >= 0.9 and "calibration_error" in outcomes("rm").summary


def test_one_run_after_another(folder, outcomes, tmp_path):
    """Each merges what the one before has learnt; the reward model judges in PPO and in online DPO."""
    second = start(folder, "dpo", tmp_path / "dpo", init=str(outcomes("sft").folder))
    equal(second.state.base, runs.load_model(outcomes("sft").folder).params)
    rows = [row for row in metrics.read(second.folder / "metrics.jsonl") if "train/loss" in row]
    assert rows[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-6)  # at the reference
    judge = str(outcomes("rm").folder)
    for kind in ("ppo", "online"):
        third = start(folder, kind, tmp_path / kind, init=str(second.folder), reward_model=judge, steps=2)
        equal(third.state.base, runs.load_model(second.folder).params)
        assert np.isfinite(third.summary["reward_after"])
    full = start(folder, "sft", tmp_path / "full", init=str(third.folder), adapter=AdapterOptions())
    assert "layers" in full.state.params and "adapter" not in json.loads((full.folder / "model.json").read_text())


@pytest.mark.parametrize(
    "options",
    [
        AdapterOptions(kind="dora", rank=2, targets="q, down"),
        pytest.param(AdapterOptions(kind="adalora", rank=2), marks=pytest.mark.slow),
        pytest.param(AdapterOptions(kind="bottleneck", width=4), marks=pytest.mark.slow),
        pytest.param(AdapterOptions(kind="prompt", length=3), marks=pytest.mark.slow),
        pytest.param(AdapterOptions(kind="p_tuning", length=3, hidden=8), marks=pytest.mark.slow),
        AdapterOptions(kind="prefix", length=3, hidden=8),
        AdapterOptions(kind="lora", rank=2, targets="v", base="nf4"),
        pytest.param(AdapterOptions(kind="lora", rank=2, base="int8"), marks=pytest.mark.slow),
    ],
    ids=lambda options: f"{options.kind}-{options.base}",
)
def test_every_kind_learns_and_opens_again(options, folder, tmp_path):
    whole = {"sft": SFTConfig(batch=56), "optimizer": OptimizerConfig(learning_rate=5e-3)}  # every step sees all
    outcome = start(folder, "sft", tmp_path / "run", options, data=str(folder / "texts.jsonl"), **whole)
    losses = [row["train/loss"] for row in metrics.read(outcome.folder / "metrics.jsonl") if "train/loss" in row]
    assert losses[-1] < losses[0]
    warm, made = runs.load_model(folder / "warm"), options.build()
    equal(outcome.state.base, options.frozen(warm.params))
    opened = runs.load_model(outcome.folder)
    adapted = said(adapting.carried(warm.language_model, made), adapting.whole(outcome.state), TOKENS)
    np.testing.assert_allclose(said(opened.language_model, opened.params, TOKENS), adapted, atol=2e-5)
    if not made.merges:
        with pytest.raises(ValueError, match="an adapter that cannot be merged into its base, and no base for another"):
            start(folder, "sft", tmp_path / "next", init=str(outcome.folder))


def test_the_reference_is_the_base_without_the_adapter(folder, tmp_path):
    """A random prefix is not the base: its KL is above 0 before the first update, that of LoRA is 0."""
    kl = {}
    for options in (LORA, AdapterOptions(kind="prompt", length=3)):
        outcome = start(folder, "ppo", tmp_path / options.kind, options, steps=1, chunk=1)
        (row,) = [row for row in metrics.read(outcome.folder / "metrics.jsonl") if "policy/kl" in row]
        kl[options.kind] = row["policy/kl_completion"]
    assert abs(kl["lora"]) < 1e-6 < 1e-3 < abs(kl["prompt"])
    outcome = start(folder, "dpo", tmp_path / "dpo", AdapterOptions(kind="prompt", length=3), steps=2)
    plain = start(folder, "dpo", tmp_path / "plain", AdapterOptions(), steps=2)
    one, other = (np.load(run.folder / "reference.npz") for run in (outcome, plain))
    assert all((one[name] == other[name]).all() for name in one.files) and one.files == other.files


def test_a_moving_reference_is_a_copy_of_the_adapter(folder, tmp_path):
    changing = online.OnlineConfig(**SIZES, reference_every=2)
    moved = start(folder, "online", tmp_path / "online", online=changing)
    equal(moved.state.state.reference, moved.state.params)
    moved = start(folder, "dpo", tmp_path / "dpo", dpo=preference.DPOConfig(batch=16, reference_every=2))
    equal(moved.state.state.reference, moved.state.params)


def test_a_mesh_gives_the_same_run(folder, outcomes, tmp_path):
    spread = start(folder, "ppo", tmp_path / "mesh", mesh="data=2,fsdp=4")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), spread.state.params, outcomes("ppo").state.params
    )
    assert len(spread.state.base["layers"]["ffn"]["up"]["kernel"].sharding.device_set) == 8


def problems(number=6):
    tokens = jax.random.randint(jax.random.key(0), (number, 3), 2, 12)
    return grpo.Problems(Prompts(tokens, jnp.full(number, 3)), jnp.arange(number))


def test_grpo_fused_and_hosted_over_a_base():
    """The pure steps take the base in their state, between two programs as well as in one."""
    model = language_model(presets.tiny(vocab_size=12, layers=1))
    base = jax.jit(model.init)(jax.random.key(0))
    config = grpo.GRPOConfig(prompts=2, group=4, kl_coef=0.1, sampling=Sampling(max_tokens=3))
    make = lambda model: grpo.make(config, model, optax.sgd(0.5), eos_id=1, pad_id=0)
    recipe = adapting.over(make, model, adapters.lora(adapters.LoRAConfig(rank=2)))
    score = lambda rollout, _: (rollout.completions[:, 0] % 2).astype(jnp.float32)
    ends = []
    for step, jit in ((grpo.fused(recipe, score, config), True), (grpo.hosted(recipe, score, config), False)):
        state = recipe.init(jax.random.key(1), jax.tree.map(jnp.copy, base))
        *_, last = loop.run(step, state, problems(), steps=3, chunk=3, jit=jit)
        assert last.metrics[0]["policy/kl"] == pytest.approx(0, abs=1e-6) and last.metrics[2]["policy/kl"] > 0
        equal(last.state.base, base)
        assert last.state.state.reference is None
        ends.append(last.state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *ends)


def test_the_base_is_an_argument_once():
    """Of a chunk's program: it is donated and given back as it lies; gradient and moments are the adapter's."""
    config = TransformerConfig(
        vocab_size=32, width=128, layers=8, heads=2, kv_heads=2, ffn=512, max_length=16, tie_embeddings=True
    )
    model, adapter = language_model(config), adapters.lora(adapters.LoRAConfig(rank=1))
    make = lambda model: sft.make(SFTConfig(batch=4, micro_batches=2), model, optax.adam(1e-3))
    recipe = adapting.over(make, model, adapter)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    size = sizes(shapes) * 4
    data = jax.eval_shape(lambda: TokenBatch(jnp.zeros((4, 8), jnp.int32), jnp.ones((4, 8))))
    state = jax.eval_shape(recipe.init, jax.random.key(0), shapes)

    def program(state, data):
        return jax.lax.scan(lambda state, _: recipe.step(state, data), state, length=2)

    memory = jax.jit(program, donate_argnums=0).lower(state, data).compile().memory_analysis()
    assert size < memory.argument_size_in_bytes < 1.15 * size and memory.alias_size_in_bytes > size
    assert memory.temp_size_in_bytes < 0.35 * size


def test_a_base_that_changed_is_noticed(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "warm", tmp_path / "warm")
    outcome = start(folder, "sft", tmp_path / "run", init=str(tmp_path / "warm"), steps=2)
    shutil.copytree(tmp_path, tmp_path / "moved", ignore=shutil.ignore_patterns("moved"))  # both together
    equal(runs.load_model(tmp_path / "moved" / "run").params, runs.load_model(outcome.folder).params)
    state, step = checkpoint.restore(tmp_path / "warm" / "checkpoints")
    scale = state["params"]["norm"]["scale"]
    state["params"]["norm"]["scale"] = scale.at[0].set(jnp.nextafter(scale[0], 2.0))
    checkpoint.save(tmp_path / "warm" / "checkpoints", step, state)
    with pytest.raises(ValueError, match="warm, whose parameters have changed since"):
        runs.load_model(outcome.folder)
    with pytest.raises(ValueError, match="was begun with the adapter .* resume with both as they were"):
        start(folder, "sft", tmp_path / "run", init=str(tmp_path / "warm"), resume=True)
    with pytest.raises(ValueError, match="was begun with the adapter"):
        start(folder, "sft", outcome.folder, AdapterOptions(kind="lora", rank=3), resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lroa"}, "kind is 'lroa'; expected one of none, lora"),
        ({"rank": 4}, "rank is 4, which kind none does not have; it has no options: choose another kind"),
        ({"kind": "prompt", "rank": 4}, "rank is 4, which kind prompt does not have; it has length, base"),
        ({"base": "nf4"}, "base is 'nf4', which kind none does not have"),
        ({"kind": "lora", "base": "fp8"}, "base is 'fp8'; expected float32, int8 or nf4"),
        ({"kind": "lora", "rank": 0}, "rank is 0"),
        ({"kind": "lora", "scaling": "double"}, "scaling is 'double'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterOptions(**options)


@pytest.mark.parametrize(
    ("kind", "adapter", "changes", "message"),
    [
        (
            "sft",
            LORA,
            {"init": "", "tokenizer": "char:0123456789="},
            "which stands on a trained base, and there is none",
        ),
        ("sft", AdapterOptions(kind="lora", targets="q,z"), {}, r"targets are \('q', 'z'\), expected some of"),
        (
            "rm",
            AdapterOptions(kind="adalora"),
            {},
            "adalora, which ranks all that is trained, and a reward model has a",
        ),
        ("ppo", AdapterOptions(kind="adalora"), {}, "and a critic has a head; take lora"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(kind, adapter, changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        start(folder, kind, tmp_path / "run", adapter, **changes)
    assert not (tmp_path / "run").exists()
