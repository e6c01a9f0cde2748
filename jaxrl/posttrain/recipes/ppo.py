"""`jaxrl train ppo-rlhf` and `jaxrl train ppo-max`: one recipe with two sets of defaults."""

import dataclasses
from functools import partial

import jax

from jaxrl.data.tokenizer import same_tokens
from jaxrl.display import Display
from jaxrl.nets.language_model import language_model
from jaxrl.posttrain import ppo, reward_model, rewards, task, update
from jaxrl.posttrain.ppo_config import PPO_MAX, PPOConfig
from jaxrl.posttrain.recipes.common import (
    Outcome,
    RunOptions,
    Setup,
    answers_by_token,
    exact_evaluation,
    greedy_evaluation,
    marker_id,
    prepare,
    score_texts,
    text_evaluation,
)
from jaxrl.posttrain.recipes.drive import drive
from jaxrl.types import Rollout, TokenBatch


@dataclasses.dataclass(frozen=True)
class PPORun(RunOptions):
    """PPO with a critic, on a learned reward, a Python reward, or verifiable answers."""

    reward: str = ""
    """Python reward, path/to/file.py:function; with neither it nor a reward model, answers are compared exactly."""
    reward_model: str = ""
    """Run folder of `jaxrl train rm` that gives the reward; a separate critic begins as a copy of it, but with an
    adapter, where it is one more adapter on the policy's base."""
    pretraining: str = ""
    """JSONL file for PPO-ptx (`ppo.ptx_coef`), any form that `jaxrl train sft` reads."""
    optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=5e-5, warmup_steps=10)
    )
    critic_optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=1.5e-4, warmup_steps=10)
    )
    """Of the critic: three times the policy's rate, as in MOSS-RLHF. Its max_grad_norm is not used."""
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)


PPO_MAX_RUN = PPORun(ppo=PPO_MAX)
"""The defaults of `jaxrl train ppo-max`."""


def train_ppo(run: PPORun, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Post-trains by PPO on prompts. Arguments, result and errors as `train_sft`."""
    run = dataclasses.replace(run, out=run.out or "runs/ppo-rlhf")
    if run.reward and run.reward_model:
        raise ValueError(f"both --reward {run.reward} and --reward-model {run.reward_model} are given; choose one")
    if bool(run.pretraining) != bool(run.ppo.ptx_coef):
        raise ValueError(
            f"pretraining is {run.pretraining!r} and ppo.ptx_coef {run.ppo.ptx_coef}; PPO-ptx needs both, "
            "a file and a weight above 0, anything else neither"
        )
    run.adapter.refuse_heads("a critic")
    max_tokens = run.ppo.sampling.max_tokens
    columns = ("prompt",) if run.reward or run.reward_model else ("prompt", "answer")
    setup = prepare(run, columns=columns, max_tokens=max_tokens)
    tokenizer, training = setup.task.tokenizer, setup.task.training
    if len(training) < run.ppo.prompts:
        raise ValueError(
            f"a step takes {run.ppo.prompts} prompts and {run.data} leaves {len(training)} for training "
            f"({len(setup.task.held_out)} are held out); lower --ppo.prompts or --held-out"
        )
    judge = open_reward_model(run.reward_model, setup) if run.reward_model else None
    starts_critic = judge is not None and run.ppo.critic == "separate" and setup.adapter is None
    recipe = setup.recipe(
        run,
        partial(
            ppo.make,
            run.ppo,
            critic_optimizer=update.make_optimizer(run.critic_optimizer),
            critic_model=judge.language_model if judge is not None and starts_critic else None,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            stop=task.stops(tokenizer),
        ),
        rows=run.ppo.prompts * run.ppo.group // run.ppo.minibatches // run.ppo.micro_batches,
        updates=run.ppo.epochs * run.ppo.minibatches,
    )
    init = partial(recipe.init, critic=judge.params) if judge is not None and starts_critic else recipe.init
    data = ppo.Data(task.prompts_of(training, tokenizer), pretraining=_pretraining(run, setup))
    jit = True
    if judge is not None:
        score = lambda completions, _, params: reward_model.score_rollout(judge.language_model, params, completions)
        data = dataclasses.replace(data, reward_params=judge.params)
        step = ppo.fused(recipe, score, run.ppo)
        compiled = jax.jit(lambda completions: score(completions, None, judge.params))
        evaluation = greedy_evaluation("eval/reward", setup, max_tokens, compiled)
    elif run.reward or not answers_by_token(setup.task):
        reward = (
            rewards.load_reward(run.reward) if run.reward else partial(rewards.exact_text, marker=setup.task.marker)
        )

        def on_host(completions: Rollout, rows):
            records = [training[i] for i in rows]
            return score_texts(reward, completions, records, tokenizer, samples=run.ppo.group).values

        step, jit = ppo.hosted(recipe, on_host), False
        evaluation = text_evaluation(setup, max_tokens, reward, exact=not run.reward)
    else:
        data = dataclasses.replace(data, answers=task.answers_of(training, tokenizer))
        step = ppo.fused(recipe, partial(rewards.exact_answer, marker=marker_id(setup.task)), run.ppo)
        evaluation = exact_evaluation(setup, max_tokens)
    return drive("ppo-rlhf", run, setup, init, step, data, evaluation,
                  max_tokens=max_tokens, jit=jit, resume=resume, display=display)  # fmt: skip


def open_reward_model(folder: str, setup: Setup) -> reward_model.RewardModel:
    """A reward model for a policy's completions, made long enough for them.

    Raises:
      ValueError: no reward model there, or one with another tokenizer.
    """
    judge = reward_model.load(folder)
    if not same_tokens(judge.tokenizer, setup.task.tokenizer):
        raise ValueError(
            f"the reward model of {folder} has another tokenizer than the policy, whose ids mean something "
            "else to it; train both from one model, or with one --tokenizer"
        )
    transformer = judge.transformer.with_room(setup.transformer.max_length)
    return judge._replace(transformer=transformer, language_model=language_model(transformer))


def _pretraining(run: PPORun, setup: Setup) -> TokenBatch | None:
    if not run.pretraining:
        return None
    examples = task.examples_of(task.load_records(run.pretraining, columns=()), setup.task.tokenizer)
    number, length = examples.tokens.shape
    if length > setup.transformer.max_length:
        raise ValueError(
            f"{run.pretraining} has an example of {length} tokens, more than the {setup.transformer.max_length} of the "
            "model here; shorten it, or raise --ppo.sampling.max-tokens"
        )
    if number < run.ppo.ptx_batch:
        raise ValueError(f"{run.pretraining} has {number} examples, fewer than --ppo.ptx-batch {run.ppo.ptx_batch}")
    return examples
