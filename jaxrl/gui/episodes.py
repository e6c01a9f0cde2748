"""Episodes of an agent that reads screens and writes actions, and learning from its own good ones.

The environment and the sampler are compiled, for all episodes side by side; Python stands between the steps, where
screens become text and text becomes actions: a tokeniser and a grammar are no arrays, so an episode is not the one scan
that it is for other agents (`agents.interact`, whose first states and actions within bounds are these too). Every step
has a prompt of its own, since old screens drop out of it: what a step writes is no continuation of what the last one
read.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.agents.interact import begin, within
from jaxrl.data.records import encode_prompts
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.envs.env import Env
from jaxrl.gui import actions
from jaxrl.gui.history import SCREENS, Show, Trace, Turn, kept, prompt
from jaxrl.gui.sight import Sight, see
from jaxrl.nets.language_model import LanguageModel
from jaxrl.nets.vision_language import with_images
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


class Drawn(NamedTuple):
    """How a response was drawn.

    prompt: its tokens, placeholders where a network sees features. tokens, log_probs, behaviour: of the response, as in
    `types.Rollout`. finish: a `types.Finish`.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    log_probs: np.ndarray
    behaviour: np.ndarray
    finish: int


class Said(NamedTuple):
    """A response and how it was drawn."""

    text: str
    drawn: Drawn


def play(world: World, respond: Callable, key: jax.Array, *, episodes: int, steps: int, alike: int = 1) -> list[Trace]:
    """Episodes side by side, each until it ends, or for so many steps.

    An episode also ends, without success, with a response that cannot be read; white space around it is left out.
    Success is a reward above 0.

    Args:
      world: the environment.
      respond: `(tasks, pasts, screens, states, key) -> responses`, lists of one entry for each episode, of those that
        go on; a response is a text or `Said`. `states` are for demonstrations, an agent does not look.
      key: consumed.
      episodes, steps: how many.
      alike: so many episodes after each other begin in the same state, a divisor of `episodes`.

    Returns:
      A trace for each episode.
    """
    if episodes % alike:
        raise ValueError(f"alike is {alike}; expected a divisor of the {episodes} episodes")
    start, step = _compiled(world.env)
    start_key, loop_key = jax.random.split(key)
    begun = start(jnp.repeat(jax.random.split(start_key, episodes // alike), alike))
    states, seen, at = begun.env, np.asarray(begun.observation), jax.device_get(begun.env)
    tasks = [world.task(_row(at, i)) for i in range(episodes)]
    pasts: list[tuple[Turn, ...]] = [()] * episodes
    success, valid = np.zeros(episodes, bool), np.ones(episodes, bool)
    going = list(range(episodes))
    for number in range(steps):
        response_key, step_key = jax.random.split(jax.random.fold_in(loop_key, number))
        of = lambda values: [values[i] for i in going]
        responses = respond(of(tasks), of(pasts), of(seen), [_row(at, i) for i in going], response_key)
        taken = np.tile(world.act(actions.Wait()), (episodes, 1))
        for i, said in zip(going, responses, strict=True):
            response, drawn = (said, None) if isinstance(said, str) else said
            response = response.strip()
            pasts[i] = (*pasts[i], Turn(seen[i], response, drawn))
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
    show: Show | Sight,
    width: int,
    sampling: Sampling,
    keep: int = SCREENS,
    rows: int | None = None,
    form: actions.Form = actions.BOX,
    record: bool = False,
) -> Callable:
    """The agent: `(params) -> respond` for `play`.

    Args:
      model, tokenizer: the policy; with a `Sight` the model is the decoder.
      show, keep: as in `history.prompt`; a `Sight` shows the network the pixels.
      width: tokens of the longest prompt; every prompt is padded to it, so that one program is compiled. With the task,
        the kept screens and max_tokens + 1 for each turn before it always is enough.
      sampling: of the responses; `max_tokens` is the longest.
      rows: prompts that are sampled together; None is as many as are asked for, rounded up to a power of two.
      form: of the world's places, whose marks stay in the text even if the tokenizer has them as special tokens.
      record: whether responses are `Said`, with their tokens and log-probs, or texts.

    Raises:
      ValueError: later, a prompt longer than width.
    """
    sight, written = (show, show.show) if isinstance(show, Sight) else (None, show)

    @jax.jit
    def sample(params, prompts: Prompts, bank, key):
        policy = model if sight is None else with_images(sight.config, bank, model=model, per_row=keep)
        eos, pad = tokenizer.eos_id, tokenizer.pad_id
        return rollout(policy, params, prompts, key, sampling=sampling, eos_id=eos, pad_id=pad)

    def bind(params):
        def respond(tasks, pasts, screens, states, key) -> list:
            asked = list(zip(tasks, pasts, screens, strict=True))
            size = rows or 1 << (len(asked) - 1).bit_length()
            found = []
            for part in range(0, len(asked), size):
                some = asked[part : part + size]
                every = some + some[:1] * (size - len(some))
                records = [{"prompt": prompt(*one, show=written, keep=keep)} for one in every]
                plain, lengths = encode_prompts(records, tokenizer, max_length=width, pad_to=width)
                tokens, bank = plain, None
                if sight is not None:
                    shown = [kept(past, screen, keep=keep) for _, past, screen in every]
                    tokens, bank = see(sight, tokenizer, plain, shown, rows=size * keep)
                prompts = Prompts(jnp.asarray(tokens), jnp.asarray(lengths))
                drawn = jax.device_get(sample(params, prompts, bank, jax.random.fold_in(key, part)))
                for i in range(len(some)):
                    end = int(drawn.lengths[i])
                    text = actions.decode(tokenizer, drawn.completions[i, :end].tolist(), form)
                    if sight is not None:
                        text = text.replace(sight.placeholder, "")  # of no screen
                    before = plain[i, width - lengths[i] :]
                    probs = drawn.log_probs[i, :end], drawn.behaviour_log_probs[i, :end]
                    how = Drawn(before, drawn.completions[i, :end], *probs, int(drawn.finish[i]))
                    found.append(Said(text, how) if record else text)
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
def _compiled(env: Env) -> tuple[Callable, Callable]:
    def step(keys, states, actions):
        return jax.vmap(env.step)(keys, states, within(env.action_space, actions))

    return jax.jit(lambda keys: begin(env, keys, len(keys))), jax.jit(step)


def _row(tree, i: int):
    return jax.tree.map(lambda x: x[i], tree)
