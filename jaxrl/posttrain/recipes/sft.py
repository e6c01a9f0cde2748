"""`jaxrl train sft`."""

import dataclasses
from functools import partial

from jaxrl.data.records import encode_examples
from jaxrl.display import Display
from jaxrl.posttrain import sft
from jaxrl.posttrain.filling import DiffusionOptions
from jaxrl.posttrain.recipes.common import Outcome, RunOptions, exact_evaluation, prepare, with_context
from jaxrl.posttrain.recipes.drive import drive
from jaxrl.posttrain.sft import SFTConfig
from jaxrl.posttrain.unmasking import Unmasking


@dataclasses.dataclass(frozen=True)
class SFTRun(RunOptions):
    """Supervised fine-tuning on prompt + completion, messages, or text."""

    stop_at: float = 0.0
    """Stop once held-out greedy accuracy reaches this; 0 goes through all steps."""
    max_tokens: int = 64
    """Completion width in evaluation."""
    sft: SFTConfig = dataclasses.field(default_factory=SFTConfig)
    diffusion: DiffusionOptions = dataclasses.field(default_factory=DiffusionOptions)
    unmasking: Unmasking = dataclasses.field(default_factory=Unmasking)


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
    setup = prepare(run, columns=(), max_tokens=run.max_tokens, supervised=True)
    examples, overlong = sft.arrange(run.sft, encode_examples(setup.task.training, setup.task.tokenizer))
    if overlong:
        fate = {"drop": "dropped", "cut": "cut"}[run.sft.overlong]
        (display or Display()).note(f"{overlong} examples are longer than {run.sft.width} tokens and were {fate}")
    setup = with_context(setup, examples.tokens.shape[1])
    known, packed = {}, run.sft.packing
    if setup.filling:
        known = setup.filling.sft(run.diffusion, eos_id=setup.task.tokenizer.eos_id, packed=packed)
    recipe = setup.recipe(run, partial(sft.make, run.sft, **known), rows=run.sft.batch // run.sft.micro_batches)
    evaluation = None
    if all("answer" in record and "prompt" in record for record in setup.task.held_out):
        evaluation = exact_evaluation(setup, run.max_tokens)
    return drive("sft", run, setup, recipe.init, recipe.step, examples, evaluation,
                  max_tokens=run.max_tokens, stop_at=run.stop_at, resume=resume, display=display)  # fmt: skip
