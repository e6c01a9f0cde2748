"""Distillation: divergences against numpy, chunks, the sampled estimator in expectation, students of teachers."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from jaxrl import checkpoint, metrics, runs
from jaxrl.data.tokenizer import ByteTokenizer, CharTokenizer
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import distill, recipes
from jaxrl.posttrain.adapter import AdapterOptions
from jaxrl.posttrain.distill import DistillConfig
from jaxrl.posttrain.recipes.distill import DistillRun, train_distill
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.posttrain.score import log_probs_of
from jaxrl.posttrain.sft import SFTConfig
from jaxrl.posttrain.update import OptimizerConfig
from jaxrl.types import TokenBatch
from tests.oracles import distill as oracle
from tests.posttrain.conftest import EOS, PAD, VOCABULARY
from tests.posttrain.tabular import bandit, one_token

B, T, D, E, V = 2, 5, 4, 3, 7
BETAS = [0.0, 0.3, 0.5, 1.0]


@pytest.fixture(scope="module")
def states():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((B, T, D), (D, V), (B, T, E), (E, V))]
    return [jnp.asarray(x, jnp.float32) for x in arrays], jnp.asarray(rng.integers(0, V, (B, T)))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_divergence_and_its_gradient_are_the_papers(states, beta, temperature):
    (hidden, unembedding, teacher, teacher_unembedding), targets = states
    student, wanted = (
        np.float64(hidden) @ np.float64(unembedding),
        np.float64(teacher) @ np.float64(teacher_unembedding),
    )

    def total(shift):
        """A shift of the logits, through one more hidden unit for each of them."""
        wide = jnp.concatenate([hidden, shift], axis=-1)
        both = jnp.concatenate([unembedding, jnp.eye(V)])
        values, *rest = distill.token_divergence(
            wide, both, teacher, teacher_unembedding, targets, beta=beta, temperature=temperature
        )
        return values.sum(), (values, *rest)

    gradient, (values, gap, entropy) = jax.grad(total, has_aux=True)(jnp.zeros((B, T, V)))
    for b in range(B):
        for t in range(T):
            rows = student[b, t].tolist(), wanted[b, t].tolist()
            np.testing.assert_allclose(values[b, t], oracle.divergence(*rows, beta, temperature), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(gradient[b, t], oracle.slope(*rows, beta, temperature), rtol=1e-4, atol=1e-5)
            q, p = (oracle.softmax([v / temperature for v in row]) for row in rows)
            y = int(targets[b, t])
            np.testing.assert_allclose(gap[b, t], np.log(q[y] / p[y]), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(entropy[b, t], -np.dot(q, np.log(q)), rtol=1e-5)


def test_equal_models_diverge_by_nothing(states):
    (hidden, unembedding, *_), targets = states
    for beta in BETAS:
        value = lambda w, beta=beta: distill.token_divergence(
            hidden, w, hidden, unembedding, targets, beta=beta
        )[0].sum()  # fmt: skip
        total, gradient = jax.value_and_grad(value)(unembedding)
        assert abs(total) < 1e-5 and np.abs(gradient).max() < 1e-5


def test_the_teacher_gets_no_gradient(states):
    arrays, targets = states
    value = lambda *arrays: distill.token_divergence(*arrays, targets, beta=0.5)[0].sum()
    gradients = jax.grad(value, (0, 1, 2, 3))(*arrays)
    assert [bool(np.any(gradient)) for gradient in gradients] == [True, True, False, False]


def test_tokens_that_the_teacher_rules_out_keep_the_mixture_finite():
    student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))
    assert np.isposinf(distill.divergence(student, teacher, beta=1.0))
    np.testing.assert_allclose(distill.divergence(student, teacher, beta=0.0), np.log(2), rtol=1e-6)
    half = 0.5 * np.log(1 / 0.75) + 0.5 * (0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25))
    np.testing.assert_allclose(distill.divergence(student, teacher, beta=0.5), half, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_chunks_change_nothing(states, beta):
    arrays, targets = states

    def value(hidden, unembedding, chunk):
        out = distill.token_divergence(
            hidden, unembedding, *arrays[2:], targets, beta=beta, temperature=1.3, chunk=chunk
        )
        return (out[0] * jnp.arange(B * T).reshape(B, T)).sum(), out

    whole = jax.grad(value, (0, 1), has_aux=True)(*arrays[:2], 0)
    for chunk in (1, 3, 10, 99):
        part = jax.jit(jax.grad(value, (0, 1), has_aux=True), static_argnums=2)(*arrays[:2], chunk)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), part, whole)


def test_no_pass_holds_all_logits():
    """Neither forward nor backward: no part of the program as traced makes an array of tokens x vocabulary."""
    rows, vocabulary, chunk = 64, 1000, 8
    hidden, unembedding, targets = jnp.ones((1, rows, D)), jnp.ones((D, vocabulary)), jnp.zeros((1, rows), int)

    def value(hidden, unembedding, chunk):
        return distill.token_divergence(
            hidden, unembedding, hidden, unembedding, targets, beta=0.5, chunk=chunk
        )[0].sum()  # fmt: skip

    def largest(chunk):
        program = jax.make_jaxpr(jax.grad(value, (0, 1)), static_argnums=2)(hidden, unembedding, chunk)
        sizes = []

        def visit(jaxpr):
            for equation in jaxpr.eqns:
                sizes.extend(v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
                for inner in jaxprs_in_params(equation.params):
                    visit(inner)

        visit(program.jaxpr)
        return max(sizes)

    assert largest(0) >= rows * vocabulary
    assert largest(chunk) <= chunk * vocabulary


def test_the_sampled_estimator_is_the_reverse_kl_in_expectation():
    """Over all tokens of a bandit, each weighted with the student's own probability."""
    rng = np.random.default_rng(1)
    student, teacher = ({"logits": jnp.asarray(rng.normal(size=V), jnp.float32)} for _ in range(2))
    model, batch = bandit(V), one_token(range(V))

    def gradient(estimator, row):
        config = DistillConfig(estimator=estimator)
        one = jax.tree.map(lambda x: x[row : row + 1], batch)
        value = lambda params: distill.loss(config, model, params, model, teacher, one)[0].mean
        return np.asarray(jax.grad(value)(student)["logits"])

    probabilities = np.asarray(jax.nn.softmax(student["logits"]))
    sampled = sum(p * gradient("sampled", row) for row, p in enumerate(probabilities))
    np.testing.assert_allclose(sampled, gradient("full", 0), atol=1e-6)
    assert np.abs(sampled).max() > 0.1


def one_layer(seed, scale):
    """A small model, and random parameters; the larger the scale, the farther from uniform its next token."""
    config = TransformerConfig(
        vocab_size=VOCABULARY, width=16, layers=1, heads=1, kv_heads=1, ffn=16, max_length=16, tie_embeddings=False
    )
    model = language_model(config)
    params = jax.jit(model.init)(jax.random.key(seed))
    return model, {**params, "unembed": jax.tree.map(lambda w: scale * w, params["unembed"])}


@pytest.fixture(scope="module")
def teacher():
    return one_layer(3, 15.0)


@pytest.fixture(scope="module")
def student():
    return one_layer(9, 1.0)


@pytest.fixture(scope="module")
def completions(teacher, prompts):
    model, params = teacher
    sampling = Sampling(max_tokens=6)
    draw = jax.jit(lambda p, key: rollout(model, p, prompts, key, sampling=sampling, eos_id=EOS, pad_id=PAD, samples=4))
    return draw(params, jax.random.key(0))


def test_rollouts_become_examples(teacher, completions):
    """Right-padded, the same tokens, and with the very log-probs that the sampler saw."""
    (model, params), batch = teacher, distill.examples_of(completions)
    log_probs, _, mask = jax.jit(lambda p, b: log_probs_of(model, p, b))(params, batch)
    width = completions.prompt_width
    assert len(set(np.asarray(completions.lengths).tolist())) > 1
    for row in range(len(mask)):
        prompt, length = int(completions.prompt_lengths[row]), int(completions.lengths[row])
        whole = completions.tokens[row, width - prompt : width + length]
        np.testing.assert_array_equal(batch.tokens[row, : prompt + length], whole)
        np.testing.assert_array_equal(np.flatnonzero(batch.loss_mask[row]), np.arange(prompt, prompt + length))
        seen = np.asarray(log_probs[row])[np.asarray(mask[row]) > 0]
        np.testing.assert_allclose(seen, completions.log_probs[row, :length], atol=2e-5)


def test_packed_examples_count_no_token_across_their_border(teacher):
    model, params = teacher
    tokens = jnp.asarray([[3, 4, 5, 6, 7, 8]])
    packed = TokenBatch(tokens, jnp.ones((1, 6)), jnp.asarray([[1, 1, 1, 2, 2, 2]]))
    apart = TokenBatch(tokens.reshape(2, 3), jnp.ones((2, 3)))
    other = jax.tree.map(lambda x: 0.5 * x, params)
    config = DistillConfig(beta=0.5)
    total = jax.jit(lambda batch: distill.loss(config, model, params, model, other, batch)[0])
    one, two = total(packed), total(apart)
    assert one.weight == two.weight == 4
    np.testing.assert_allclose(one.total, two.total, rtol=1e-5)


def learnt(student, teacher, prompts, config, *, steps=60, examples=None):
    """The student after some steps, and their metrics."""
    model, start = student
    recipe = distill.make(config, model, teacher[0], optax.adam(1e-2), eos_id=EOS, pad_id=PAD)
    data = distill.Data(prompts, teacher[1], examples)

    @jax.jit
    def run(state, data):
        return jax.lax.scan(lambda state, _: recipe.step(state, data), state, length=steps)

    state, rows = run(recipe.init(jax.random.key(1), start), data)
    return state.params, jax.tree.map(np.asarray, rows)


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 1.0},
        {"beta": 0.5, "chunk": 7, "micro_batches": 4},
        {"estimator": "sampled", "group": 32},
    ],
    ids=["reverse", "jensen_shannon", "sampled"],
)
def test_a_student_reaches_its_teacher(student, teacher, prompts, completions, change):
    """Judged on the teacher's own samples, of which the student has seen none."""
    config = DistillConfig(prompts=4, sampling=Sampling(max_tokens=6), **{"group": 8, **change})
    after, rows = learnt(student, teacher, prompts, config)
    judged, unseen = DistillConfig(beta=0.0), distill.examples_of(completions)
    judge = jax.jit(lambda p: distill.loss(judged, student[0], p, *teacher, unseen)[0].mean)
    first, last = float(judge(student[1])), float(judge(after))
    assert last < 0.3 * first, (first, last)
    assert set(rows) <= metrics.GLOSSARY.keys() | {"distill/log_ratio"}
    assert (rows["completion/length"] >= 1).all() and rows["train/skipped"][-1] == 0


def test_steps_on_given_examples(student, teacher, prompts, completions):
    """GKD's mixture: off policy, or a share of both; each step is one of the two."""
    examples = distill.examples_of(completions)
    base = DistillConfig(prompts=4, beta=0.0, sampling=Sampling(max_tokens=2))
    rows = {}
    for share in (0.0, 0.5):
        config = dataclasses.replace(base, on_policy=share)
        rows[share] = learnt(student, teacher, prompts, config, steps=30, examples=examples)[1]
    given = {share: np.isnan(row["completion/truncated"]) for share, row in rows.items()}
    assert given[0.0].all() and 5 < given[0.5].sum() < 25
    assert (rows[0.5]["completion/length"][~given[0.5]] <= 2).all()
    assert rows[0.0]["train/loss"][-5:].mean() < 0.6 * rows[0.0]["train/loss"][:5].mean()


def test_parts_of_a_batch_add_up_and_the_teacher_is_data(student, teacher, prompts):
    """Micro-batches give the same step; another teacher gives another step, without another program."""
    states = []
    for parts in (1, 4):
        config = DistillConfig(prompts=4, group=2, micro_batches=parts, sampling=Sampling(max_tokens=5))
        recipe = distill.make(config, student[0], teacher[0], optax.sgd(0.1), eos_id=EOS, pad_id=PAD)
        state = recipe.init(jax.random.key(1), student[1])
        traces = []
        step = jax.jit(lambda s, d, recipe=recipe, traces=traces: (traces.append(1), recipe.step(s, d))[1])
        states.append(step(state, distill.Data(prompts, teacher[1]))[0].params)
        other = step(state, distill.Data(prompts, jax.tree.map(lambda x: 0.5 * x, teacher[1])))[0].params
        assert len(traces) == 1
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (states[-1], other)), strict=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *states)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "whole"}, "estimator is 'whole'; expected one of full, sampled"),
        ({"beta": 1.5}, r"beta is 1.5; expected 0 \(forward KL\) to 1"),
        ({"temperature": 0.0}, "temperature is 0.0; expected more than 0"),
        ({"on_policy": -0.1}, "on_policy is -0.1; expected a share"),
        ({"prompts": 0}, "prompts is 0; expected at least 1"),
        ({"micro_batches": 5}, "micro_batches is 5; it must divide the 32"),
        ({"estimator": "sampled", "beta": 0.0}, "the sampled estimator is of the reverse KL"),
        ({"estimator": "sampled", "sampling": Sampling(top_k=3)}, "no filters"),
        ({"estimator": "sampled", "temperature": 2.0}, "sampling at the same temperature"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**change)


def test_models_that_do_not_speak_alike_are_refused(states):
    (hidden, unembedding, teacher, teacher_unembedding), targets = states
    with pytest.raises(ValueError, match="the student has 7 tokens and the teacher 6"):
        distill.token_divergence(hidden, unembedding, teacher, teacher_unembedding[:, :6], targets, beta=1.0)
    distill.check_tokenizers(CharTokenizer("ab"), CharTokenizer("ab"))
    for other in (CharTokenizer("ba"), ByteTokenizer()):
        with pytest.raises(ValueError, match="is not the teacher's"):
            distill.check_tokenizers(CharTokenizer("ab"), other)


SIZES: dict[str, Any] = {"held_out": 16, "chunk": 20, "eval_every": 0, "save_every": 2}
SMALL = recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=1, ffn=16)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with `digits.jsonl` and a teacher that knows the last digit of a number."""
    folder = tmp_path_factory.mktemp("distill")
    records = [{"prompt": f"{a}=", "completion": str(a % 10)} for a in range(100, 300)]
    (folder / "digits.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipes.train_sft(recipes.SFTRun(
        **SIZES, model=SMALL, data=str(folder / "digits.jsonl"), out=str(folder / "teacher"), steps=40, max_tokens=4,
        tokenizer="char:0123456789=", sft=SFTConfig(batch=64), optimizer=OptimizerConfig(learning_rate=3e-2),
    ))  # fmt: skip
    return folder


def test_a_whole_run_resumes(taught):
    """A student from nothing, with the tokenizer of the teacher, learns; in one go and in two it is the same."""
    run = DistillRun(
        **{**SIZES, "chunk": 20, "save_every": 20}, data=str(taught / "digits.jsonl"), teacher=str(taught / "teacher"),
        out=str(taught / "whole"), steps=40, model=SMALL, optimizer=OptimizerConfig(learning_rate=3e-2),
        distill=DistillConfig(prompts=64, beta=0.0, sampling=Sampling(max_tokens=3)),
    )  # fmt: skip
    whole = train_distill(run)
    losses = [row["train/loss"] for row in metrics.read(whole.folder / "metrics.jsonl") if "train/loss" in row]
    assert losses[-1] < 0.5 * losses[0] and "accuracy_after" not in whole.summary
    halves = dataclasses.replace(run, out=str(taught / "halves"))
    train_distill(dataclasses.replace(halves, steps=20))
    again = train_distill(halves, resume=True)
    jax.tree.map(np.testing.assert_array_equal, again.state.params, whole.state.params)


def test_a_student_with_an_adapter(taught):
    """Its base stands still, the adapter alone is kept, a resumed run ends alike, and the student opens merged."""
    base = recipes.train_sft(recipes.SFTRun(
        **SIZES, model=SMALL, data=str(taught / "digits.jsonl"), out=str(taught / "base"), steps=1,
        tokenizer="char:0123456789=", sft=SFTConfig(batch=64),
    ))  # fmt: skip
    run = DistillRun(
        **{**SIZES, "save_every": 20}, data=str(taught / "digits.jsonl"), teacher=str(taught / "teacher"), steps=40,
        init=str(base.folder), out=str(taught / "adapted"), optimizer=OptimizerConfig(learning_rate=3e-2),
        adapter=AdapterOptions(kind="lora", rank=4),
        distill=DistillConfig(prompts=64, beta=0.0, sampling=Sampling(max_tokens=3)),
    )  # fmt: skip
    whole = train_distill(run)
    losses = [row["train/loss"] for row in metrics.read(whole.folder / "metrics.jsonl") if "train/loss" in row]
    assert np.mean(losses[-5:]) < 0.95 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, whole.state.base, base.state.params)
    saved, _ = checkpoint.restore(whole.folder / "checkpoints")
    assert set(saved["params"]) == {"layers"} and set(saved["params"]["layers"]["attention"]["q"]) == {"a", "b"}
    halves = dataclasses.replace(run, out=str(taught / "adapted_halves"))
    train_distill(dataclasses.replace(halves, steps=20))
    again = train_distill(halves, resume=True)
    jax.tree.map(np.testing.assert_array_equal, again.state.params, whole.state.params)
    opened = runs.load_model(whole.folder)
    assert jax.tree.structure(opened.params) == jax.tree.structure(base.state.params)
    changed = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), opened.params, base.state.params)
    assert changed["layers"]["attention"]["q"]["kernel"] > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": ""}, "teacher is empty; expected a run folder"),
        ({"tokenizer": "char:=0123456789"}, "is not the teacher's"),
        ({"distill": DistillConfig(prompts=500)}, "a step takes 500 prompts"),
        ({"distill": DistillConfig(on_policy=0.5)}, "examples is '' and distill.on_policy 0.5"),
        ({"teacher": "nowhere"}, "nowhere holds no model"),
    ],
)
def test_runs_that_cannot_work_are_refused_before_anything_is_written(taught, change, message, tmp_path):
    run = DistillRun(
        **SIZES, data=str(taught / "digits.jsonl"), teacher=str(taught / "teacher"), out=str(tmp_path / "run")
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        train_distill(dataclasses.replace(run, **change))
    assert not (tmp_path / "run").exists()
