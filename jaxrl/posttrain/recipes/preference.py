"""`jaxrl train dpo` and `jaxrl train kto`."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import runs
from jaxrl.data import preferences
from jaxrl.display import Display
from jaxrl.parallel import processes
from jaxrl.posttrain import kto, preference, task, update
from jaxrl.posttrain.filling import DiffusionOptions
from jaxrl.posttrain.kto import KTOConfig
from jaxrl.posttrain.preference import DPOConfig
from jaxrl.posttrain.recipes.common import Evaluation, Outcome, RunOptions, Setup, prepare, with_context
from jaxrl.posttrain.recipes.drive import drive
from jaxrl.posttrain.unmasking import Unmasking
from jaxrl.types import Labelled

REFERENCE = "reference.npz"
"""File of a run folder: the reference's log-probs of the training data."""


@dataclasses.dataclass(frozen=True)
class DPORun(RunOptions):
    """DPO and its family on prompt + chosen + rejected."""

    max_tokens: int = 64
    """Completion width when the model is talked to."""
    optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=5e-6, warmup_steps=10)
    )
    packing: bool = False
    """Several pairs share a row, each as if it were alone: less padding, the same gradient for the same pairs.
    `dpo.batch` then counts rows."""
    width: int = 0
    """Tokens of a packed row; 0 takes the longest response with its prompt."""
    dpo: DPOConfig = dataclasses.field(default_factory=DPOConfig)
    diffusion: DiffusionOptions = dataclasses.field(default_factory=DiffusionOptions)
    unmasking: Unmasking = dataclasses.field(default_factory=Unmasking)

    def __post_init__(self):
        super().__post_init__()
        if self.width and not self.packing:
            raise ValueError(f"width is {self.width}, that of packed rows; add --packing or leave it out")
        if self.packing and self.dpo.whole_batch:
            raise ValueError("packing puts several pairs into a row, which a sorted pairing cannot take; leave it out")


@dataclasses.dataclass(frozen=True)
class KTORun(RunOptions):
    """KTO on prompt + completion + label."""

    max_tokens: int = 64
    """Completion width when the model is talked to."""
    optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=5e-6, warmup_steps=10)
    )
    kto: KTOConfig = dataclasses.field(default_factory=KTOConfig)


def train_dpo(run: DPORun, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Learns from pairs; the reference is the model it starts from. Evaluates the share of held-out pairs whose chosen
    response has the larger implicit reward.

    Arguments, result and errors as `train_sft`. The reference's log-probs are kept in the run folder, so a resumed run
    goes on with the same ones whatever has become of the model that `init` names.
    """
    run = dataclasses.replace(run, out=run.out or "runs/dpo")
    setup = prepare(run, columns=("chosen", "rejected"), max_tokens=run.max_tokens)
    training, held_out = (
        task.pairs_of(records, setup.task.tokenizer) for records in (setup.task.training, setup.task.held_out)
    )
    config, known = run.dpo, {}
    if setup.filling:
        if run.packing:
            raise ValueError("packing is for networks that write from left to right, and this one fills in masks")
        config, known = setup.filling.dpo(run.diffusion, config)
    if run.packing:
        training = jax.tree.map(jnp.asarray, preferences.pack_pairs(training, run.width))
    enough(run, "packed rows" if run.packing else "pairs", run.dpo.batch, setup, rows=len(training.chosen.tokens))
    setup = with_context(setup, max(pairs.chosen.tokens.shape[1] for pairs in (training, held_out)))
    rows, moving = run.dpo.batch // run.dpo.micro_batches, config.reference_every > 0
    make = partial(preference.make, config, **known)
    recipe = setup.recipe(run, make, rows=rows, moving_reference=moving)
    data, seen = preference.Referenced(training), preference.Referenced(held_out)
    if run.dpo.needs_reference:
        stored = stored_reference(run, setup, recipe.reference, [(training,), (held_out,)], resume=resume)
        fill = lambda part, name: part.replace(chosen=stored[f"{name}_chosen"], rejected=stored[f"{name}_rejected"])
        data, seen = fill(data, "training"), fill(seen, "held_out")
    margins = jax.jit(recipe.margins)
    evaluation = pair_evaluation(setup, "chosen", lambda params: margins(params, seen))
    return drive("dpo", run, setup, recipe.init, recipe.step, data, evaluation,
                  max_tokens=run.max_tokens, resume=resume, display=display)  # fmt: skip


def train_kto(run: KTORun, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Learns from single responses; evaluates how often a wanted held-out response has a larger implicit reward than an
    unwanted one. Else as `train_dpo`."""
    run = dataclasses.replace(run, out=run.out or "runs/kto")
    setup = prepare(run, columns=("prompt", "completion", "label"), max_tokens=run.max_tokens)
    training, held_out = (
        task.labelled_of(records, setup.task.tokenizer) for records in (setup.task.training, setup.task.held_out)
    )
    enough(run, "examples", run.kto.batch, setup)
    mixed = kto.mismatched(training, seed=run.seed)
    widths = [batch.tokens.shape[1] for batch in (training.examples, held_out.examples, mixed)]
    setup = with_context(setup, max(widths))
    recipe = setup.recipe(run, partial(kto.make, run.kto), rows=run.kto.batch // run.kto.micro_batches)
    parts = [(training, mixed), (held_out, held_out.examples)]  # what is held out needs no estimate of the KL
    stored = stored_reference(run, setup, recipe.reference, parts, resume=resume)
    data, seen = (
        kto.KTOData(labelled, examples, stored[f"{name}_reference"], stored[f"{name}_mismatched_reference"])
        for (labelled, examples), name in zip(parts, ("training", "held_out"), strict=True)
    )
    rewards = jax.jit(recipe.rewards)
    score = partial(_share_in_order, held_out)
    evaluation = pair_evaluation(setup, "completion", lambda params: rewards(params, seen), score)
    return drive("kto", run, setup, recipe.init, recipe.step, data, evaluation,
                  max_tokens=run.max_tokens, resume=resume, display=display)  # fmt: skip


def enough(run: RunOptions, what: str, batch: int, setup: Setup, *, rows: int | None = None) -> None:
    """Raises ValueError when a batch is larger than the training data (of `rows`, where they are not its records)."""
    number = len(setup.task.training) if rows is None else rows
    if batch > number:
        raise ValueError(
            f"a step takes {batch} {what} and {run.data} leaves {number} for training "
            f"({len(setup.task.held_out)} are held out); lower the batch or --held-out"
        )


def stored_reference(
    run: RunOptions, setup: Setup, reference: Callable, parts: Sequence[tuple], *, resume: bool
) -> dict[str, jax.Array]:
    """The reference's log-probs of training and held-out data, computed once and kept in the run folder.

    Args:
      reference: `(params, *part) -> a dataclass` whose array fields beyond those of the part are wanted.
      parts: of training and of held-out data.

    Returns:
      {"training_FIELD", "held_out_FIELD": array}.
    """
    file = Path(run.out) / REFERENCE
    if resume and processes.on_main(file.is_file):
        with np.load(file) as stored:
            return {name: jnp.asarray(stored[name]) for name in stored.files}
    if not resume:
        processes.on_main(lambda: runs.check_new(run.out))
    params = setup.reference()
    found, program = {}, jax.jit(lambda params, part: _own_fields(reference(params, *part)))
    for name, part in zip(("training", "held_out"), parts, strict=True):
        columns = processes.fetch(program(params, part))
        found |= {f"{name}_{field}": np.asarray(values) for field, values in columns.items()}

    def keep() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp.npz")
        np.savez(temporary, **found)
        temporary.replace(file)

    processes.on_main(keep)
    return {name: jnp.asarray(values) for name, values in found.items()}


def _own_fields(data) -> dict[str, jax.Array]:
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    return {name: value for name, value in fields.items() if isinstance(value, jax.Array)}


def pair_evaluation(setup: Setup, column: str, measure: Callable, score: Callable | None = None) -> Evaluation:
    """Share of held-out comparisons that come out right; a tie is half right.

    Args:
      column: what is shown of a record.
      measure: `params -> [N]`, one number for each held-out record: a margin, unless `score` says otherwise.
      score: those numbers to the share.
    """
    texts = [str(record[column]) for record in setup.task.held_out]
    right = score or (lambda margins: np.where(margins == 0, 0.5, margins > 0).mean())

    def evaluate(params):
        numbers = np.asarray(processes.fetch(measure(params)), np.float64)
        return float(right(numbers)), texts, numbers

    return Evaluation("eval/pair_accuracy", evaluate)


def _share_in_order(labelled: Labelled, rewards: np.ndarray) -> float:
    """How often a wanted response is ahead of an unwanted one, over all such pairs; NaN without any."""
    wanted = np.asarray(labelled.desirable, bool)
    good, bad = rewards[wanted], np.sort(rewards[~wanted])
    if not good.size or not bad.size:
        return float("nan")
    below, not_above = (np.searchsorted(bad, good, side=side).mean() / bad.size for side in ("left", "right"))
    return float(0.5 * (below + not_above))
