"""Using a model, of a run or a published one: sample from it, talk to it."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import runs
from jaxrl.data import chatml, encode_prompts
from jaxrl.data.chat import Message
from jaxrl.data.tokenizer import check_ids, same_tokens
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.moe import experts
from jaxrl.nets.multi_token import over_rows
from jaxrl.posttrain import task
from jaxrl.posttrain.filling import filling_of
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.speculative import Drafts, small_drafter, speculative_rollout
from jaxrl.posttrain.unmasking import Unmasking
from jaxrl.types import Finish, Prompts

TRAINED = 1 << 30
"""A `max_tokens` that stands for the width the model was trained for."""


class Completion(NamedTuple):
    """Decoded text, why it ended (`eos`, `length`, `stop`) and its log-prob under the model.

    drafts: how drafting went for all samples of the prompt together; None without a drafter.
    """

    text: str
    finish: str
    log_prob: float
    drafts: Drafts | None = None


class Speaker(NamedTuple):
    """A model, ready to continue prompts: `complete(prompt, *, seed=0) -> [Completion]`.

    A prompt is a text, or a list of messages, which the model's chat template renders.
    """

    model: runs.Model
    complete: Callable[..., list[Completion]]


def fitted(sampling: Sampling, model: runs.Model) -> Sampling:
    """The sampling with the model's own width in the place of `TRAINED`."""
    return dataclasses.replace(sampling, max_tokens=model.max_tokens) if sampling.max_tokens == TRAINED else sampling


def generator(
    model: runs.Model, sampling: Sampling, *, samples: int = 1, unmasking: Unmasking | None = None
) -> Callable:
    """`task.make_generate` of an opened model; errors of `filling_of`."""
    filling = filling_of(model.transformer, model.mask_id, model.block, unmasking or Unmasking())
    return task.make_generate(model.language_model, model.tokenizer, sampling, samples=samples, filling=filling)


def drafting(
    model: runs.Model, drafter: runs.Model, sampling: Sampling, *, samples: int = 1, drafts: int = 4
) -> tuple[Callable, int]:
    """Completions that a smaller model drafts and the model checks; see `speculative_rollout`.

    Returns:
      A compiled `(params, prompts, key) -> (Rollout, Drafts)`, and the most tokens of a prompt and its completion.

    Raises:
      ValueError: models of different tokens, or that fill in masks.
    """
    if not same_tokens(model.tokenizer, drafter.tokenizer):
        kinds = [f"{one.to_json()['kind']} of {one.vocab_size} tokens" for one in (drafter.tokenizer, model.tokenizer)]
        raise ValueError(
            f"the drafter's tokenizer ({kinds[0]}) is not the model's ({kinds[1]}), so the ids of its drafts mean "
            "something else; expected a drafter with the model's tokenizer, such as a smaller run that began with it"
        )
    if (model.mask_id, drafter.mask_id) != (None, None):
        raise ValueError("networks that fill in masks neither draft nor take drafts; leave out the drafter")
    room = model.transformer.max_length + drafts  # rejected drafts stand behind the text
    (large, longest), (small, longest_draft) = (_with_room(one, room) for one in (model, drafter))
    ids = {"eos_id": model.tokenizer.eos_id, "pad_id": model.tokenizer.pad_id, "stop": task.stops(model.tokenizer)}
    how = {"drafter": small_drafter(small), "drafts": drafts, "sampling": sampling, "samples": samples}

    @jax.jit
    def generate(params, draft_params, prompts: Prompts, key):
        return speculative_rollout(large, params, prompts, key, draft_params=draft_params, **how, **ids)

    return lambda params, *given: generate(params, drafter.params, *given), min(longest, longest_draft) - drafts


def _with_room(model: runs.Model, length: int) -> tuple[LanguageModel, int]:
    """A model's functions for `speculative_rollout` with room for so many tokens, and the room they have."""
    transformer = model.transformer
    if transformer.positions == "learned" or "adapter" in model.params:
        return model.language_model, transformer.max_length
    return language_model(transformer.with_room(length), experts=over_rows(experts)), length


def open_run(
    folder: str,
    *,
    sampling: Sampling,
    samples: int = 1,
    unmasking: Unmasking | None = None,
    drafter: str = "",
    drafts: int = 4,
) -> Speaker:
    """Opens a model, by what `runs.load_model` takes, for prompts of any length its context holds.

    Prompts are padded to powers of two, so that few widths are compiled. With a `drafter`, a smaller model, as many
    `drafts` are made for each pass of the model; see `speculative_rollout`.

    Raises:
      ValueError: no model there, a drafter that does not fit; later, from `complete`, a prompt that the tokenizer or
        context cannot hold.
    """
    model = runs.load_model(folder)
    tokenizer, longest = model.tokenizer, model.transformer.max_length
    sampling = fitted(sampling, model)
    plain = generator(model, sampling, samples=samples, unmasking=unmasking)
    generate = lambda *given: (plain(*given), None)
    if drafter:
        small = runs.load_model(drafter)
        generate, longest = drafting(model, small, sampling, samples=samples, drafts=drafts)
    owner = "the context" + (f" with the drafter's {drafts} tokens a pass" if drafter else "")
    room = longest - sampling.max_tokens
    encode = partial(
        encode_prompts,
        tokenizer=tokenizer,
        add_bos=getattr(tokenizer, "adds_bos", False),
        template=model.template or chatml,
    )

    def complete(prompt: str | list[Message], *, seed: int = 0) -> list[Completion]:
        tokens, lengths = encode([{"prompt": prompt}])
        width = tokens.shape[1]
        if width > room:
            most = f"lower --max-tokens to {longest - width}" if width < longest else "shorten the prompt"
            raise ValueError(
                f"the prompt has {width} tokens and {sampling.max_tokens} new ones are asked for, "
                f"{width + sampling.max_tokens} in all; {owner} holds {longest}: {most}"
            )
        check_ids(tokens[0].tolist(), model.transformer.vocab_size)
        padding = min(1 << (width - 1).bit_length(), room) - width
        padded = np.pad(tokens, ((0, 0), (padding, 0)), constant_values=tokenizer.pad_id)
        prompts = Prompts(jnp.asarray(padded), jnp.asarray(lengths))
        result, counted = jax.device_get(generate(model.params, prompts, jax.random.key(seed)))
        finish = [Finish(reason).name.lower() for reason in result.finish]
        rows = zip(task.text_of(result, tokenizer), finish, result.log_probs.sum(axis=1), strict=True)
        return [Completion(text, reason, float(log_prob), counted) for text, reason, log_prob in rows]

    return Speaker(model, complete)


def chat(speaker: Speaker) -> None:
    """Reads lines from standard input until it ends; one the model cannot read is answered by the reason.

    A model with a chat template holds a conversation: each line is the user's next message, /new starts afresh. Any
    other model continues each line by itself.
    """
    model = speaker.model
    talks = model.template is not None and not model.marker
    if talks:
        print("Type a message; /new starts a new conversation, Ctrl-D ends.")
    else:
        print(f"Type a prompt{f', such as {model.example}' if model.example else ''}; Ctrl-D ends.")
    said: list[Message] = []
    for turn in itertools.count():
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if talks and line == "/new":
            said = []
        elif line:
            try:
                said = _reply(speaker, said, line, turn) if talks else _continue(speaker, line, turn)
            except ValueError as error:
                print(f"cannot read that: {error}")


def _reply(speaker: Speaker, said: list[Message], line: str, turn: int) -> list[Message]:
    """Prints the answer and returns the conversation with it; an empty one leaves no trace, templates refuse it."""
    asked = [*said, {"role": "user", "content": line}]
    answer = speaker.complete(asked, seed=turn)[0]
    print(answer.text + ("  [length]" if answer.finish == "length" else ""))
    return [*asked, {"role": "assistant", "content": answer.text}] if answer.text.strip() else said


def _continue(speaker: Speaker, line: str, turn: int) -> list[Message]:
    marker = speaker.model.marker
    prompt = line if not marker or line.endswith(marker) else line + marker
    print(prompt + speaker.complete(prompt, seed=turn)[0].text)
    return []
