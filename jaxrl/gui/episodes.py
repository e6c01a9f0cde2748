"""Episodes of an agent that reads screens and writes actions, and learning from its own good ones.

The environment and the sampler are compiled, for all episodes side by side; Python stands between the steps, where
screens become text and text becomes actions. Every step has a prompt of its own, since old screens drop out of it: what
a step writes is no continuation of what the last one read.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data.records import encode_prompts
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.envs.env import Env
from jaxrl.gui import actions
from jaxrl.gui.history import SCREENS, Show, Trace, Turn, prompt
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.types import Prompts


class World(NamedTuple):
    """An environment for agents that write.

    env: its observations are the screens [H, W, 3]. task: `(state) -> text`. act: `(action) -> array`, what an
    `actions.Action` is to the environment. form: how places are written, in whose units `act` gets them.
    """

    env: Env
    task: Callable[[Any], str]
    act: Callable[[actions.Action], np.ndarray]
    form: actions.Form = actions.BOX


def play(world: World, respond: Callable, key: jax.Array, *, episodes: int, steps: int) -> list[Trace]:
    """Episodes side by side, each until it ends, or for so many steps.

    An episode also ends, without success, with a response that cannot be read; white space around it is left out.
    Success is a reward above 0.

    Args:
      world: the environment.
      respond: `(tasks, pasts, screens, states, key) -> responses`, lists of one entry for each episode, of those that
        go on; `states` are for demonstrations, an agent does not look.
      key: consumed.
      episodes, steps: how many.

    Returns:
      A trace for each episode.
    """
    reset, step = _compiled(world.env.reset), _compiled(world.env.step)
    start_key, loop_key = jax.random.split(key)
    states, screens = reset(jax.random.split(start_key, episodes))
    seen, at = np.asarray(screens), jax.device_get(states)
    tasks = [world.task(_row(at, i)) for i in range(episodes)]
    pasts: list[tuple[Turn, ...]] = [()] * episodes
    success, valid = np.zeros(episodes, bool), np.ones(episodes, bool)
    going = list(range(episodes))
    for number in range(steps):
        response_key, step_key = jax.random.split(jax.random.fold_in(loop_key, number))
        of = lambda values: [values[i] for i in going]
        responses = respond(of(tasks), of(pasts), of(seen), [_row(at, i) for i in going], response_key)
        taken = np.tile(world.act(actions.Wait()), (episodes, 1))
        for i, response in zip(going, map(str.strip, responses), strict=True):
            pasts[i] = (*pasts[i], Turn(seen[i], response))
            try:
                taken[i] = world.act(actions.parse(response, world.form).action)
            except ValueError:
                valid[i] = False
        states, result = step(jax.random.split(step_key, episodes), states, jnp.asarray(taken))
        seen, at = np.asarray(result.observation), jax.device_get(states)
        over = np.asarray(result.terminated | result.truncated)
        success[going] |= (np.asarray(result.reward) > 0)[going] & valid[going]
        going = [i for i in going if valid[i] and not over[i]]
        if not going:
            break
    every = zip(tasks, pasts, success, valid, strict=True)
    return [Trace(task, past, bool(won), bool(read)) for task, past, won, read in every]


def make_respond(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    show: Show,
    width: int,
    sampling: Sampling,
    keep: int = SCREENS,
    rows: int | None = None,
    form: actions.Form = actions.BOX,
) -> Callable:
    """The agent: `(params) -> respond` for `play`.

    Args:
      model, tokenizer: the policy.
      show, keep: as in `history.prompt`.
      width: tokens of the longest prompt; every prompt is padded to it, so that one program is compiled.
      sampling: of the responses; `max_tokens` is the longest.
      rows: prompts that are sampled together; None is as many as are asked for, rounded up to a power of two.
      form: of the world's places, whose marks stay in the text even if the tokenizer has them as special tokens.

    Raises:
      ValueError: later, a prompt longer than width.
    """

    @jax.jit
    def sample(params, prompts: Prompts, key):
        eos, pad = tokenizer.eos_id, tokenizer.pad_id
        return rollout(model, params, prompts, key, sampling=sampling, eos_id=eos, pad_id=pad)

    def bind(params):
        def respond(tasks, pasts, screens, states, key) -> list[str]:
            texts = [prompt(*one, show=show, keep=keep) for one in zip(tasks, pasts, screens, strict=True)]
            size = rows or 1 << (len(texts) - 1).bit_length()
            found = []
            for part in range(0, len(texts), size):
                some = texts[part : part + size]
                filled = [{"prompt": text} for text in some + some[:1] * (size - len(some))]
                tokens, lengths = encode_prompts(filled, tokenizer, max_length=width, pad_to=width)
                part_key = jax.random.fold_in(key, part)
                drawn = jax.device_get(sample(params, Prompts(jnp.asarray(tokens), jnp.asarray(lengths)), part_key))
                ends = zip(drawn.completions[: len(some)], drawn.lengths, strict=False)
                found += [actions.decode(tokenizer, ids[:end].tolist(), form) for ids, end in ends]
            return found

        return respond

    return bind


def succeeded(trace: Trace) -> bool:
    """Whether the task was done."""
    return trace.success


def well_formed(trace: Trace) -> bool:
    """Whether every response could be read."""
    return trace.valid


def no_repeats(trace: Trace) -> bool:
    """Whether no action is done twice on the same screen, where it did not help the first time."""
    done = [(turn.response.rpartition(actions.ACTION)[2], np.asarray(turn.screen).tobytes()) for turn in trace.turns]
    return len(set(done)) == len(done)


RULES = (succeeded, well_formed, no_repeats)
"""What a trace must pass to be learnt from."""


def bootstrap(
    roll: Callable[[Any, jax.Array], list[Trace]],
    train: Callable[[Any, list[Trace], jax.Array], Any],
    params: Any,
    key: jax.Array,
    *,
    rounds: int,
    rules: Sequence[Callable[[Trace], bool]] = RULES,
) -> tuple[Any, list[dict[str, float]]]:
    """Rolls out, keeps the traces that pass every rule, learns from all that were kept so far; and again.

    The paper's rules come before a judging model and people, which are rules like others here.

    Args:
      roll: `(params, key) -> traces`.
      train: `(params, traces, key) -> params`.
      params: of the first agent.
      key: consumed.
      rounds: how often.
      rules: each `(trace) -> bool`.

    Returns:
      The last parameters, and for each round the shares of `success` and of `kept` among the traces rolled out.
    """
    good, history = [], []
    for number in range(rounds):
        roll_key, train_key = jax.random.split(jax.random.fold_in(key, number))
        traces = roll(params, roll_key)
        passed = [trace for trace in traces if all(rule(trace) for rule in rules)]
        good += passed
        won = sum(trace.success for trace in traces)
        history.append({"success": won / len(traces), "kept": len(passed) / len(traces)})
        if good:
            params = train(params, good, train_key)
    return params, history


@lru_cache(maxsize=16)
def _compiled(function: Callable) -> Callable:
    return jax.jit(jax.vmap(function))


def _row(tree, i: int):
    return jax.tree.map(lambda x: x[i], tree)
