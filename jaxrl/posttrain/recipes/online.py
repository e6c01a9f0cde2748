"""`jaxrl train online-dpo`."""

import dataclasses
from functools import partial

import jax

from jaxrl.display import Display
from jaxrl.posttrain import judge as judging
from jaxrl.posttrain import online, reward_model, rewards, task, update
from jaxrl.posttrain.grpo import Problems
from jaxrl.posttrain.online import OnlineConfig
from jaxrl.posttrain.recipes.common import (
    Outcome,
    RunOptions,
    answers_by_token,
    exact_evaluation,
    greedy_evaluation,
    marker_id,
    prepare,
    score_texts,
    text_evaluation,
)
from jaxrl.posttrain.recipes.drive import drive
from jaxrl.posttrain.recipes.ppo import open_reward_model
from jaxrl.posttrain.recipes.preference import enough
from jaxrl.types import Rollout


@dataclasses.dataclass(frozen=True)
class OnlineRun(RunOptions):
    """Online DPO: the best and the worst of a few completions of each prompt make a pair."""

    reward: str = ""
    """Python reward that orders completions: path/to/file.py:function, number, or a sum, as in `jaxrl train grpo`."""
    judge: str = ""
    """Function that orders them in its place: path/to/file.py:function of (prompts, completions); it gives for each
    prompt a score of every completion, or the number of the better of two, or None."""
    reward_model: str = ""
    """Run folder of `jaxrl train rm` that orders them. Without any of the three, right answers beat wrong ones."""
    optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=5e-6, warmup_steps=10)
    )
    online: OnlineConfig = dataclasses.field(default_factory=OnlineConfig)


def train_online(run: OnlineRun, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Learns from preferences between the policy's own completions. Evaluates what orders them: right answers, the mean
    reward, or that of the reward model; with a judge right answers, where the data has answers.

    Arguments, result and errors as `train_sft`.
    """
    run = dataclasses.replace(run, out=run.out or "runs/online-dpo")
    given = {name: getattr(run, name) for name in ("reward", "judge", "reward_model") if getattr(run, name)}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given; expected one source of preferences, or none for answers")
    judge = rewards.load_reward(run.judge) if run.judge else None
    if judge is not None and not judging.is_judge(judge):
        raise ValueError(
            f"--judge {run.judge} is no function of (prompts, completions) but a reward; give it as --reward"
        )
    config, max_tokens = run.online, run.online.sampling.max_tokens
    setup = prepare(run, columns=("prompt",) if given else ("prompt", "answer"), max_tokens=max_tokens)
    tokenizer, training = setup.task.tokenizer, setup.task.training
    enough(run, "prompts", config.prompts, setup)
    recipe = setup.recipe(
        run,
        partial(online.make, config, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, stop=task.stops(tokenizer)),
        rows=config.prompts // config.micro_batches,
        updates=config.epochs,
        moving_reference=config.reference_every > 0,
    )
    data, jit = Problems(task.prompts_of(training, tokenizer), None), True
    answered = all("answer" in record for record in setup.task.held_out)
    evaluation = exact_evaluation(setup, max_tokens) if answered else None
    if run.reward_model:
        scorer = open_reward_model(run.reward_model, setup)
        score = partial(jax.jit(partial(reward_model.score_rollout, scorer.language_model)), scorer.params)
        step, jit = online.hosted(recipe, lambda completions, _: score(completions)), False
        evaluation = greedy_evaluation("eval/reward", setup, max_tokens, score)
    elif judge is not None:
        prompts = [record["prompt"] for record in training]
        step, jit = online.hosted(recipe, online.judged(judge, tokenizer, prompts, group=config.group)), False
    elif run.reward or not answers_by_token(setup.task):
        reward = (
            rewards.load_reward(run.reward) if run.reward else partial(rewards.exact_text, marker=setup.task.marker)
        )

        def on_host(completions: Rollout, rows):
            records = [training[row] for row in rows]
            return score_texts(reward, completions, records, tokenizer, samples=config.group).values

        step, jit = online.hosted(recipe, on_host), False
        evaluation = text_evaluation(setup, max_tokens, reward, exact=not run.reward)
    else:
        data = dataclasses.replace(data, answers=task.answers_of(training, tokenizer))
        step = online.fused(recipe, partial(rewards.exact_answer, marker=marker_id(setup.task)), config)
    return drive("online-dpo", run, setup, recipe.init, step, data, evaluation,
                  max_tokens=max_tokens, jit=jit, resume=resume, display=display)  # fmt: skip
