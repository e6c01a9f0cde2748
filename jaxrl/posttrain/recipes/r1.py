"""`jaxrl train r1`: the pipeline of DeepSeek-R1 as ordinary runs in subfolders, each resumed by itself.

DeepSeek-AI 2025, arXiv 2501.12948, sections 2.2 to 2.4. `zero` is R1-Zero; the others lead to R1 and its students.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl import config, runs
from jaxrl.data.digit_sums import ALPHABET, MARKER, digit_sums, worked
from jaxrl.data.sources import Record
from jaxrl.data.split import split_by_problem
from jaxrl.display import Display
from jaxrl.posttrain import long2short, reward_model, rewards, task, update
from jaxrl.posttrain.distill import DistillConfig
from jaxrl.posttrain.grpo import GRPOConfig
from jaxrl.posttrain.recipes.common import ModelConfig, RunOptions
from jaxrl.posttrain.recipes.distill import DistillRun, train_distill
from jaxrl.posttrain.recipes.grpo import GRPORun, train_grpo
from jaxrl.posttrain.recipes.sft import SFTRun, train_sft
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.sft import SFTConfig

STAGES = ("zero", "cold_start", "reasoning", "rejection", "sft2", "all", "distill", "distill_on_policy")
"""In the order in which they are run."""

TOY = "digit_sums"


@dataclasses.dataclass(frozen=True)
class Steps:
    """Updates of each stage."""

    base: int = 800
    zero: int = 60
    cold_start: int = 60
    reasoning: int = 40
    sft2: int = 300
    all: int = 30
    distill: int = 4000
    distill_on_policy: int = 100


@dataclasses.dataclass(frozen=True)
class R1Run:
    """DeepSeek-R1: zero, cold start, reasoning, rejection sampling, a second SFT, RL on everything, students."""

    stages: str = "zero,cold_start,reasoning,rejection,sft2,all,distill"
    """Which to run, of zero, cold_start, reasoning, rejection, sft2, all, distill, distill_on_policy."""
    data: str = TOY
    """JSONL with prompt and answer, or digit_sums: made-up problems that need no file."""
    init: str = ""
    """Base model: a run folder or a published model; empty trains one on digit_sums first."""
    out: str = ""
    """Folder of the pipeline; empty is runs/r1."""
    cold_start: str = ""
    """JSONL of clean worked examples; empty samples them from the model of `zero`."""
    other: str = ""
    """JSONL files mixed into the second SFT, with commas between them: what is not reasoning."""
    all_data: str = ""
    """JSONL of further prompts for the stage `all`, with commas between files."""
    all_reward: str = ""
    """Reward of that stage, such as a sum with a file's own function; empty is that of `reasoning`."""
    all_reward_model: str = ""
    """Folder of `jaxrl train rm`, whose score is the reward of that stage's problems without an answer; empty gives
    them that of the others."""
    student: str = ""
    """Model that is distilled into; empty is a new one of `student_model`."""
    accuracy: str = "exact(marker='=')"
    """Reward of a right answer, 0 or 1."""
    format: str = "format(pattern='...=...', allow_empty=True)"
    """Reward of the form, 0 to 1; tags such as <think>...</think><answer>...</answer> for models that know them."""
    language: str = "language(language=en)"
    """Share of the wanted language, from the stage `reasoning` on; empty is none."""
    format_weight: float = 0.2
    language_weight: float = 0.2
    clean: float = 0.95
    """Share of the wanted language in completions that are learnt from, besides a right answer and the form."""
    samples: int = 4
    """Completions of each problem in rejection sampling; all that are right and clean are kept."""
    problems: int = 4096
    """Training problems that rejection sampling takes, at most."""
    held_out: int = 256
    """Problems kept out of all stages, on which each stage's model is measured."""
    seed: int = 0
    chunk: int = 10
    """Steps compiled into one program; metrics and checkpoints come between."""
    save_every: int = 20
    """Steps between checkpoints."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """Of the base model that is trained first where there is no `init`."""
    student_model: ModelConfig = dataclasses.field(default_factory=lambda: ModelConfig(width=32, ffn=128))
    steps: Steps = dataclasses.field(default_factory=Steps)
    sft: SFTConfig = dataclasses.field(default_factory=lambda: SFTConfig(batch=64))
    sft_optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=6e-3, warmup_steps=20, decay="cosine")
    )
    """Of the supervised stages; a decay ends with each stage where decay_steps is 0."""
    grpo: GRPOConfig = dataclasses.field(
        default_factory=lambda: GRPOConfig(kl_coef=0.001, sampling=Sampling(max_tokens=16))
    )
    rl_optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=5e-4, warmup_steps=5)
    )

    def __post_init__(self):
        unknown = [name for name in self.chosen if name not in STAGES]
        if unknown or not self.chosen:
            raise ValueError(
                f"stages is {self.stages!r} with {unknown or 'no stage'}; expected some of {','.join(STAGES)}"
            )
        if self.data != TOY and not self.init:
            raise ValueError(f"data is {self.data!r} and init is empty; only {TOY} has a base model of its own")

    @property
    def chosen(self) -> list[str]:
        return [name.strip() for name in self.stages.split(",") if name.strip()]


class Pipeline(NamedTuple):
    """The folder, and what its `summary.json` holds; `stages` are the measures of each."""

    folder: Path
    summary: dict[str, Any]


def train_r1(run: R1Run, *, resume: bool = False, display: Display | None = None) -> Pipeline:
    """Runs the stages that are not done yet, one after the other.

    zero: GRPO on the base model, accuracy + format. cold_start: SFT of the base model on short clean completions.
    reasoning: GRPO on it, accuracy + format + language. rejection: its right and clean completions as records. sft2:
    SFT of the base model on them and on `other`. all: GRPO on that, on all prompts, by rules and `all_reward_model`.
    distill: SFT of a smaller model on the records. distill_on_policy: that student graded by the model of `all`.

    A stage whose folder has a `summary.json` is skipped, one with checkpoints goes on from there; so the same call
    continues a killed pipeline, and other `stages` add to it.

    Args:
      run: the config.
      resume: the folder holds a pipeline already.
      display: where to show progress; None makes one.

    Raises:
      ValueError: a stage whose model of an earlier stage is not there, a folder with another pipeline, or what the
        recipes find wrong.
    """
    run = dataclasses.replace(run, out=run.out or "runs/r1")
    folder, begun = Path(run.out), time.perf_counter()
    if resume:
        _check_same(run, runs.read_config(folder)[1])
    else:
        runs.check_new(folder)
    for name in run.chosen:
        missing = [need for need in _needs(run, name) if need not in run.chosen and not _done(folder / need)]
        if missing:
            raise ValueError(
                f"stage {name} needs {missing[0]}, which {folder} does not have; run it first: --stages "
                f"{','.join(stage for stage in STAGES if stage in {*missing, *run.chosen})}"
            )
    for spec in filter(None, (" + ".join(_parts(run, language=True)), run.all_reward)):
        rewards.load_reward(spec)
    if run.all_reward_model:
        reward_model.load(run.all_reward_model)
    for data in filter(None, (run.cold_start, run.other, run.all_data)):
        task.load_records(data, columns=())
    split = None if _has_data(folder) else _split(run)
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_config(folder, "r1", run)
    if split is not None:
        for name, records in split.items():
            write_lines(folder / "data" / f"{name}.jsonl", records)
    held_out = task.load_records(str(folder / "data" / "held_out.jsonl"), columns=("prompt",))
    names = ([] if run.init else ["base"]) + [name for name in STAGES if name in run.chosen]
    with display or Display() as view:
        for name in names:
            if not _done(folder / name):
                _run_stage(run, name, view)
        found = {"base": _measured(run, folder / "base", run.init or str(folder / "base"), held_out)}
        for name in STAGES:
            if _done(folder / name):
                place = str(folder / name)
                own = json.loads((folder / name / runs.SUMMARY).read_text())
                found[name] = {"steps": own["steps"]} if "steps" in own else own
                if name != "rejection":
                    found[name] |= _measured(run, folder / name, place, held_out)
        columns = ("accuracy", "length", "format", "language", "records", "failed")
        shown = lambda value: "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
        view.table(f"after each stage, {len(held_out)} held-out problems", ("stage", *columns), [
            (name, *(shown(row.get(column)) for column in columns)) for name, row in found.items()
        ])  # fmt: skip
    seconds = time.perf_counter() - begun
    summary = {"kind": "r1", "stages": found, "seconds": seconds, "config": config.to_json(run)} | runs.environment()
    runs.write_json(folder / runs.SUMMARY, summary)
    return Pipeline(folder, summary)


def next_steps(folder: str | Path) -> str:
    """What to do with a pipeline, one command a line."""
    done = [name for name in STAGES if name != "rejection" and _done(Path(folder) / name)]
    lines = [f"jaxrl chat {Path(folder) / name}" for name in done[-2:]]
    return "\n".join([*lines, f"jaxrl train r1 --resume {folder} --stages {','.join(STAGES)}"])


def _needs(run: R1Run, name: str) -> tuple[str, ...]:
    return {
        "cold_start": () if run.cold_start else ("zero",),
        "reasoning": ("cold_start",),
        "rejection": ("reasoning",),
        "sft2": ("rejection",),
        "all": ("sft2",),
        "distill": ("rejection",),
        "distill_on_policy": ("all", "distill"),
    }.get(name, ())


def _run_stage(run: R1Run, name: str, view: Display) -> None:
    """One stage, from where it stands to its `summary.json`."""
    folder, file = Path(run.out), lambda part: str(Path(run.out) / "data" / f"{part}.jsonl")
    base, number = run.init or str(folder / "base"), STAGES.index(name) + 1 if name in STAGES else 0
    common: dict[str, Any] = {
        "out": str(folder / name),
        "seed": run.seed + 1000 * number,
        "steps": getattr(run.steps, name, 0),
        "chunk": run.chunk,
        "save_every": run.save_every,
        "eval_every": 0,
    }
    steps = max(run.sft_optimizer.decay_steps or common["steps"], run.sft_optimizer.warmup_steps + 1)
    tuned = {
        "sft": run.sft,
        "optimizer": dataclasses.replace(run.sft_optimizer, decay_steps=steps),
        "max_tokens": run.grpo.sampling.max_tokens,
    }
    reinforced = {"grpo": run.grpo, "optimizer": run.rl_optimizer, "held_out": 64}
    shaped = " + ".join(_parts(run, language=True))
    train: Callable = train_grpo
    if name == "rejection":
        return _reject(run, base=str(folder / "reasoning"), out=folder / name, view=view)
    if name == "base":
        train, options = train_sft, SFTRun(
            **common, **tuned, data=file("base"), tokenizer=f"char:{ALPHABET}", marker=MARKER, held_out=64,
            model=run.model,
        )  # fmt: skip
    elif name == "zero":
        reward = " + ".join(_parts(run, language=False))
        options = GRPORun(**common, **reinforced, init=base, data=file("training"), reward=reward)
    elif name == "cold_start":
        data = run.cold_start or file("cold_start")
        if not run.cold_start and not Path(data).exists():
            kept, failed = _kept(run, str(folder / "zero"), keep="shortest")
            view.note(f"cold_start: {len(kept)} short clean completions; {failed} problems have none")
            write_lines(Path(data), kept)
        train, options = train_sft, SFTRun(**common, **tuned, init=base, data=data, held_out=_share(data, name, run))
    elif name == "reasoning":
        init = str(folder / "cold_start")
        options = GRPORun(**common, **reinforced, init=init, data=file("training"), reward=shaped)
    elif name == "sft2":
        data = ",".join(filter(None, [str(folder / "rejection" / "records.jsonl"), run.other]))
        train, options = train_sft, SFTRun(**common, **tuned, init=base, data=data, held_out=_share(data, name, run))
    elif name == "all":
        data = ",".join(filter(None, [file("training"), run.all_data]))
        reward = run.all_reward or shaped
        if run.all_reward_model:
            reward = _with_model(reward, run.all_reward_model, folder / "data" / "all_reward.py")
        options = GRPORun(**common, **reinforced, init=str(folder / "sft2"), data=data, reward=reward)
    elif name == "distill":
        data = str(folder / "rejection" / "records.jsonl")
        known = {} if run.student else {"model": run.student_model, **_reads(folder / "reasoning")}
        train, options = train_sft, SFTRun(
            **common, **tuned, **known, init=run.student, data=data, held_out=_share(data, name, run)
        )  # fmt: skip
    else:
        graded = DistillConfig(prompts=run.grpo.prompts, beta=1.0, sampling=run.grpo.sampling)
        train, options = train_distill, DistillRun(
            **common, distill=graded, teacher=str(folder / "all"), init=str(folder / "distill"), held_out=64,
            data=file("training"), optimizer=run.rl_optimizer,
        )  # fmt: skip
    assert isinstance(options, RunOptions)
    train(options, resume=(Path(options.out) / runs.CONFIG).exists(), display=view)


def _with_model(rules: str, model: str, file: Path) -> str:
    """Writes the reward as a file, so that the stage's config names all of it."""
    file.write_text(
        "from jaxrl.posttrain.learned_reward import learned_reward, where_answered\n"
        "from jaxrl.posttrain.rewards import load_reward\n\n"
        f"reward = where_answered(load_reward({rules!r}), learned_reward({model!r}))\n"
    )
    return f"{file}:reward"


def _parts(run: R1Run, *, language: bool) -> list[str]:
    """The terms of a reward, as `rewards.load_reward` reads their sum."""
    terms = [run.accuracy, f"{run.format_weight}*{run.format}" if run.format else ""]
    return [*filter(None, terms), *([f"{run.language_weight}*{run.language}"] if language and run.language else [])]


def _kept(run: R1Run, place: str, *, keep: str) -> tuple[list[Record], int]:
    """Right and clean completions of a stage's model, as prompt + completion."""
    records = task.load_records(str(Path(run.out) / "data" / "training.jsonl"), columns=("prompt",))[: run.problems]
    model = runs.load_model(place)
    drawn = long2short.sample(
        model.language_model, model.params, model.tokenizer, records,
        rewards.load_reward(" + ".join(_parts(run, language=True))), jax.random.key(run.seed + 7),
        sampling=run.grpo.sampling, samples=run.samples,
    )  # fmt: skip
    weights = (run.format_weight if run.format else 0.0) + (run.language_weight * run.clean if run.language else 0.0)
    kept, failed = long2short.select(drawn, keep=keep, solved=1.0 + weights - 1e-4)
    return [{name: record[name] for name in ("prompt", "completion")} for record in kept], failed


def _reject(run: R1Run, *, base: str, out: Path, view: Display) -> None:
    kept, failed = _kept(run, base, keep="all")
    write_lines(out / "records.jsonl", kept)
    problems = len({json.dumps(record["prompt"]) for record in kept})
    view.note(f"rejection: {len(kept)} completions of {problems} problems; {failed} problems have none")
    runs.write_json(out / runs.SUMMARY, {"records": len(kept), "problems": problems, "failed": failed})


def _share(data: str, name: str, run: R1Run) -> int:
    """Problems that a supervised stage holds out for itself, a tenth and at most 64."""
    records = task.load_records(data, columns=())
    left = len(records) - max(len(records) // 10, 1)
    if left < run.sft.batch:
        raise ValueError(
            f"stage {name} has {len(records)} records, too few for a batch of {run.sft.batch} with some held out; "
            "raise --problems or --samples, lower --sft.batch, or train the stage before it for longer"
        )
    return min(max(len(records) // 10, 1), 64)


def _measured(run: R1Run, folder: Path, place: str, held_out: Sequence[Record]) -> dict[str, float | None]:
    """What a model does with the held-out problems, in four samples of each at temperature 1: accuracy (pass@1), mean
    length, form and language. Computed once and kept in the stage's folder."""
    file = folder / "measured.json"
    if file.exists():
        return json.loads(file.read_text())
    model = runs.load_model(place)
    right = rewards.load_reward(run.accuracy)
    others = {"format": run.format, "language": run.language}
    parts = {name: rewards.load_reward(spec) for name, spec in others.items() if spec}
    seen: dict[str, list[float]] = {name: [] for name in others}

    def watched(**inputs):
        for name, part in parts.items():
            seen[name] += [value for value in part(**inputs) if value is not None]
        return right(**inputs)

    sampling = Sampling(max_tokens=run.grpo.sampling.max_tokens)
    drawn = long2short.sample(
        model.language_model, model.params, model.tokenizer, held_out, watched, jax.random.key(run.seed),
        sampling=sampling, samples=4, batch=256,
    )  # fmt: skip
    found = {
        "accuracy": float(np.nan_to_num(drawn.scores).mean()),
        "length": float(drawn.lengths.mean()),
        **{name: float(np.mean(values)) if values else None for name, values in seen.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(file, found)
    return found


def _reads(folder: Path) -> dict[str, str]:
    """Tokenizer and marker of a run folder, as options of another run take them."""
    model = json.loads((folder / runs.MODEL).read_text())
    spec = model["tokenizer"]
    alphabet = f":{spec['alphabet']}" if "alphabet" in spec else ""
    tokenizer = str(folder / spec["file"]) if "file" in spec else spec["kind"] + alphabet
    return {"tokenizer": tokenizer, "marker": model["marker"]}


def _check_same(run: R1Run, saved: dict[str, Any]) -> None:
    for name in ("data", "init", "seed", "held_out"):
        if saved[name] != getattr(run, name):
            raise ValueError(
                f"{run.out} holds a pipeline with {name} {saved[name]!r}, not {getattr(run, name)!r}; resume it with "
                "its own, or choose another folder with --out"
            )


def _done(folder: Path) -> bool:
    return (folder / runs.SUMMARY).is_file()


def _has_data(folder: Path) -> bool:
    return (folder / "data" / "held_out.jsonl").is_file()


def _split(run: R1Run) -> dict[str, list[Record]]:
    """Records of the folder `data`; the held-out ones last, so that their file says that all are there."""
    toy = run.data == TOY
    rows = digit_sums(seed=run.seed) if toy else task.load_records(run.data, columns=("prompt",))
    training, held_out = split_by_problem(rows, held_out=run.held_out, column="prompt")
    random = np.random.default_rng(run.seed + 1)
    base = [worked(record, random) for record in training[:4096]] if toy else []
    return {"base": base, "training": training, "held_out": held_out}


def write_lines(path: Path, records: Sequence[Record]) -> None:
    """Writes JSON Lines under a temporary name and renames the file, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(dict(record), ensure_ascii=False) + "\n" for record in records))
    temporary.replace(path)
