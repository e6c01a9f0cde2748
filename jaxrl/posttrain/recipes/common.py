"""What every run is made of: its options, data and model, the loop, evaluation, checkpoints and the run folder."""

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
from jaxrl.posttrain import rewards, task, update
from jaxrl.posttrain.rollout import Sampling
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
    """A JSONL file, several with commas between them, a pattern, or built-in data: arithmetic, sloppy_arithmetic."""
    out: str = ""
    """Run folder; empty chooses runs/<kind>."""
    init: str = ""
    """Run folder, smollm2-135m, Hugging Face folder or .gguf file to start from; empty starts from nothing."""
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


class Outcome(NamedTuple):
    """What a run made: its folder, what `summary.json` holds, and the final train state."""

    folder: Path
    summary: dict[str, Any]
    state: update.TrainState


class Setup(NamedTuple):
    """A run's data and model, and the mesh they live on (None: one device)."""

    task: task.Task
    model: LanguageModel
    transformer: TransformerConfig
    initial: Callable[[], Any]
    mesh: Any

    def constrain(self, batch):
        return batch if self.mesh is None else parallel.shard_batch(batch, self.mesh)


class Evaluation(NamedTuple):
    """Greedy completions of the held-out problems and their scores."""

    name: str
    score: Callable[[Any], tuple[float, list[str], np.ndarray]]


def prepare(run: RunOptions, *, columns: tuple[str, ...], max_tokens: int, supervised: bool = False) -> Setup:
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
        content = lambda tokenizer: {k: v for k, v in tokenizer.to_json().items() if k != "file"}
        if run.tokenizer and content(work.tokenizer) != content(start.tokenizer):
            raise ValueError(
                f"--tokenizer {run.tokenizer} is not that of the model of {run.init}, whose ids mean something else; "
                "leave it out to use the model's own"
            )
    model = language_model(transformer)
    # one program in both cases, so that a resumed run gets the very same numbers
    initial = (lambda: start.params) if start else lambda: jax.jit(model.init)(jax.random.key(run.seed))
    return Setup(work, model, transformer, initial, parallel.make_mesh(run.mesh) if run.mesh else None)


def with_context(setup: Setup, length: int) -> Setup:
    """The setup with a model that takes rows of `length` tokens; its parameters do not depend on that."""
    if length <= setup.transformer.max_length:
        return setup
    transformer = dataclasses.replace(setup.transformer, max_length=length)
    return setup._replace(transformer=transformer, model=language_model(transformer))


def _longest(work: task.Task, max_tokens: int, *, supervised: bool) -> int:
    """Context needed: the longest prompt and the completion width, or the longest example that is learnt from."""
    lengths = [0]
    for records in (work.training, work.held_out):
        if all("prompt" in record for record in records):
            lengths.append(task.prompts_of(records, work.tokenizer).tokens.shape[1] + max_tokens)
        if supervised:
            lengths.append(task.longest_of(records, work.tokenizer))
    return max(lengths)


def answers_by_token(work: task.Task) -> bool:
    """Whether equal text means equal tokens: one token for each byte or character."""
    return work.tokenizer.to_json()["kind"] in ("byte", "char") and (not work.marker or marker_id(work) is not None)


def marker_id(work: task.Task) -> int | None:
    return work.tokenizer.token_id(work.marker) if work.marker else None


def exact_evaluation(setup: Setup, max_tokens: int) -> Evaluation:
    if not answers_by_token(setup.task):
        return text_evaluation(setup, max_tokens, partial(rewards.exact_text, marker=setup.task.marker), exact=True)
    held_out, tokenizer = setup.task.held_out, setup.task.tokenizer
    answers, marker = task.answers_of(held_out, tokenizer), marker_id(setup.task)
    compare = jax.jit(lambda completions: rewards.exact_answer(completions, answers, marker=marker))
    return greedy_evaluation("eval/accuracy", setup, max_tokens, compare)


def text_evaluation(setup: Setup, max_tokens: int, reward: rewards.Reward, *, exact: bool) -> Evaluation:
    held_out, tokenizer = setup.task.held_out, setup.task.tokenizer
    score = lambda completions: score_texts(reward, completions, held_out, tokenizer, samples=1).values
    return greedy_evaluation("eval/accuracy" if exact else "eval/reward", setup, max_tokens, score)


def greedy_evaluation(name: str, setup: Setup, max_tokens: int, score: Callable) -> Evaluation:
    prompts = task.prompts_of(setup.task.held_out, setup.task.tokenizer)
    greedy = Sampling(temperature=0.0, max_tokens=max_tokens)
    generate = task.make_generate(setup.model, setup.task.tokenizer, greedy)

    def evaluate(params):
        completions = jax.device_get(generate(params, prompts, jax.random.key(0)))
        scores = np.asarray(score(completions), np.float32)
        known = scores[~np.isnan(scores)]
        return float(known.mean() if known.size else np.nan), task.text_of(completions, setup.task.tokenizer), scores

    return Evaluation(name, evaluate)


def score_texts(reward, completions: Rollout, records: list, tokenizer: Tokenizer, *, samples: int) -> rewards.Scored:
    names = set().union(*records) - {"prompt", "completion"}
    columns = {name: [record.get(name) for record in records] for name in sorted(names)}
    prompts = [record["prompt"] for record in records]
    return rewards.score_parts(reward, completions, tokenizer, prompts, columns, samples=samples)


def drive(
    kind: str,
    run: RunOptions,
    setup: Setup,
    init: Callable,
    step: Callable,
    data: Any,
    evaluation: Evaluation | None,
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
                    f"held-out at step {step}",
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


def _initial_state(folder: Path, init: Callable, key: jax.Array, setup: Setup) -> tuple[update.TrainState, int]:
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
