"""`jaxrl train grpo`."""

import dataclasses
from functools import partial

import jax.numpy as jnp

from jaxrl.display import Display
from jaxrl.posttrain import grpo, rewards, task, update
from jaxrl.posttrain.grpo import GRPOConfig
from jaxrl.posttrain.recipes.common import (
    Outcome,
    RunOptions,
    answers_by_token,
    drive,
    exact_evaluation,
    marker_id,
    prepare,
    score_texts,
    text_evaluation,
)
from jaxrl.types import Rollout


@dataclasses.dataclass(frozen=True)
class GRPORun(RunOptions):
    """GRPO and its family on prompts with verifiable answers."""

    reward: str = ""
    """Python reward: path/to/file.py:function, a built-in one such as number, or a sum such as number + 0.2*format;
    empty compares answers exactly."""
    reward_timeout: float = 0.0
    """Seconds for each part of the reward and call, after which its completions have none; 0 is no limit."""
    reward_normalise: bool = False
    """Normalise each part of the reward within its group, then sum (GDPO); use it with --grpo.scale batch."""
    optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=5e-5, warmup_steps=10)
    )
    grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)


def train_grpo(run: GRPORun, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Post-trains on prompts with answers, or with a Python reward. Arguments, result and errors as `train_sft`."""
    run = dataclasses.replace(run, out=run.out or "runs/grpo")
    needed = ("prompt",) if run.reward else ("prompt", "answer")
    needed += ("difficulty",) if run.grpo.curriculum_steps else ()
    max_tokens = run.grpo.sampling.max_tokens
    setup = prepare(run, columns=needed, max_tokens=max_tokens)
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
    if run.reward or not answers_by_token(setup.task):
        reward = (
            rewards.load_reward(run.reward, timeout=run.reward_timeout or None, normalise=run.reward_normalise)
            if run.reward
            else partial(rewards.exact_text, marker=setup.task.marker)
        )

        def score(completions: Rollout, rows):
            records = [training[row] for row in rows]
            return score_texts(reward, completions, records, tokenizer, samples=run.grpo.group)

        step, answers = grpo.hosted(recipe, score, run.grpo), None
        evaluation = text_evaluation(setup, max_tokens, reward, exact=not run.reward)
    else:
        reward = partial(rewards.exact_answer, marker=marker_id(setup.task))
        step, answers = grpo.fused(recipe, reward, run.grpo), task.answers_of(training, tokenizer)
        evaluation = exact_evaluation(setup, max_tokens)
    problems = grpo.Problems(prompts, answers, _difficulty(training) if run.grpo.curriculum_steps else None)
    init = partial(recipe.init, problems=len(training))
    return drive("grpo", run, setup, init, step, problems, evaluation,
                  max_tokens=max_tokens, jit=answers is not None, resume=resume, display=display)  # fmt: skip


def _difficulty(training: list) -> jnp.ndarray:
    values = [record["difficulty"] for record in training]
    wrong = next((x for x in values if isinstance(x, bool) or not isinstance(x, int | float)), None)
    if wrong is not None:
        raise ValueError(f"the column `difficulty` holds {wrong!r}; expected a number for every problem")
    return jnp.asarray(values, jnp.float32)
