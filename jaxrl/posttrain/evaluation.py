"""Measuring a model, of a run or a published one: accuracy, pass@k, maj@k, length, and win rate against another."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl import runs
from jaxrl.data.sources import Record
from jaxrl.nets.language_model import language_model
from jaxrl.posttrain import judge as judging
from jaxrl.posttrain import rewards, talk, task
from jaxrl.posttrain import tools as tooling
from jaxrl.posttrain import turns as talking
from jaxrl.posttrain.judge import Estimate, WinRate
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.unmasking import Unmasking
from jaxrl.types import Finish


class Completions(NamedTuple):
    """What a model says to N problems, n times each.

    `problems`: the records. `texts`, `answers`, `finish`: N lists of n: the completion, what it answers in a spelling
    that equal answers share (None: nothing), and why it ended. `rewards`: `[N, n]`, NaN where there is none.
    `lengths`: `[N, n]` tokens.
    """

    problems: list[Record]
    texts: list[list[str]]
    answers: list[list[str | None]]
    finish: list[list[str]]
    rewards: np.ndarray
    lengths: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """1 where the reward is at least 1, else 0; NaN where there is none. `[N, n]`."""
        return np.where(np.isnan(self.rewards), np.nan, self.rewards >= 1)


class Evaluation(NamedTuple):
    """Result of `evaluate`: the model's figures and completions, and where it was compared, the other's too."""

    figures: dict[str, Estimate]
    completions: Completions
    other: "Evaluation | None" = None
    win_rate: WinRate | None = None


def evaluate(
    place: str,
    *,
    data: str = "",
    metrics: Sequence[str] = ("accuracy",),
    sampling: Sampling = Sampling(temperature=0.0, max_tokens=talk.TRAINED),  # noqa: B008  (immutable)
    samples: int = 1,
    reward: str = "",
    against: str = "",
    judge: str = "",
    chat: bool = False,
    tools: str = "",
    turns: int = 4,
    tool_form: str = "tags",
    batch: int = 512,
    seed: int = 0,
    unmasking: Unmasking | None = None,
) -> Evaluation:
    """Completions of problems, what they are worth, and how often they are better than those of another model.

    Args:
      place: what `runs.load_model` takes.
      data: JSONL with `prompt` and what the reward reads; empty takes the run's own held-out problems.
      metrics: of `judge.evaluate`; those of rewards are left out where nothing rewards.
      sampling: how completions are drawn; a `max_tokens` of `talk.TRAINED` is the width the model was trained for.
      samples: completions of each problem.
      reward: as `rewards.load_reward` takes it; empty compares answers exactly. From 1 on a completion is right.
      against: another model; both answer the same prompts, once each.
      judge: path/to/file.py:function of `(prompts, completions)`, see `judge.win_rate`, which decides between the two;
        or a reward, which then stands in the place of `reward`: the higher one wins.
      chat: whether to write each text prompt as a user's message, as `jaxrl chat` does.
      tools, turns, tool_form: what the model may call, how often it writes at most, and how, as in `jaxrl train grpo`.
        Texts and lengths then hold results, too.
      batch: completions drawn at once.
      seed: of the sampler.
      unmasking: in what order masks are filled, where networks do that.

    Raises:
      ValueError: what does not go together, before a model is loaded; data that lacks what is needed, or does not fit
        the model.
    """
    if judge and not against:
        raise ValueError(f"a judge, {judge}, compares two models and one was given; name the other: --against PLACE")
    if against and samples > 1:
        raise ValueError(f"{samples} samples were asked for, and two models are compared by one completion each")
    named = rewards.load_reward(judge) if judge else None
    verdicts = named if named is not None and judging.is_judge(named) else None
    score = rewards.load_reward(reward) if reward else None if named is verdicts else named
    exact = score is None and verdicts is None
    found = tooling.load_tools(tools) if tools else []
    if tool_form not in tooling.FORMS:
        raise ValueError(f"tool_form is {tool_form!r}; expected one of {', '.join(tooling.FORMS)}")
    for model in filter(None, (place, against)):
        runs.check_model(model)
    problems = _problems(place, data, ("prompt", "answer") if exact else ("prompt",))
    if not problems:
        raise ValueError(f"{data or place} has no problems to be answered")

    def one(place: str) -> Evaluation:
        model = runs.load_model(place)
        rewarded = partial(rewards.exact_text, marker=model.marker) if exact else score
        asked = [_as_message(record) for record in problems] if chat else problems
        drawn = complete(
            model,
            asked,
            sampling=talk.fitted(sampling, model),
            samples=samples,
            reward=rewarded,
            answer=partial(_answer, marker=model.marker, whole=exact),
            add_bos=getattr(model.tokenizer, "adds_bos", False) and not runs.is_run(place),
            tools=found,
            turns=turns,
            form=tooling.FORMS[tool_form](named=len(found) > 1),
            batch=batch,
            seed=seed,
            unmasking=None if place == against and model.mask_id is None else unmasking,
        )
        wanted = [name for name in metrics if name == "length" or rewarded is not None]
        given = {"correct": drawn.correct, "answers": drawn.answers, "lengths": drawn.lengths}
        return Evaluation(judging.evaluate(wanted, **given), drawn)

    ours = one(place)
    if not against:
        return ours
    theirs = one(against)
    sides = (ours.completions, theirs.completions)
    if verdicts is not None:
        given = [[texts[0] for texts in side.texts] for side in sides]
    else:
        verdicts, given = (lambda _, pairs: pairs), [side.rewards[:, 0].tolist() for side in sides]
    rate = judging.win_rate(verdicts, [record["prompt"] for record in problems], *given)
    return ours._replace(other=theirs, win_rate=rate)


def complete(
    model: runs.Model,
    problems: Sequence[Record],
    *,
    sampling: Sampling,
    samples: int = 1,
    reward: rewards.Reward | None = None,
    answer: Callable[[str], str] = str,
    add_bos: bool = False,
    tools: Sequence[tooling.Tool] = (),
    turns: int = 4,
    form: tooling.Form | None = None,
    batch: int = 512,
    seed: int = 0,
    unmasking: Unmasking | None = None,
) -> Completions:
    """Draws completions of problems and scores them.

    Args:
      model: of `runs.load_model`.
      problems: with `prompt`, and what the reward reads.
      sampling, samples: as in `rollout`.
      reward: a Python reward, or None.
      answer: what a completion answers; one that was cut off answers nothing.
      add_bos: whether to begin text prompts with the BOS.
      tools, turns, form: as in `turns.make_talk`; without tools a completion is one turn.
      batch: completions drawn at once, and so problems times samples.
      seed: of the sampler.
      unmasking: as in `evaluate`.

    Raises:
      ValueError: a prompt that does not fit the context, or that the tokenizer cannot read.
    """
    problems, tokenizer = list(problems), model.tokenizer
    encode = partial(task.prompts_of, tokenizer=tokenizer, add_bos=add_bos)
    width = encode(problems).tokens.shape[1]
    if width + sampling.max_tokens > model.transformer.max_length:
        raise ValueError(
            f"the longest prompt has {width} tokens; with {sampling.max_tokens} new ones it does not fit the context "
            f"of {model.transformer.max_length}; lower --max-tokens, or leave such problems out"
        )
    if tools and not model.transformer.causal:
        raise ValueError("tools need a model that writes from left to right; this one fills in masks")
    if tools:
        generate = _with_tools(model, width, tools, sampling=sampling, form=form, turns=turns, samples=samples)
    else:
        generate = talk.generator(model, sampling, samples=samples, unmasking=unmasking)
    size = min(max(batch // samples, 1), len(problems))
    texts, finish, scores, lengths = [], [], [], []
    for start in range(0, len(problems), size):
        part = [problems[i % len(problems)] for i in range(start, start + size)]  # one shape, one program
        key = jax.random.fold_in(jax.random.key(seed), start)
        drawn = jax.device_get(generate(model.params, encode(part, pad_to=width), key))
        kept = min(size, len(problems) - start) * samples
        drawn = jax.tree.map(lambda x: x[:kept], drawn)  # noqa: B023  (used at once)
        texts += task.text_of(drawn, tokenizer)
        finish += [Finish(reason).name.lower() for reason in drawn.finish]
        lengths += drawn.lengths.tolist()
        if reward is not None:
            asked = part[: kept // samples]
            scores += task.score_texts(reward, drawn, asked, tokenizer, samples=samples).values.tolist()
    keys = [rewards.vote_key(answer(text)) if why != "length" else "" for text, why in zip(texts, finish, strict=True)]
    rows = lambda values: [values[i : i + samples] for i in range(0, len(values), samples)]
    shape = (len(problems), samples)
    return Completions(
        problems,
        rows(texts),
        rows([key or None for key in keys]),
        rows(finish),
        np.asarray(scores or [np.nan] * len(texts), np.float64).reshape(shape),
        np.asarray(lengths).reshape(shape),
    )


def write_table(path: str | Path, tables: Sequence[tuple[str, Completions]]) -> None:
    """Writes JSON lines, one for each completion: its model, prompt, completion, the data's answer, what the completion
    answers (`given`), reward (null: none), why it ended, and its tokens."""
    with open(path, "x", encoding="utf-8") as file:
        for place, table in tables:
            for record, *row in zip(
                table.problems, table.texts, table.answers, table.rewards, table.finish, table.lengths, strict=True
            ):
                for text, given, reward, finish, length in zip(*row, strict=True):
                    line: dict[str, Any] = {"model": place, "prompt": record["prompt"], "completion": text}
                    line |= {"answer": record["answer"]} if "answer" in record else {}
                    line |= {"given": given, "reward": None if np.isnan(reward) else float(reward)}
                    file.write(json.dumps(line | {"finish": finish, "length": int(length)}) + "\n")


def _with_tools(
    model: runs.Model, width: int, tools: Sequence[tooling.Tool], *, sampling: Sampling, **options: Any
) -> Callable:
    """`(params, prompts, key) -> Rollout` in several turns, of a model that takes the caches these ask for."""
    functions, needed = model.language_model, talking.context(width, sampling.max_tokens)
    if needed > model.transformer.max_length and "adapter" not in model.params:
        functions = language_model(model.transformer.with_room(needed))
    ends = task.stops(model.tokenizer)
    say = talking.make_talk(functions, model.tokenizer, tools, sampling=sampling, stop=ends, **options)
    return lambda params, prompts, key: say(params, jax.device_get(prompts), key).rollout


def _problems(place: str, data: str, columns: tuple[str, ...]) -> list[Record]:
    if data:
        return task.load_records(data, columns=columns)
    if not runs.is_run(place):
        raise ValueError(f"{place} is no run and has no held-out problems; name some: --data problems.jsonl")
    _, values = runs.read_config(place)
    return task.load_task(  # split by text, whatever the tokenizer
        values["data"], tokenizer="byte", marker="", held_out=values["held_out"], columns=columns
    ).held_out


def _as_message(record: Record) -> Record:
    prompt = record["prompt"]
    return record if isinstance(prompt, list) else record | {"prompt": [{"role": "user", "content": prompt}]}


def _answer(text: str, *, marker: str, whole: bool) -> str:
    r"""What stands after the last marker (all, where there is none): all of that (`whole`), or what is boxed in it, or
    its last number, whichever there is."""
    part = text.rpartition(marker)[2] if marker else text
    found = None if whole else rewards.boxed(part) or rewards.last_number(part)
    return part if found is None else str(found)
