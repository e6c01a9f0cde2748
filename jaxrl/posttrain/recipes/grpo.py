"""`jaxrl train grpo`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl import parallel
from jaxrl.display import Display
from jaxrl.posttrain import adapter, apart, grpo, rewards, shared_prefix, task, tools, turns, update
from jaxrl.posttrain import partial as partial_rollouts
from jaxrl.posttrain.filling import DiffusionOptions
from jaxrl.posttrain.grpo import GRPOConfig
from jaxrl.posttrain.partial import PartialConfig
from jaxrl.posttrain.recipes.common import (
    Evaluation,
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
    with_context,
)
from jaxrl.posttrain.recipes.drive import drive
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.unmasking import Unmasking
from jaxrl.types import Rollout

MASKED = (1 << 30) + 7
"""Folded into a run's key for the masks under which a network that fills them in is scored."""


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
    tools: str = ""
    """What the model may call: calculator, path/to/file.py:function, several with commas; empty is no tools."""
    turns: int = 4
    """How often the model writes in a completion with tools: one more than the calls it may make."""
    tool_form: str = "tags"
    """Form of a call: tags, <tool>47*85</tool>, or hermes, <tool_call>{"name": ..., "arguments": ...}</tool_call>."""
    segment: int = 0
    """New tokens of each completion and step at most, the rest in later steps (partial rollouts); 0 is no limit."""
    loss_on: str = "last"
    """With a segment: learn from the last of each completion, or from all, weighted as --grpo.importance-cap says."""
    repetition: int = 0
    """Longest stretch of tokens which, eight times at the end of a segment, stops a completion; 0 never does."""
    repetition_penalty: float = 1.0
    """Taken off the reward of a completion that was stopped so."""
    sampler_mesh: str = ""
    """Devices to sample on, such as data=4: those that the mesh leaves, or all of them in another layout; empty samples
    where it trains."""
    lag: int = 0
    """With a sampler_mesh: updates between drawing a batch and learning from it (policy/lag)."""
    optimizer: update.OptimizerConfig = dataclasses.field(
        default_factory=lambda: update.OptimizerConfig(learning_rate=5e-5, warmup_steps=10)
    )
    grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    diffusion: DiffusionOptions = dataclasses.field(default_factory=DiffusionOptions)
    unmasking: Unmasking = dataclasses.field(default_factory=Unmasking)

    def __post_init__(self):
        super().__post_init__()
        if self.tool_form not in tools.FORMS:
            raise ValueError(f"tool_form is {self.tool_form!r}; expected one of {', '.join(tools.FORMS)}")
        if self.lag and not self.sampler_mesh:
            raise ValueError(f"lag is {self.lag} and there is no sampler_mesh; name the devices that sample meanwhile")
        if self.sampler_mesh:
            taken = {
                "an adapter": self.adapter.kind != "none",
                "tools": self.tools,
                "segment and repetition": self.partial is not None,
                "grpo.dynamic-rounds": self.grpo.dynamic_rounds > 1,
            }
            for name, given in taken.items():
                if given:
                    raise ValueError(f"sampler_mesh does not go together with {name}; leave one of them out")
        if self.tools and self.partial is not None:
            raise ValueError("segment and repetition are for completions in one turn; leave them out, or the tools")
        if self.grpo.slots and (self.tools or self.partial is not None):
            raise ValueError("grpo.slots takes completions drawn whole in one turn; leave it or tools and segment out")
        if self.partial is not None and self.mesh:
            raise ValueError("segment and repetition work on one device; leave the mesh out")

    @property
    def partial(self) -> PartialConfig | None:
        """Settings of partial rollouts; None where completions are drawn whole and never stopped."""
        if not self.segment and not self.repetition:
            return None
        names = ("segment", "loss_on", "repetition", "repetition_penalty")
        return PartialConfig(**{name: getattr(self, name) for name in names})


def train_grpo(run: GRPORun, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Post-trains on prompts with answers, or with a Python reward. Arguments, result and errors as `train_sft`."""
    run = dataclasses.replace(run, out=run.out or "runs/grpo")
    needed = ("prompt",) if run.reward else ("prompt", "answer")
    needed += ("difficulty",) if run.grpo.curriculum_steps else ()
    max_tokens = run.grpo.sampling.max_tokens
    setup = prepare(run, columns=needed, max_tokens=max_tokens, sampler_mesh=run.sampler_mesh)
    tokenizer, training = setup.task.tokenizer, setup.task.training
    if len(training) < run.grpo.prompts:
        raise ValueError(
            f"a step takes {run.grpo.prompts} prompts and {run.data} leaves {len(training)} for training "
            f"({len(setup.task.held_out)} are held out); lower --grpo.prompts or --held-out"
        )
    prompts = task.prompts_of(training, tokenizer)
    setup = with_context(setup, _context(run, setup))
    by_text = bool(run.reward or run.tools) or not answers_by_token(setup.task)
    recipe = setup.recipe(
        run,
        partial(_make, run, setup, prompts.tokens.shape[1]),
        rows=run.grpo.prompts * run.grpo.group // run.grpo.minibatches // run.grpo.micro_batches,
        updates=run.grpo.epochs * run.grpo.minibatches,
        moving_reference=run.grpo.reference_every > 0,
    )
    if by_text:
        reward = (
            rewards.load_reward(run.reward, timeout=run.reward_timeout or None, normalise=run.reward_normalise)
            if run.reward
            else partial(rewards.exact_text, marker=setup.task.marker)
        )

        def score(completions: Rollout, rows):
            completions, rows = jax.device_get((completions, rows))
            records = [training[row] for row in rows]
            return score_texts(reward, completions, records, tokenizer, samples=run.grpo.group)

        of_ready = partial_rollouts.of_ready(score, group=run.grpo.group)
        sample, answers = None, None
        evaluation = text_evaluation(setup, max_tokens, reward, exact=not run.reward)
        if run.tools:
            talk = _talk(run, setup, run.grpo.sampling, samples=run.grpo.group)
            sample = turns.sampler(recipe.sample, talk, params_of=adapter.whole, constrain=setup.constrain)
            evaluation = _evaluation_with_tools(evaluation.name, run, setup, reward)
        step = grpo.hosted(recipe, score if run.partial is None else of_ready, run.grpo, sample=sample)
    else:
        reward = partial(rewards.exact_answer, marker=marker_id(setup.task))
        step, answers = grpo.fused(recipe, reward, run.grpo), task.answers_of(training, tokenizer)
        of_rows = lambda rows: jax.tree.map(lambda x: jnp.repeat(x[rows], run.grpo.group, axis=0), answers)
        graded = jax.jit(lambda completions, rows: reward(completions, of_rows(rows)))
        evaluation = exact_evaluation(setup, max_tokens)
    problems = grpo.Problems(prompts, answers, _difficulty(training) if run.grpo.curriculum_steps else None)
    init, begin = partial(recipe.init, problems=len(training)), None
    if run.sampler_mesh:
        begin, step = _apart(run, setup, recipe, score if by_text else graded)
    alone = "tools" if run.tools else "a sampler_mesh" if run.sampler_mesh else ""
    return drive("grpo", run, setup, init, step, problems, evaluation, begin=begin, max_tokens=max_tokens,
                  jit=not by_text and begin is None, alone=alone, resume=resume, display=display)  # fmt: skip


def _apart(run: GRPORun, setup: Setup, recipe: grpo.GRPO, reward: Callable) -> tuple[Callable, Callable]:
    """The iteration on a mesh to train on and one to sample on."""
    model = parallel.model_on(setup.transformer, setup.sampler)
    sampler = _make(run, setup, 0, model, update.make_optimizer(run.optimizer))
    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    return apart.make(
        sampler.sample,
        recipe.learn,
        reward,
        place_batch=lambda batch: jax.device_put(batch, everywhere),
        policy_shardings=setup.sampler_shardings,
        lag=run.lag,
        dtype=setup.transformer.dtype,
    )


def _make(run: GRPORun, setup: Setup, prompt_width: int, model, optimizer, **options) -> grpo.GRPO:
    """The recipe's functions; with tools, `sample` only asks, and `turns.sampler` goes on."""
    tokenizer = setup.task.tokenizer
    if setup.filling:
        if run.tools or run.partial or run.sampler_mesh:
            raise ValueError(
                "the network fills in masks, whole completions at a time and where it trains; leave out tools, "
                "segment, repetition and sampler_mesh"
            )
        options |= setup.filling.grpo(run.diffusion, jax.random.fold_in(jax.random.key(run.seed), MASKED))
        return grpo.make(run.grpo, model, optimizer, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, **options)
    ends: dict[str, Any] = {
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "stop": task.stops(tokenizer),
    }
    plain = grpo.make(run.grpo, model, optimizer, **ends, **options)
    if run.tools:
        return plain._replace(sample=turns.asking(run.grpo))
    if run.partial is None:
        return plain
    return partial_rollouts.make(run.partial, run.grpo, plain, model, prompt_width=prompt_width, **ends)


def _context(run: GRPORun, setup: Setup) -> int:
    """Tokens that the model must take."""
    sides = (setup.task.training, setup.task.held_out)
    width = max(task.prompts_of(side, setup.task.tokenizer).tokens.shape[1] for side in sides)
    max_tokens = run.grpo.sampling.max_tokens
    needed = turns.context(width, max_tokens) if run.tools else partial_rollouts.context(width, max_tokens, run.segment)
    return max(needed, shared_prefix.row_width(width, max_tokens, run.grpo.group)) if run.grpo.share_prompt else needed


def _talk(run: GRPORun, setup: Setup, sampling: Sampling, *, samples: int) -> Callable:
    tokenizer, found = setup.task.tokenizer, tools.load_tools(run.tools)
    return turns.make_talk(
        setup.model,
        tokenizer,
        found,
        sampling=sampling,
        form=tools.FORMS[run.tool_form](named=len(found) > 1),
        turns=run.turns,
        samples=samples,
        stop=task.stops(tokenizer),
    )


def _evaluation_with_tools(name: str, run: GRPORun, setup: Setup, reward: rewards.Reward) -> Evaluation:
    """Greedy completions of the held-out problems, which may call the tools."""
    held_out, tokenizer, max_tokens = setup.task.held_out, setup.task.tokenizer, run.grpo.sampling.max_tokens
    talk = _talk(run, setup, Sampling(temperature=0.0, max_tokens=max_tokens), samples=1)
    score = lambda completions: score_texts(reward, completions, held_out, tokenizer, samples=1).values
    return greedy_evaluation(name, setup, max_tokens, score, generate=lambda *given: talk(*given).rollout)


def _difficulty(training: list) -> jnp.ndarray:
    values = [record["difficulty"] for record in training]
    wrong = next((x for x in values if isinstance(x, bool) or not isinstance(x, int | float)), None)
    if wrong is not None:
        raise ValueError(f"the column `difficulty` holds {wrong!r}; expected a number for every problem")
    return jnp.asarray(values, jnp.float32)
