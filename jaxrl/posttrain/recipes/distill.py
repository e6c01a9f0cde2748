"""`jaxrl train distill`."""

import dataclasses
from functools import partial

import jax

from jaxrl import runs
from jaxrl.display import Display
from jaxrl.nets.language_model import language_model
from jaxrl.posttrain import distill, task, update
from jaxrl.posttrain.distill import DistillConfig
from jaxrl.posttrain.recipes.common import Outcome, RunOptions, exact_evaluation, prepare, with_context
from jaxrl.posttrain.recipes.drive import drive


@dataclasses.dataclass(frozen=True)
class DistillRun(RunOptions):
    """On-policy distillation: the student's own completions, graded token by token by a teacher."""

    teacher: str = ""
    """Run folder, smollm2-135m, Hugging Face folder or .gguf file of the teacher; its tokenizer is the student's."""
    examples: str = ""
    """JSONL file of what steps off policy learn from (`distill.on_policy` below 1), as `jaxrl train sft` reads."""
    optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=1e-4, warmup_steps=10)
    )
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)


def train_distill(run: DistillRun, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Distils a teacher into the model of `init`, or into a new one; evaluates exact answers where there are answers.

    Arguments, result and errors as `train_sft`; also ValueError without a teacher, and with another tokenizer.
    """
    run = dataclasses.replace(run, out=run.out or "runs/distill")
    if not run.teacher:
        raise ValueError("teacher is empty; expected a run folder, a published model or a file: --teacher runs/demo")
    if bool(run.examples) != (run.distill.on_policy < 1):
        raise ValueError(
            f"examples is {run.examples!r} and distill.on_policy {run.distill.on_policy}; expected a file and a share "
            "below 1, or neither"
        )
    teacher = runs.load_model(run.teacher)
    # a student from nothing takes the teacher's tokenizer, which may have no name
    known = {} if run.init or run.tokenizer else {"tokenizer": teacher.tokenizer}
    marker = run.marker or ("" if run.init or run.data in task.BUILT_IN else teacher.marker)
    max_tokens = run.distill.sampling.max_tokens
    setup = prepare(dataclasses.replace(run, marker=marker, **known), columns=("prompt",), max_tokens=max_tokens)
    tokenizer, training = setup.task.tokenizer, setup.task.training
    distill.check_tokenizers(tokenizer, teacher.tokenizer)
    if len(training) < run.distill.prompts:
        raise ValueError(
            f"a step takes {run.distill.prompts} prompts and {run.data} leaves {len(training)} for training "
            f"({len(setup.task.held_out)} are held out); lower --distill.prompts or --held-out"
        )
    prompts = task.prompts_of(training, tokenizer)
    examples = None
    if run.examples:
        examples = task.examples_of(task.load_records(run.examples, columns=()), tokenizer)
        setup = with_context(setup, examples.tokens.shape[1])
    judge = language_model(teacher.transformer.with_room(setup.transformer.max_length))
    speaks = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    rows = run.distill.prompts * run.distill.group // run.distill.micro_batches
    recipe = setup.recipe(run, partial(distill.make, run.distill, teacher=judge, **speaks), rows=rows)
    frozen = teacher.params
    if setup.mesh is not None:
        frozen = jax.device_put(frozen, setup.shardings(frozen))
    evaluation = None
    if all("answer" in record for record in setup.task.held_out):
        evaluation = exact_evaluation(setup, max_tokens)
    return drive("distill", run, setup, recipe.init, recipe.step, distill.Data(prompts, frozen, examples), evaluation,
                  max_tokens=max_tokens, resume=resume, display=display)  # fmt: skip
