"""Whole runs: data, model, loop, evaluation, checkpoints and a run folder, from one frozen config.

    from jaxrl.posttrain.recipes import GRPORun, train_grpo

    outcome = train_grpo(GRPORun(data="problems.jsonl", init="runs/demo", out="runs/mine", steps=100))
    print(outcome.summary["accuracy_before"], outcome.summary["accuracy_after"])

The pure steps these are made of are in `sft` and `grpo`; write your own loop around them where a recipe is too narrow.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl import checkpoint, config, loop, metrics, parallel, plots, runs
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.display import Display, metrics_line
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import grpo, rewards, sft, task, update
from jaxrl.posttrain.grpo import GRPOConfig
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.sft import SFTConfig
from jaxrl.types import Rollout


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder to start from nothing. Vocabulary and context follow from the data."""

    width: int = 64
    """Width of the residual stream."""
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    """Key and value heads; divides `heads`."""
    ffn: int = 256
    """Inner width of the feed-forward layers."""
    tie_embeddings: bool = True
    qk_norm: bool = False
    remat: str = "none"
    """Recompute in the backward pass: none, full or dots."""
    dtype: str = "float32"
    """Compute type; parameters stay float32."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What every run needs."""

    data: str = "arithmetic"
    """A JSONL file, or built-in data: arithmetic, sloppy_arithmetic."""
    out: str = ""
    """Run folder; empty chooses runs/<kind>."""
    init: str = ""
    """Run folder whose model to start from; empty starts from nothing."""
    tokenizer: str = ""
    """byte, char:ALPHABET or a tokenizer.json; empty takes that of `init` or of the built-in data, else byte."""
    marker: str = ""
    """Text after whose last occurrence in a completion the answer stands; empty is the data's own or none."""
    held_out: int = 0
    """Problems kept out of training for evaluation; 0 takes a fifth of the data, at most 512."""
    seed: int = 0
    """Everything random follows from it."""
    steps: int = 200
    """Steps in all, those before a resume included."""
    chunk: int = 10
    """Steps compiled into one program; metrics and checkpoints come between."""
    eval_every: int = 50
    """Steps between evaluations on the held-out problems, 0 for only first and last."""
    save_every: int = 50
    """Steps between checkpoints, 0 for only the last."""
    keep: int = 2
    """Checkpoints kept."""
    patience: int = 10
    """Skipped (non-finite) updates in a row after which the run stops."""
    mesh: str = ""
    """Devices, such as data=2,fsdp=4; empty is one device."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: update.OptimizerConfig = dataclasses.field(default_factory=update.OptimizerConfig)


@dataclasses.dataclass(frozen=True)
class SFTRun(RunOptions):
    """Supervised fine-tuning on prompt + completion, messages, or text."""

    stop_at: float = 0.0
    """Stop once held-out greedy accuracy reaches this; 0 goes through all steps."""
    max_tokens: int = 64
    """Completion width in evaluation."""
    sft: SFTConfig = dataclasses.field(default_factory=SFTConfig)


@dataclasses.dataclass(frozen=True)
class GRPORun(RunOptions):
    """GRPO and its family on prompts with verifiable answers."""

    reward: str = ""
    """Python reward, path/to/file.py:function; empty compares answers exactly."""
    optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=5e-5, warmup_steps=10)
    )
    grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)


class Outcome(NamedTuple):
    """What a run made: its folder, what `summary.json` holds, and the final train state."""

    folder: Path
    summary: dict[str, Any]
    state: update.TrainState


class _Setup(NamedTuple):
    """A run's data and model, and the mesh they live on (None: one device)."""

    task: task.Task
    model: LanguageModel
    transformer: TransformerConfig
    initial: Callable[[], Any]
    mesh: Any

    def constrain(self, batch):
        return batch if self.mesh is None else parallel.shard_batch(batch, self.mesh)


class _Evaluation(NamedTuple):
    """Greedy completions of the held-out problems and their scores."""

    name: str
    score: Callable[[Any], tuple[float, list[str], np.ndarray]]


def train_sft(run: SFTRun, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Fine-tunes on worked examples; evaluates greedy exact answers where the records have an `answer`.

    Args:
      run: the config.
      resume: go on from the newest intact checkpoint in `run.out`.
      display: where to show progress; None makes one.

    Returns:
      An `Outcome`; the model is in its folder.

    Raises:
      ValueError: on data, sizes or a folder that cannot serve, before anything is compiled or overwritten.
    """
    run = dataclasses.replace(run, out=run.out or "runs/sft")
    setup = _setup(run, columns=(), max_tokens=run.max_tokens, supervised=True)
    examples = task.examples_of(setup.task.training, setup.task.tokenizer)
    optimizer = update.make_optimizer(run.optimizer)
    recipe = sft.make(
        run.sft, setup.model, optimizer, max_grad_norm=run.optimizer.max_grad_norm, constrain=setup.constrain
    )
    evaluation = None
    if all("answer" in record and "prompt" in record for record in setup.task.held_out):
        evaluation = _exact_evaluation(setup, run.max_tokens)
    return _drive("sft", run, setup, recipe.init, recipe.step, examples, evaluation,
                  max_tokens=run.max_tokens, stop_at=run.stop_at, resume=resume, display=display)  # fmt: skip


def train_grpo(run: GRPORun, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Post-trains on prompts with answers, or with a Python reward. Arguments, result and errors as `train_sft`."""
    run = dataclasses.replace(run, out=run.out or "runs/grpo")
    needed = ("prompt",) if run.reward else ("prompt", "answer")
    max_tokens = run.grpo.sampling.max_tokens
    setup = _setup(run, columns=needed, max_tokens=max_tokens)
    tokenizer, training = setup.task.tokenizer, setup.task.training
    if len(training) < run.grpo.prompts:
        raise ValueError(
            f"a step takes {run.grpo.prompts} prompts and {run.data} leaves {len(training)} for training "
            f"({len(setup.task.held_out)} are held out); lower --grpo.prompts or --held-out"
        )
    optimizer = update.make_optimizer(run.optimizer)
    recipe = grpo.make(
        run.grpo,
        setup.model,
        optimizer,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        max_grad_norm=run.optimizer.max_grad_norm,
        constrain=setup.constrain,
    )
    prompts = task.prompts_of(training, tokenizer)
    if run.reward or not _answers_by_token(setup.task):
        reward = (
            rewards.load_reward(run.reward) if run.reward else partial(rewards.exact_text, marker=setup.task.marker)
        )

        def score(completions: Rollout, rows):
            records = [training[row] for row in rows]
            return _score_texts(reward, completions, records, tokenizer, samples=run.grpo.group)

        step, answers = grpo.hosted(recipe, score), None
        evaluation = _text_evaluation(setup, max_tokens, reward, exact=not run.reward)
    else:
        reward = partial(rewards.exact_answer, marker=_marker_id(setup.task))
        step, answers = grpo.fused(recipe, reward, run.grpo), task.answers_of(training, tokenizer)
        evaluation = _exact_evaluation(setup, max_tokens)
    problems = grpo.Problems(prompts, answers)
    return _drive("grpo", run, setup, recipe.init, step, problems, evaluation,
                  max_tokens=max_tokens, jit=answers is not None, resume=resume, display=display)  # fmt: skip


def _setup(run: RunOptions, *, columns: tuple[str, ...], max_tokens: int, supervised: bool = False) -> _Setup:
    """Reads data and model; everything that can be wrong with them is found here."""
    start = runs.load_model(run.init) if run.init else None
    tokenizer = start.tokenizer if start and not run.tokenizer else run.tokenizer
    marker = run.marker or (start.marker if start and run.data not in task.BUILT_IN else "")
    work = task.load_task(run.data, tokenizer=tokenizer, marker=marker, held_out=run.held_out, columns=columns)
    longest = _longest(work, max_tokens, supervised=supervised)
    if start is None:
        fields = {f.name: getattr(run.model, f.name) for f in dataclasses.fields(run.model)}
        transformer = TransformerConfig(vocab_size=work.tokenizer.vocab_size, max_length=longest, **fields)
    else:
        transformer = dataclasses.replace(start.transformer, max_length=max(longest, start.transformer.max_length))
        if run.tokenizer and work.tokenizer.to_json() != start.tokenizer.to_json():
            raise ValueError(
                f"--tokenizer {run.tokenizer} is not that of the model of {run.init}, whose ids mean something else; "
                "leave it out to use the model's own"
            )
    model = language_model(transformer)
    # one program in both cases, so that a resumed run gets the very same numbers
    initial = (lambda: start.params) if start else lambda: jax.jit(model.init)(jax.random.key(run.seed))
    return _Setup(work, model, transformer, initial, parallel.make_mesh(run.mesh) if run.mesh else None)


def _longest(work: task.Task, max_tokens: int, *, supervised: bool) -> int:
    """Context needed: the longest prompt and the completion width, or the longest example that is learnt from."""
    lengths = [0]
    for records in (work.training, work.held_out):
        if all("prompt" in record for record in records):
            lengths.append(task.prompts_of(records, work.tokenizer).tokens.shape[1] + max_tokens)
        if supervised:
            lengths.append(task.examples_of(records, work.tokenizer).tokens.shape[1])
    return max(lengths)


def _answers_by_token(work: task.Task) -> bool:
    """Whether equal text means equal tokens: one token for each byte or character."""
    return work.tokenizer.to_json()["kind"] in ("byte", "char") and (not work.marker or _marker_id(work) is not None)


def _marker_id(work: task.Task) -> int | None:
    return work.tokenizer.token_id(work.marker) if work.marker else None


def _exact_evaluation(setup: _Setup, max_tokens: int) -> _Evaluation:
    if not _answers_by_token(setup.task):
        return _text_evaluation(setup, max_tokens, partial(rewards.exact_text, marker=setup.task.marker), exact=True)
    held_out, tokenizer = setup.task.held_out, setup.task.tokenizer
    answers, marker = task.answers_of(held_out, tokenizer), _marker_id(setup.task)
    compare = jax.jit(lambda completions: rewards.exact_answer(completions, answers, marker=marker))
    return _evaluation("eval/accuracy", setup, max_tokens, compare)


def _text_evaluation(setup: _Setup, max_tokens: int, reward: rewards.Reward, *, exact: bool) -> _Evaluation:
    held_out, tokenizer = setup.task.held_out, setup.task.tokenizer
    score = lambda completions: _score_texts(reward, completions, held_out, tokenizer, samples=1)
    return _evaluation("eval/accuracy" if exact else "eval/reward", setup, max_tokens, score)


def _evaluation(name: str, setup: _Setup, max_tokens: int, score: Callable) -> _Evaluation:
    prompts = task.prompts_of(setup.task.held_out, setup.task.tokenizer)
    greedy = Sampling(temperature=0.0, max_tokens=max_tokens)
    generate = task.make_generate(setup.model, setup.task.tokenizer, greedy)

    def evaluate(params):
        completions = jax.device_get(generate(params, prompts, jax.random.key(0)))
        scores = np.asarray(score(completions), np.float32)
        known = scores[~np.isnan(scores)]
        return float(known.mean() if known.size else np.nan), task.text_of(completions, setup.task.tokenizer), scores

    return _Evaluation(name, evaluate)


def _score_texts(reward, completions: Rollout, records: list, tokenizer: Tokenizer, *, samples: int) -> np.ndarray:
    names = set().union(*records) - {"prompt", "completion"}
    columns = {name: [record.get(name) for record in records] for name in sorted(names)}
    prompts = [record["prompt"] for record in records]
    return rewards.score(reward, completions, tokenizer, prompts, columns, samples=samples)


def _drive(
    kind: str,
    run: RunOptions,
    setup: _Setup,
    init: Callable,
    step: Callable,
    data: Any,
    evaluation: _Evaluation | None,
    *,
    max_tokens: int,
    jit: bool = True,
    stop_at: float = 0.0,
    resume: bool,
    display: Display | None,
) -> Outcome:
    """Runs the loop between a fresh or restored state and a finished run folder."""
    folder, key = Path(run.out), jax.random.key(run.seed)
    shapes = jax.eval_shape(init, key, jax.eval_shape(setup.initial))
    if setup.mesh is not None:
        parallel.state_shardings(shapes, setup.mesh)
    if jit:
        jax.eval_shape(step, shapes, data)  # what does not fit together is found before anything is written
    if resume:
        runs.read_config(folder)
    else:
        runs.check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
    example = setup.task.held_out[0].get("prompt", "")
    runs.write_model(
        folder,
        setup.transformer,
        setup.task.tokenizer,
        marker=setup.task.marker,
        max_tokens=max_tokens,
        example=example if isinstance(example, str) else "",
    )
    runs.write_config(folder, kind, run)
    state, done = _initial_state(folder, init, key, setup)
    log = metrics.MetricsLog(folder / runs.METRICS, after_step=done or -1)  # step 0 is evaluated anew
    spent = max((row.get("time/elapsed", 0.0) for row in metrics.read(log.path)), default=0.0)
    begun = time.perf_counter()
    elapsed = lambda: spent + time.perf_counter() - begun

    with contextlib.nullcontext(display) if display else Display() as view:
        name = evaluation.name if evaluation else ""
        scores_so_far = [(row["step"], row[name]) for row in metrics.read(log.path) if row.get(name) is not None]
        evaluated: tuple[int, float] = scores_so_far[-1] if scores_so_far else (-1, 0.0)

        def evaluate(step: int, metrics_now: dict[str, float], *, samples: bool = False) -> None:
            """Scores the held-out problems, once for each step, and shows a few where asked."""
            nonlocal evaluated
            if evaluation is None or (evaluated[0] == step and not samples):
                return
            score, texts, scores = evaluation.score(state.params)
            if evaluated[0] != step:
                log.write(step, {evaluation.name: score, "time/elapsed": elapsed()})
                view.note(f"  step {step}: {metrics_line({evaluation.name: score, **metrics_now})}")
            evaluated = (step, score)
            if samples:
                rows = list(zip(setup.task.held_out, texts, scores, strict=True))
                rows = rows[:: max(len(rows) // 6, 1)][:6]
                view.table(
                    f"held-out problems at step {step}, greedy",
                    ("prompt", "completion", "answer", "reward"),
                    [(str(r["prompt"]), text, str(r.get("answer", "")), f"{value:g}") for r, text, value in rows],
                )

        view.stage(kind.upper(), steps=run.steps, done=done)
        if done == 0:
            evaluate(0, {}, samples=True)
        last: dict[str, float] = {}
        reached = lambda: evaluated[0] == done and 0 < stop_at <= evaluated[1]
        finite = jax.jit(update.is_finite)
        steps = done if reached() else run.steps
        try:
            for progress in loop.run(step, state, data, steps=steps, chunk=run.chunk, jit=jit, patience=run.patience):
                state, last, first = progress.state, progress.metrics[-1], done
                done = progress.step
                rate = sum(row["throughput/tokens"] for row in progress.metrics) / max(progress.seconds, 1e-9)
                for number, row in enumerate(progress.metrics, first + 1):
                    log.write(number, {**row, "throughput/tokens_per_second": rate, "time/elapsed": elapsed()})
                view.update(done, last, rate=f"{rate:,.0f} tokens/s")
                if _crossed(first, done, run.eval_every):
                    evaluate(done, last)
                due = _crossed(first, done, run.save_every) or done == run.steps or reached()
                if due and finite(state.params):  # a bad state never pushes out a good one
                    checkpoint.save(folder / runs.CHECKPOINTS, done, state, keep=run.keep)
                if reached():
                    break
        except KeyboardInterrupt:
            view.note(f"interrupted; go on with: jaxrl train {kind} --resume {folder}")
            raise
        evaluate(done, last, samples=True)

    rows = list(metrics.read(log.path))
    plots.curves(rows, folder / "curves.png", title=f"{kind.upper()} on {run.data}")
    summary = {"kind": kind, "steps": done, "seconds": elapsed(), "skipped": int(state.skipped)}
    if evaluation is not None:
        name = evaluation.name.removeprefix("eval/")
        scores = [row[evaluation.name] for row in rows if evaluation.name in row]
        summary |= {f"{name}_before": scores[0], f"{name}_after": scores[-1]}
    summary |= {"config": config.to_json(run), **runs.environment()}
    runs.write_json(folder / runs.SUMMARY, summary)
    return Outcome(folder, summary, state)


def _initial_state(folder: Path, init: Callable, key: jax.Array, setup: _Setup) -> tuple[update.TrainState, int]:
    """The newest intact checkpoint of the folder, or a fresh state, laid out on the mesh."""
    shapes = jax.eval_shape(init, key, jax.eval_shape(setup.initial))
    places = None if setup.mesh is None else parallel.state_shardings(shapes, setup.mesh)
    if checkpoint.steps(folder / runs.CHECKPOINTS):
        if places is not None:
            place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
            shapes = jax.tree.map(place, shapes, places)
        return checkpoint.restore(folder / runs.CHECKPOINTS, shapes)
    state = jax.jit(init)(key, setup.initial())
    return (state if places is None else jax.device_put(state, places)), 0


def _crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never for 0."""
    return every > 0 and after // every > before // every
