"""`jaxrl train rm`."""

import dataclasses
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import runs
from jaxrl.data import records as data_records
from jaxrl.data.sources import Record
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.display import Display
from jaxrl.parallel import processes
from jaxrl.posttrain import reward_model, task, update
from jaxrl.posttrain.adapter import whole
from jaxrl.posttrain.recipes.common import Evaluation, Outcome, RunOptions, prepare, with_context
from jaxrl.posttrain.recipes.drive import drive
from jaxrl.posttrain.recipes.preference import enough, pair_evaluation
from jaxrl.posttrain.reward_model import Calibration, RMConfig, Steps
from jaxrl.types import TokenBatch

RELIABILITY = "reliability.json"
"""File of a run folder: how far the model's confidence in held-out pairs can be believed."""


@dataclasses.dataclass(frozen=True)
class RMRun(RunOptions):
    """A reward model from prompt + chosen + rejected (+ margin), or from prompt + completions + labels (process)."""

    step_separator: str = "\n"
    """Text after each step of a solution; its last token is where the step's score is read (process)."""
    optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=1e-4, warmup_steps=10)
    )
    rm: RMConfig = dataclasses.field(default_factory=RMConfig)


def train_rm(run: RMRun, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Trains a reward model; evaluates the share of held-out pairs (or steps) it judges right.

    Arguments, result and errors as `train_sft`. The folder also gets `reliability.json` and, with matplotlib,
    `reliability.png`; `summary.json` the calibration error. `reward_model.load` opens the model again.
    """
    run = dataclasses.replace(run, out=run.out or "runs/rm")
    run.adapter.refuse_heads("a reward model")
    process = run.rm.kind == "process"
    columns = ("prompt", "completions", "labels") if process else ("chosen", "rejected")
    setup = prepare(run, columns=columns, max_tokens=1)
    enough(run, "solutions" if process else "pairs", run.rm.batch, setup)
    sides = (setup.task.training, setup.task.held_out)
    if process:
        training, held_out = (encode_steps(rows, setup.task.tokenizer, separator=run.step_separator) for rows in sides)
        width = max(part.examples.tokens.shape[1] for part in (training, held_out))
    else:
        training, held_out = (task.pairs_of(rows, setup.task.tokenizer) for rows in sides)
        width = max(part.chosen.tokens.shape[1] for part in (training, held_out))
    setup = with_context(setup, width)
    model = setup.model
    recipe = setup.recipe(run, partial(reward_model.make, run.rm), rows=run.rm.batch // run.rm.micro_batches)
    if isinstance(held_out, Steps):
        scores = jax.jit(lambda params: reward_model.token_scores(model, params, held_out.examples))
        evaluation = _step_evaluation(setup.task.held_out, held_out, scores)
        differences = lambda params: _step_differences(held_out, scores(params))
    else:
        margins = jax.jit(lambda params: reward_model.margins(model, params, held_out, rows=run.rm.batch))
        evaluation = pair_evaluation(setup, "chosen", margins)
        differences = margins
    outcome = drive("rm", run, setup, recipe.init, recipe.step, training, evaluation,
                    max_tokens=1, resume=resume, display=display)  # fmt: skip
    measured = reward_model.calibration(np.asarray(processes.fetch(differences(whole(outcome.state)))))
    summary = {**outcome.summary, "calibration_error": measured.error}

    def finish() -> None:
        runs.write_json(outcome.folder / RELIABILITY, measured._asdict())
        reliability_plot(measured, outcome.folder / "reliability.png", title=f"reward model on {run.data}")
        runs.write_json(outcome.folder / runs.SUMMARY, summary)

    processes.on_main(finish)
    return outcome._replace(summary=summary)


def encode_steps(records: Sequence[Record], tokenizer: Tokenizer, *, separator: str = "\n") -> Steps:
    """Tokenise `prompt` + `completions` (the steps, a list of texts) + `labels` (whether each is right).

    Args:
      records: TRL's stepwise columns.
      tokenizer: encodes the prompt, then each step with the separator behind it, one by one.
      separator: marks the end of a step.

    Returns:
      `Steps` `[N, T]`: the loss mask stands on the last token of each step.

    Raises:
      ValueError: naming the record, if a column is missing, there are no steps or labels of another number, or one
        of another type.
    """
    rows = []
    for number, record in enumerate(records):
        with data_records.named(f"record {number}"):
            data_records.check_columns(record, ["prompt", "completions", "labels"])
            steps, labels = record["completions"], record["labels"]
            if not isinstance(steps, list) or not isinstance(labels, list) or not steps or len(steps) != len(labels):
                raise ValueError(
                    f"completions is {json.dumps(steps)[:60]} and labels is {json.dumps(labels)[:60]}; expected two "
                    "lists of one length, a label for each step"
                )
            if not all(isinstance(label, bool) or label in (0, 1) for label in labels):
                raise ValueError(f"labels is {labels!r}; expected true or false for each step")
            ids = data_records.encode_prompts([record], tokenizer)[0][0].tolist()
            ends = []
            for step in steps:
                if not isinstance(step, str) or not step:
                    raise ValueError(f"a step is {step!r}; expected some text")
                ids += tokenizer.encode(step + separator)
                ends.append(len(ids) - 1)
            rows.append((ids, ends, labels))
    width = max(len(ids) for ids, _, _ in rows)
    tokens = np.full((len(rows), width), tokenizer.pad_id, np.int32)
    mask, correct = np.zeros((len(rows), width), np.float32), np.zeros((len(rows), width), np.float32)
    for row, (ids, ends, labels) in enumerate(rows):
        tokens[row, : len(ids)] = ids
        mask[row, ends], correct[row, ends] = 1.0, labels
    return Steps(TokenBatch(jnp.asarray(tokens), jnp.asarray(mask)), jnp.asarray(correct))


def reliability_plot(measured: Calibration, path: str | os.PathLike, *, title: str = "") -> Path | None:
    """Draws accuracy over confidence; None where matplotlib (the extra `plot`) is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    figure = Figure(figsize=(4.4, 4), layout="constrained")
    axes = figure.add_subplot()
    filled = [row for row in measured.table if row["count"]]
    axes.plot([0.5, 1], [0.5, 1], color="gray", linewidth=1, linestyle="--", label="as sure as it is right")
    axes.bar(
        [0.5 * (row["low"] + row["high"]) for row in filled],
        [row["count"] / sum(row["count"] for row in filled) for row in filled],
        width=0.9 * 0.5 / len(measured.table),
        color="tab:blue",
        alpha=0.2,
        label="share of judgements",
    )
    points = [(row["confidence"], row["accuracy"]) for row in filled]
    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, color="tab:blue", label="accuracy")
    axes.set_xlabel("confidence")
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    error = f"calibration error {measured.error:.3f}, accuracy {measured.accuracy:.3f}"
    axes.set_title("\n".join(filter(None, [title, error])), fontsize=10)
    figure.savefig(path, dpi=120)
    return Path(path)


def _step_differences(held_out: Steps, scores) -> np.ndarray:
    """Log-odds of each step, turned so that a positive one is right."""
    ends, signs = np.asarray(held_out.examples.loss_mask) > 0, 2 * np.asarray(held_out.correct) - 1
    return (signs * np.asarray(processes.fetch(scores), np.float64))[ends]


def _step_evaluation(rows: list[Record], held_out: Steps, scores) -> Evaluation:
    """Share of held-out steps judged right; a tie is half right. Shows each solution's own share."""
    texts = ["".join(map(str, record["completions"])) for record in rows]
    numbers = np.asarray(held_out.examples.loss_mask).sum(axis=1).astype(int)

    def evaluate(params):
        turned = _step_differences(held_out, scores(params))
        right = np.where(turned == 0, 0.5, turned > 0)
        shares = np.array([part.mean() for part in np.split(right, np.cumsum(numbers)[:-1])])
        return float(right.mean()), texts, shares

    return Evaluation("eval/step_accuracy", evaluate)
