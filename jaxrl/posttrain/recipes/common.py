"""What every run is made of: its options, data and model, the loop, evaluation, checkpoints and the run folder."""

import contextlib
import dataclasses
import json
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from jaxrl import checkpoint, config, loop, metrics, parallel, plots, runs
from jaxrl.display import Display, metrics_line
from jaxrl.nets.adapters import RULES, Adapter
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.parallel import faults, processes
from jaxrl.posttrain import adapter as adapting
from jaxrl.posttrain import apart, rewards, task, update
from jaxrl.posttrain.adapter import AdapterOptions
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.task import score_texts as score_texts


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder to start from nothing. Vocabulary and context follow from the data. Of a model from `init`, remat and
    dtype change what they are set to; the rest is its own."""

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
    """Devices, such as data=2,fsdp=4; auto is all of them on fsdp, empty is one device."""
    zero: int = 3
    """What fsdp divides: 1 the optimizer state, 2 gradients too, 3 parameters too."""
    cache: str = ""
    """Type of the sampler's keys and values: float32, bfloat16 or int8; empty is the type the model computes in."""
    adapter: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    """What is trained in the place of all parameters of `init`."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: update.OptimizerConfig = dataclasses.field(default_factory=update.OptimizerConfig)


class Outcome(NamedTuple):
    """What a run made: its folder, what `summary.json` holds, and the final train state (`Over` with an adapter)."""

    folder: Path
    summary: dict[str, Any]
    state: Any


class Setup(NamedTuple):
    """A run's data and model, the mesh they live on (None: one device), and the adapter (None: all is trained).

    `sampler`: the mesh to sample on, where it is another.

    `base`: the functions of the model that is started from, `initial` makes its parameters. `origin`: what
    `runs.load_model` must know to put an adapter's base back.
    """

    task: task.Task
    base: LanguageModel
    transformer: TransformerConfig
    initial: Callable[[], Any]
    mesh: Any
    adapter: Adapter | None = None
    origin: dict[str, Any] | None = None
    zero: int = 3
    sampler: Any = None

    @property
    def model(self) -> LanguageModel:
        """The functions of the model that is trained, of parameters as `adapter.whole` gives them."""
        return self.base if self.adapter is None else adapting.carried(self.base, self.adapter)

    def recipe(
        self, run: "RunOptions", make: Callable, *, rows: int, updates: int = 1, moving_reference: bool = False
    ) -> Any:
        """A recipe's functions, of all parameters or over a frozen base.

        Args:
          run: its options.
          make: `(model, optimizer, *, max_grad_norm, constrain) -> NamedTuple of functions`.
          rows: that go through the network at a time, mini- and micro-batches taken into account.
          updates: of a step.
          moving_reference: whether it changes `state.reference`.
        """
        optimizer = run.adapter.optimizer(update.make_optimizer(run.optimizer), updates=run.steps * updates)
        if self.mesh is not None:
            parallel.check_rows("the batch, in its mini- and micro-batches,", rows, self.mesh)
            optimizer = parallel.place_gradients(optimizer, self.mesh, rules=self.rules, zero=self.zero)
        of = partial(make, optimizer=optimizer, max_grad_norm=run.optimizer.max_grad_norm, constrain=self.constrain)
        if self.adapter is None:
            return of(self.base)
        return adapting.over(of, self.base, self.adapter, moving_reference=moving_reference)

    def reference(self) -> Any:
        """Parameters for `model` of what the run starts from, without its adapter."""
        return self.initial() if self.adapter is None else adapting.join(self.initial(), None)

    @property
    def rules(self) -> tuple:
        """Of sharding."""
        return parallel.RULES if self.adapter is None else (*RULES, *parallel.RULES)

    def shardings(self, tree: Any) -> Any:
        """Where the leaves of a tree lie on the mesh, or on the two of them."""
        if isinstance(tree, apart.Apart):
            return apart.shardings(tree, self.shardings, self.sampler_shardings, self.sampler)
        return parallel.state_shardings(tree, self.mesh, rules=self.rules, zero=self.zero)

    def report(self, shapes: Any) -> str:
        """What each leaf of a state on the mesh got."""
        return parallel.report(shapes, self.mesh, rules=self.rules, zero=self.zero)

    def sampler_shardings(self, tree: Any) -> Any:
        """Where the leaves of a tree lie on the mesh to sample on."""
        return parallel.state_shardings(tree, self.sampler, rules=self.rules)

    def constrain(self, batch):
        return batch if self.mesh is None else parallel.shard_batch(batch, self.mesh)


class Evaluation(NamedTuple):
    """Greedy completions of the held-out problems and their scores."""

    name: str
    score: Callable[[Any], tuple[float, list[str], np.ndarray]]


def prepare(
    run: RunOptions,
    *,
    columns: tuple[str, ...],
    max_tokens: int,
    supervised: bool = False,
    sampler_mesh: str = "",
) -> Setup:
    """Reads data and model; everything that can be wrong with them is found here."""
    adapter = run.adapter.build()
    if adapter is not None and not run.init:
        raise ValueError(
            f"adapter kind is {run.adapter.kind}, which stands on a trained base, and there is none; name it: --init"
        )
    with parallel.on_host() if run.mesh else contextlib.nullcontext():  # no device need hold all of a model
        start = runs.load_model(run.init) if run.init else None
    if start and isinstance(start.params, dict) and "adapter" in start.params:
        raise ValueError(
            f"{run.init} is an adapter that cannot be merged into its base, and no base for another run; use it as it "
            "is, or start from what it was trained on"
        )
    tokenizer = start.tokenizer if start and not run.tokenizer else run.tokenizer
    marker = run.marker or (start.marker if start and run.data not in task.BUILT_IN else "")
    work = task.load_task(run.data, tokenizer=tokenizer, marker=marker, held_out=run.held_out, columns=columns)
    longest = _longest(work, max_tokens, supervised=supervised)
    if start is None:
        fields = {f.name: getattr(run.model, f.name) for f in dataclasses.fields(run.model)}
        transformer = TransformerConfig(vocab_size=work.tokenizer.vocab_size, max_length=longest, **fields)
    else:
        given = {name: getattr(run.model, name) for name in ("dtype", "remat")}
        changes = {name: value for name, value in given.items() if value != getattr(ModelConfig, name)}
        length = max(longest, start.transformer.max_length)
        transformer = dataclasses.replace(start.transformer, max_length=length, **changes)
        content = lambda tokenizer: {k: v for k, v in tokenizer.to_json().items() if k != "file"}
        if run.tokenizer and content(work.tokenizer) != content(start.tokenizer):
            raise ValueError(
                f"--tokenizer {run.tokenizer} is not that of the model of {run.init}, whose ids mean something else; "
                "leave it out to use the model's own"
            )
    if run.cache:
        transformer = dataclasses.replace(transformer, cache_dtype=run.cache)
    mesh, sampler = parallel.make_mesh(run.mesh) if run.mesh and not sampler_mesh else None, None
    if sampler_mesh:
        mesh, sampler = apart.two_meshes(run.mesh, sampler_mesh)
    model, key = _model(transformer, mesh), jax.random.key(run.seed)
    origin = runs.origin(run.adapter, run.init, start.params) if start and adapter is not None else None
    # one program in both cases, so that a resumed run gets the very same numbers
    setup = Setup(work, model, transformer, lambda: jax.jit(model.init)(key), mesh, adapter, origin, run.zero, sampler)
    if start:
        params = run.adapter.frozen(start.params)
        laid_out = lambda: processes.everywhere(params, setup.shardings(params))
        return setup._replace(initial=(lambda: params) if mesh is None else laid_out)
    if mesh is not None:
        places = setup.shardings(jax.eval_shape(model.init, key))
        return setup._replace(initial=lambda: jax.jit(model.init, out_shardings=places)(key))
    return setup


def _model(transformer: TransformerConfig, mesh: Any) -> LanguageModel:
    return language_model(transformer) if mesh is None else parallel.model_on(transformer, mesh)


def with_context(setup: Setup, length: int) -> Setup:
    """The setup with a model that takes rows of `length` tokens; its parameters do not depend on that."""
    if length <= setup.transformer.max_length:
        return setup
    transformer = dataclasses.replace(setup.transformer, max_length=length)
    return setup._replace(transformer=transformer, base=_model(transformer, setup.mesh))


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
    """The marker's token; None without a marker, or where it is no single token."""
    return work.tokenizer.token_id(work.marker) if work.marker else None


def exact_evaluation(setup: Setup, max_tokens: int) -> Evaluation:
    """Share of held-out problems whose greedy completion ends in the right answer."""
    if not answers_by_token(setup.task):
        return text_evaluation(setup, max_tokens, partial(rewards.exact_text, marker=setup.task.marker), exact=True)
    held_out, tokenizer = setup.task.held_out, setup.task.tokenizer
    answers, marker = task.answers_of(held_out, tokenizer), marker_id(setup.task)
    compare = jax.jit(lambda completions: rewards.exact_answer(completions, answers, marker=marker))
    return greedy_evaluation("eval/accuracy", setup, max_tokens, compare)


def text_evaluation(setup: Setup, max_tokens: int, reward: rewards.Reward, *, exact: bool) -> Evaluation:
    """Mean Python reward of greedy completions of the held-out problems; `exact`: it is an accuracy."""
    held_out, tokenizer = setup.task.held_out, setup.task.tokenizer
    score = lambda completions: score_texts(reward, completions, held_out, tokenizer, samples=1).values
    return greedy_evaluation("eval/accuracy" if exact else "eval/reward", setup, max_tokens, score)


def greedy_evaluation(
    name: str, setup: Setup, max_tokens: int, score: Callable, *, generate: Callable | None = None
) -> Evaluation:
    """Mean score of greedy completions of the held-out problems.

    Args:
      name: of the metric.
      setup, max_tokens: model, problems, and the width of a completion.
      score: `(Rollout on the host) -> [N]` numbers, NaN where there is none.
      generate: `(params, prompts, key) -> Rollout`; None is the plain sampler.
    """
    prompts = task.prompts_of(setup.task.held_out, setup.task.tokenizer)
    greedy = Sampling(temperature=0.0, max_tokens=max_tokens)
    generate = generate or task.make_generate(setup.model, setup.task.tokenizer, greedy)

    def evaluate(params):
        completions = processes.fetch(generate(params, prompts, jax.random.key(0)))
        scores = processes.on_main(lambda: np.asarray(score(completions), np.float32).tolist())
        scores = np.asarray(scores, np.float32)
        known = scores[~np.isnan(scores)]
        return float(known.mean() if known.size else np.nan), task.text_of(completions, setup.task.tokenizer), scores

    return Evaluation(name, evaluate)


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
    begin: Callable | None = None,
    alone: str = "",
    stop_at: float = 0.0,
    resume: bool,
    display: Display | None,
) -> Outcome:
    """Runs the loop between a fresh or restored state and a finished run folder.

    `begin`: `(state, data) -> state`, what else is done before the first step. `alone`: what several processes cannot
    share; empty: nothing.
    """
    folder, key = Path(run.out), jax.random.key(run.seed)
    shapes = jax.eval_shape(init, key, jax.eval_shape(setup.initial))
    if setup.adapter is not None and not isinstance(shapes, adapting.Over):
        raise ValueError(f"jaxrl train {kind} takes no adapter; leave --adapter.kind {run.adapter.kind} out")
    if setup.mesh is not None:
        setup.shardings(shapes)
    if jit:
        jax.eval_shape(step, shapes, data)  # what does not fit together is found before anything is written
    _check_processes(run, data, alone=alone)
    written = processes.on_main(partial(_begin, folder, kind, run, setup, max_tokens=max_tokens, resume=resume))
    if setup.mesh is not None:
        processes.on_main(lambda: (folder / runs.SHARDING).write_text(setup.report(shapes) + "\n"))
    processes.same(f"run folder {folder}, or none (all must see it)", _seen(folder / runs.CONFIG, written))
    state, done = _initial_state(folder, init, key, setup, begin and partial(begin, problems=data))
    if setup.mesh is not None and jit:
        data = processes.everywhere(data, NamedSharding(setup.mesh, PartitionSpec()))
    log = metrics.MetricsLog(folder / runs.METRICS, after_step=done or -1) if processes.is_main() else None

    def past() -> tuple[float, int, float]:
        """Seconds of the run until now; step and score of the last evaluation."""
        rows = list(metrics.read(folder / runs.METRICS))
        name = evaluation.name if evaluation else ""
        scores = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        return max((row.get("time/elapsed", 0.0) for row in rows), default=0.0), *(scores or [(-1, 0.0)])[-1]

    spent, *evaluated = processes.on_main(past)
    begun = time.perf_counter()
    elapsed = lambda: spent + time.perf_counter() - begun

    def write(step: int, row: dict[str, float]) -> None:
        if log is not None:
            log.write(step, {**row, "time/elapsed": elapsed()})

    with contextlib.nullcontext(display) if display else _display() as view, faults.preemption() as told_to_stop:

        def evaluate(step: int, metrics_now: dict[str, float], *, samples: bool = False) -> None:
            """Scores the held-out problems, once for each step, and shows a few where asked."""
            nonlocal evaluated
            if evaluation is None or (evaluated[0] == step and not samples):
                return
            score, texts, scores = evaluation.score(adapting.whole(state))
            if evaluated[0] != step:
                write(step, {evaluation.name: score})
                view.note(f"  step {step}: {metrics_line({evaluation.name: score, **metrics_now})}")
            evaluated = [step, score]
            if samples:
                rows = list(zip(setup.task.held_out, texts, scores, strict=True))
                rows = rows[:: max(len(rows) // 6, 1)][:6]
                view.table(
                    f"held-out at step {step}",
                    ("prompt", "completion", "answer", "reward"),
                    [(str(r["prompt"]), text, str(r.get("answer", "")), f"{value:g}") for r, text, value in rows],
                )

        if processes.count() > 1:
            view.note(
                f"{processes.count()} processes with {jax.device_count()} devices; if one is lost the others end: then "
                f"start all of them again with: jaxrl train {kind} --resume {folder}"
            )
        view.stage(kind.upper(), steps=run.steps, done=done)
        if done == 0:
            evaluate(0, {}, samples=True)
        elif _crossed(done - (done % run.chunk or run.chunk), done, run.eval_every):
            evaluate(done, {})  # where it stopped before its evaluation
        last: dict[str, float] = {}
        reached = lambda: evaluated[0] == done and 0 < stop_at <= evaluated[1]
        finite = jax.jit(update.is_finite)
        steps = done if reached() else run.steps
        free = time.perf_counter()
        suspect = reported = -1  # the process that was too slow in the last chunk; that of which a word was said
        try:
            for progress in loop.run(step, state, data, steps=steps, chunk=run.chunk, jit=jit, patience=run.patience):
                state, last, first = progress.state, progress.metrics[-1], done
                done = progress.step
                waited = time.perf_counter() - free - progress.seconds - progress.compile_seconds
                pace = faults.meet(stop=told_to_stop(), host=waited, chunk=progress.seconds)
                free = time.perf_counter()
                rate = sum(row["throughput/tokens"] for row in progress.metrics) / max(progress.seconds, 1e-9)
                extra = {"throughput/tokens_per_second": rate}
                if processes.count() > 1:
                    extra["time/slowest_process"] = pace.factor
                for number, row in enumerate(progress.metrics, first + 1):
                    write(number, row | extra)
                view.update(done, last, rate=f"{rate:,.0f} tokens/s")
                suspect, before = pace.slowest if pace.straggles else -1, suspect
                if suspect >= 0 and suspect == before != reported:
                    reported = suspect
                    view.note(f"  step {done}: {pace.complaint()}")
                if _crossed(first, done, run.eval_every) and not pace.stop:
                    evaluate(done, last)
                due = _crossed(first, done, run.save_every) or done == run.steps or reached() or pace.stop
                if due and finite(state.params):  # a bad state never pushes out a good one
                    checkpoint.save(folder / runs.CHECKPOINTS, done, adapting.trained(state), keep=run.keep)
                if pace.stop and done < run.steps:
                    view.note(f"told to stop after step {done}; go on with: jaxrl train {kind} --resume {folder}")
                    raise faults.Preempted()
                if reached():
                    break
        except KeyboardInterrupt:
            view.note(f"interrupted; go on with: jaxrl train {kind} --resume {folder}")
            raise
        evaluate(done, last, samples=True)

    def finish() -> dict[str, Any]:
        rows = list(metrics.read(folder / runs.METRICS))
        plots.curves(rows, folder / "curves.png", title=f"{kind.upper()} on {run.data}")
        summary = {"kind": kind, "steps": done, "seconds": elapsed(), "skipped": int(adapting.trained(state).skipped)}
        if evaluation is not None:
            name = evaluation.name.removeprefix("eval/")
            scores = [row[evaluation.name] for row in rows if evaluation.name in row]
            summary |= {f"{name}_before": scores[0], f"{name}_after": scores[-1]}
        summary |= {"config": config.to_json(run), **runs.environment()}
        runs.write_json(folder / runs.SUMMARY, summary)
        return summary

    return Outcome(folder, processes.on_main(finish), state)


def _seen(file: Path, expected: int, *, seconds: float = 60.0) -> int:
    """Checksum of a file, 0 of none; a network file system gets some time to show the one that was written."""
    until = time.monotonic() + seconds
    while (found := zlib.crc32(file.read_bytes()) if file.is_file() else 0) != expected and time.monotonic() < until:
        time.sleep(1.0)
    return found


def _display() -> Display:
    """Of process 0; the others say nothing."""
    return Display() if processes.is_main() else Display(Console(quiet=True))


def _check_processes(run: RunOptions, data: Any, *, alone: str) -> None:
    """Raises ValueError where several processes cannot do this run together, or do not mean the same one."""
    count = processes.count()
    if count == 1:
        return
    if not run.mesh:
        raise ValueError(
            f"{count} processes with {jax.device_count()} devices have no mesh; give --mesh auto or "
            f"--mesh fsdp={jax.device_count()}, or start one process"
        )
    if alone:
        raise ValueError(f"{count} processes cannot share a run with {alone}; leave it out, or start one process")
    said = json.dumps([config.to_json(run), runs.environment()["versions"]])
    sums = [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(data)]
    processes.same("options, data or versions", zlib.crc32(f"{said} {sums}".encode()))


def _begin(folder: Path, kind: str, run: RunOptions, setup: Setup, *, max_tokens: int, resume: bool) -> int:
    """Checks the run folder and writes what makes it one; the checksum of its config."""
    if resume:
        runs.read_config(folder)
        runs.check_origin(folder, setup.origin)
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
        origin=setup.origin,
    )
    runs.write_config(folder, kind, run)
    return zlib.crc32((folder / runs.CONFIG).read_bytes())


def _initial_state(
    folder: Path, init: Callable, key: jax.Array, setup: Setup, begin: Callable | None
) -> tuple[Any, int]:
    """The newest intact checkpoint of the folder, or a fresh state, laid out on the mesh."""
    fresh = lambda key, start: adapting.trained(init(key, start))
    shapes = jax.eval_shape(fresh, key, jax.eval_shape(setup.initial))
    at_first = shapes
    shapes = shapes if begin is None else jax.eval_shape(begin, shapes)
    places = None if setup.mesh is None else setup.shardings(shapes)
    if processes.on_main(lambda: len(checkpoint.steps(folder / runs.CHECKPOINTS))):
        if places is not None:
            place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
            shapes = jax.tree.map(place, shapes, places)
        state, done = checkpoint.restore(folder / runs.CHECKPOINTS, shapes)
    else:
        out = None if places is None else setup.shardings(at_first)
        state, done = jax.jit(fresh, out_shardings=out)(key, setup.initial()), 0
        state = state if begin is None else begin(state)
    if setup.adapter is None:
        return state, done
    return adapting.Over(setup.initial(), state), done


def _crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never for 0."""
    return every > 0 and after // every > before // every
