"""Using a run's model: evaluate it, sample from it, talk to it."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxrl import runs
from jaxrl.data.tokenizer import check_ids
from jaxrl.posttrain import rewards, task
from jaxrl.posttrain.rollout import Sampling
from jaxrl.types import Finish

TRAINED = 1 << 30
"""A `max_tokens` that stands for the width the model was trained for."""


class Completion(NamedTuple):
    """Decoded text, why it ended (`eos`, `length`, `stop`) and its log-prob under the model."""

    text: str
    finish: str
    log_prob: float


class Speaker(NamedTuple):
    """A run's model, ready to continue prompts. `complete(prompt, *, seed=0) -> [Completion]`."""

    model: runs.Model
    complete: Callable[..., list[Completion]]


def open_run(folder: str, *, sampling: Sampling, samples: int = 1) -> Speaker:
    """Opens a run's model for prompts of any length its context holds.

    Raises:
      ValueError: no model in the folder; later, from `complete`, a prompt that the tokenizer or context cannot hold.
    """
    model = runs.load_model(folder)
    if sampling.max_tokens == TRAINED:
        sampling = dataclasses.replace(sampling, max_tokens=model.max_tokens)
    generate = task.make_generate(model.language_model, model.tokenizer, sampling, samples=samples)
    room = model.transformer.max_length - sampling.max_tokens

    def complete(prompt: str, *, seed: int = 0) -> list[Completion]:
        prompts = task.prompts_of([{"prompt": prompt}], model.tokenizer)
        width = prompts.tokens.shape[1]
        if width > room:
            raise ValueError(
                f"the prompt has {width} tokens and {sampling.max_tokens} new ones are asked for; the context of "
                f"{model.transformer.max_length} leaves room for {max(room, 0)}. Shorten it or lower --max-tokens"
            )
        check_ids(np.asarray(prompts.tokens)[0].tolist(), model.transformer.vocab_size)
        result = jax.device_get(generate(model.params, prompts, jax.random.key(seed)))
        finish = [Finish(reason).name.lower() for reason in result.finish]
        rows = zip(task.text_of(result, model.tokenizer), finish, result.log_probs.sum(axis=1), strict=True)
        return [Completion(text, reason, float(log_prob)) for text, reason, log_prob in rows]

    return Speaker(model, complete)


def chat(speaker: Speaker) -> None:
    """Reads prompts from standard input until it ends; a line the model cannot read is answered by the reason."""
    marker, example = speaker.model.marker, speaker.model.example
    print(f"Type a prompt{f', such as {example}' if example else ''}; Ctrl-D ends.")
    for turn in itertools.count():
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            continue
        prompt = line if not marker or line.endswith(marker) else line + marker
        try:
            print(prompt + speaker.complete(prompt, seed=turn)[0].text)
        except ValueError as error:
            print(f"cannot read that: {error}")


class Accuracy(NamedTuple):
    """Result of `evaluate`."""

    accuracy: float
    correct: int
    problems: int


def evaluate(folder: str, *, data: str = "", batch: int = 512) -> Accuracy:
    """Greedy exact-answer accuracy of a run's model, compared as text.

    Args:
      folder: run folder.
      data: JSONL with `prompt` and `answer`; empty takes the run's own held-out problems.
      batch: problems decoded at once.
    """
    model = runs.load_model(folder)
    if data:
        problems = task.load_records(data, columns=("prompt", "answer"))
    else:
        _, values = runs.read_config(folder)
        problems = task.load_task(
            values["data"],
            tokenizer=model.tokenizer,
            marker=model.marker,
            held_out=values["held_out"],
            columns=("prompt", "answer"),
        ).held_out
    width = task.prompts_of(problems, model.tokenizer).tokens.shape[1]
    if width + model.max_tokens > model.transformer.max_length:
        raise ValueError(
            f"the longest prompt has {width} tokens; with {model.max_tokens} new ones it does not fit the context of "
            f"{model.transformer.max_length} that {folder} was trained for"
        )
    generate = task.make_generate(
        model.language_model, model.tokenizer, Sampling(temperature=0.0, max_tokens=model.max_tokens)
    )
    correct = 0
    for start in range(0, len(problems), batch):
        part = problems[start : start + batch]
        prompts = task.prompts_of(part, model.tokenizer, pad_to=width)
        completions = jax.device_get(generate(model.params, prompts, jax.random.key(0)))
        columns = {"answer": [str(record["answer"]) for record in part]}
        exact = rewards.exact_text(
            completions=task.text_of(completions, model.tokenizer),
            finish_reasons=[Finish(reason).name.lower() for reason in completions.finish],
            marker=model.marker,
            **columns,
        )
        correct += int(sum(exact))
    return Accuracy(correct / len(problems), correct, len(problems))
