"""GRPO (Shao et al. 2024, arXiv 2402.03300) on episodes of agents that read screens.

A group are episodes from one first state; the reward is 1 for success and 0 otherwise. Each step is a row of its own,
prompt and response, under the advantage of its episode: screens and what was said before stand in prompts, and only
the tokens that the model drew in that step are learnt from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl.data.tokenizer import Tokenizer
from jaxrl.gui.episodes import World, make_respond, play
from jaxrl.gui.history import SCREENS, Show, Trace, kept
from jaxrl.gui.sight import Sight, see
from jaxrl.nets.language_model import LanguageModel
from jaxrl.nets.vision.packed import Patches
from jaxrl.nets.vision_language import with_images
from jaxrl.posttrain import grpo
from jaxrl.types import Finish, Rollout

EPISODES = (1 << 30) + 11
"""Folded into a run's key for its episodes."""


class Online(NamedTuple):
    """`init(key, params) -> TrainState` and `step(state, data = None) -> (state, metrics)`, with Python in between: for
    `loop.run(..., jit=False)`."""

    init: Callable
    step: Callable


def make(
    config: grpo.GRPOConfig,
    world: World,
    model: LanguageModel,
    tokenizer: Tokenizer,
    optimizer: optax.GradientTransformation,
    *,
    show: Show | Sight,
    width: int,
    steps: int,
    keep: int = SCREENS,
    max_grad_norm: float = 1.0,
) -> Online:
    """The functions of a run.

    The update is `grpo.make`'s. An episode that is over before `steps` is filled up with rows without tokens, which
    carry its reward: so every episode counts once in its group's mean, and nothing is learnt from them. (The deviation
    by which a group's advantages are divided is over group * steps rewards less one, in place of group less one.)

    Args:
      config: `prompts` first states of an iteration and `group` episodes from each; its `sampling` is of one response.
      world: where.
      model, tokenizer, show, width, keep: as in `make_respond`.
      optimizer: from `update.make_optimizer`, or any optax transformation.
      steps: of the longest episode.
      max_grad_norm: as in `grpo.make`.

    Raises:
      ValueError: settings of problems that are drawn from a list, which there is none of.
    """
    if config.dynamic_rounds > 1 or config.prioritised or config.curriculum_steps:
        raise ValueError("dynamic_rounds, prioritised and curriculum_steps choose among given problems; leave them out")
    episodes, eos, pad = config.prompts * config.group, tokenizer.eos_id, tokenizer.pad_id
    rows = dataclasses.replace(config, group=config.group * steps)
    knobs: dict[str, Any] = {"show": show, "width": width, "keep": keep}
    agent = make_respond(
        model, tokenizer, sampling=config.sampling, rows=episodes, form=world.form, record=True, **knobs
    )

    def recipe(policy: LanguageModel) -> grpo.GRPO:
        return grpo.make(rows, policy, optimizer, eos_id=eos, pad_id=pad, max_grad_norm=max_grad_norm)

    @jax.jit
    def learn(state, said: Rollout, bank: Patches | None, rewards):
        seeing = isinstance(show, Sight)
        policy = with_images(show.config, bank, model=model, per_row=keep) if seeing and bank is not None else model
        return recipe(policy).learn(state, said, rewards)

    def step(state, data=None):
        del data
        key = jax.random.fold_in(jax.random.fold_in(state.key, EPISODES), state.drawn)
        traces = play(world, agent(state.params), key, episodes=episodes, steps=steps, alike=config.group)
        said, bank = rollout_of(traces, tokenizer, steps=steps, tokens=config.sampling.max_tokens, **knobs)
        rewards = jnp.repeat(jnp.asarray([float(trace.success) for trace in traces]), steps)
        state, metrics = learn(dataclasses.replace(state, drawn=state.drawn + 1), said, bank, rewards)
        return state, {**metrics, **measured(traces)}

    return Online(recipe(model).init, step)


def rollout_of(
    traces: Sequence[Trace],
    tokenizer: Tokenizer,
    *,
    steps: int,
    width: int,
    tokens: int,
    show: Show | Sight,
    keep: int = SCREENS,
) -> tuple[Rollout, Patches | None]:
    """Episodes as completions: rows `[i * steps, (i + 1) * steps)` are those of episode i.

    Args:
      traces: whose turns have `drawn`, at most `steps` each.
      tokenizer: of the policy.
      steps: rows of an episode; those it does not have are empty completions of its first prompt.
      width: P, of the prompts. tokens: C, of the responses.
      show, keep: as in `make_respond`.

    Returns:
      The rollout, and with a `Sight` the bank of its screens.

    Raises:
      ValueError: a turn without `drawn`.
    """
    turns = [(trace.turns, i) for trace in traces for i in range(steps)]
    if any(turn.drawn is None for trace in traces for turn in trace.turns):
        raise ValueError("a turn does not say how it was drawn; play with make_respond(..., record=True)")
    prompts = np.full((len(turns), width), tokenizer.pad_id, np.int32)
    completions = np.full((len(turns), tokens), tokenizer.pad_id, np.int32)
    log_probs, behaviour = np.zeros((2, len(turns), tokens), np.float32)
    lengths, finish = np.zeros(len(turns), np.int32), np.full(len(turns), Finish.EOS, np.int32)
    prompt_lengths = np.zeros(len(turns), np.int32)
    for row, (turns_of, i) in enumerate(turns):
        drawn = turns_of[i if i < len(turns_of) else 0].drawn
        prompt_lengths[row] = len(drawn.prompt)
        prompts[row, width - len(drawn.prompt) :] = drawn.prompt
        if i < len(turns_of):
            lengths[row], finish[row] = len(drawn.tokens), drawn.finish
            for table, values in (
                (completions, drawn.tokens),
                (log_probs, drawn.log_probs),
                (behaviour, drawn.behaviour),
            ):
                table[row, : len(values)] = values
    bank = None
    if isinstance(show, Sight):
        at = [(past, i if i < len(past) else 0) for past, i in turns]
        screens = [kept(past[:i], past[i].screen, keep=keep) for past, i in at]
        prompts, bank = see(show, tokenizer, prompts, screens, rows=len(turns))
    said = Rollout(
        np.concatenate([prompts, completions], axis=1),  # pyright: ignore  (numpy for JAX)
        prompt_lengths, lengths, finish, log_probs, behaviour, width,  # pyright: ignore
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, (said, bank))


def measured(traces: Sequence[Trace]) -> dict[str, float]:
    """The metrics that agents have: the mean return, here the share of success, and length; and how many there are."""
    number = len(traces)
    success, length = sum(trace.success for trace in traces), sum(len(trace.turns) for trace in traces)
    return {"episode/return": success / number, "episode/length": length / number, "episode/count": float(number)}
