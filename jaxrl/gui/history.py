"""What an agent is shown of its past, and records to learn from (Qin et al. 2025, arXiv 2501.12326, section 4.1).

    task, [screen], thought and action, [screen], thought and action, ..., screen  ->  thought and action

All thoughts and actions stay, of the screens only the last few: five in the paper. Only the answer to the last screen
is ever trained on. A screen enters by `show`, a function from a screen to text: letters for its patches
(`screens.mosaic`), or the placeholders of a network that sees it (`sight`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.data.packing import pack
from jaxrl.data.preferences import encode_pairs
from jaxrl.data.records import encode_examples
from jaxrl.data.sources import Record
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.types import Pairs, TokenBatch

SCREENS = 5
"""How many the paper keeps, the present one included."""
Show = Callable[[Any], str]


class Turn(NamedTuple):
    """`screen`: what was seen, [H, W, 3]. `response`: what was written, thought and action. `drawn`: the tokens that it
    was drawn as, an `episodes.Drawn`, or None where nobody asked for them."""

    screen: Any
    response: str
    drawn: Any = None


class Trace(NamedTuple):
    """An episode. `valid`: whether every response could be read."""

    task: str
    turns: tuple[Turn, ...]
    success: bool
    valid: bool = True


class Reflection(NamedTuple):
    """Two responses to the same past and the same screen: a wrong one, and what should stand in its place."""

    task: str
    past: tuple[Turn, ...]
    screen: Any
    wrong: str
    corrected: str


def prompt(task: str, past: Sequence[Turn], screen: Any, *, show: Show, keep: int = SCREENS) -> str:
    """What the next response follows upon, as one text.

    Args:
      task: what is asked for.
      past: turns before this one.
      screen: what is seen now.
      show: a screen as text.
      keep: screens that stay, this one included.

    Raises:
      ValueError: keep < 1.
    """
    first = _first(past, keep)
    shown = (f"{show(turn.screen) if i >= first else ''}{turn.response}\n" for i, turn in enumerate(past))
    return f"{task}\n{''.join(shown)}{show(screen)}"


def messages(
    task: str, past: Sequence[Turn], screen: Any, *, show: Show, keep: int = SCREENS, system: str | None = None
) -> list[dict[str, str]]:
    """The same as a conversation, for a chat template: task and screens are the user's, responses the assistant's."""
    first = _first(past, keep)
    said = [{"role": "system", "content": system}] if system else []
    said.append({"role": "user", "content": task})
    for i, turn in enumerate([*past, Turn(screen, "")]):
        if i >= first:
            said.append({"role": "user", "content": show(turn.screen)})
        if i < len(past):
            said.append({"role": "assistant", "content": turn.response})
    return said


def kept(past: Sequence[Turn], screen: Any, *, keep: int = SCREENS) -> list[Any]:
    """The screens that a prompt holds, in its order: what stands for them in a vision network."""
    return [turn.screen for turn in past[_first(past, keep) :]] + [screen]


def records(
    trace: Trace, *, show: Show, keep: int = SCREENS, learnt: Callable[[Trace, int], bool] = lambda trace, turn: True
) -> list[Record]:
    """One `prompt` and `completion` for each turn of which `learnt(trace, turn)` holds."""
    turns = trace.turns
    past = lambda i: prompt(trace.task, turns[:i], turns[i].screen, show=show, keep=keep)
    return [{"prompt": past(i), "completion": turns[i].response} for i in range(len(turns)) if learnt(trace, i)]


def sft_batch(
    traces: Iterable[Trace], tokenizer: Tokenizer, *, pad_to: int | None = None, packed: int | None = None, **knobs: Any
) -> TokenBatch:
    """Rows for `posttrain.sft`, one for each turn; the loss is on thought, action and EOS of that turn.

    Args:
      traces: at least one turn of them is learnt.
      tokenizer: of the model.
      pad_to: as in `data.encode_examples`.
      packed: tokens of a row that several turns share, each as if it were alone; early turns are short, late ones long.
      knobs: `show`, `keep` and `learnt`, as in `records`.
    """
    rows = encode_examples([row for trace in traces for row in records(trace, **knobs)], tokenizer, pad_to=pad_to)
    batch = TokenBatch(rows.tokens, rows.loss_mask) if packed is None else pack(rows, packed)  # pyright: ignore
    return jax.tree.map(jnp.asarray, batch)


def correct(trace: Trace, turn: int, corrected: str) -> Reflection:
    """A reflection on a turn: its response was wrong, and this is better.

    With the turn after an error, whose response goes on as if nothing had happened, and a correction that notices it,
    these are the paper's pairs of post-reflection.
    """
    wrong = trace.turns[turn]
    return Reflection(trace.task, trace.turns[:turn], wrong.screen, wrong.response, corrected)


def pair_batch(
    reflections: Iterable[Reflection],
    tokenizer: Tokenizer,
    *,
    show: Show,
    keep: int = SCREENS,
    pad_to: int | None = None,
) -> Pairs:
    """Pairs for `posttrain.preference`: the corrected response is preferred, both follow the same tokens."""
    rows = pair_records(reflections, show=show, keep=keep)
    return jax.tree.map(jnp.asarray, encode_pairs(rows, tokenizer, pad_to=pad_to))


def pair_records(reflections: Iterable[Reflection], *, show: Show, keep: int = SCREENS) -> list[Record]:
    """`prompt`, `chosen` (the corrected response) and `rejected` of each."""
    past = lambda one: prompt(one.task, one.past, one.screen, show=show, keep=keep)
    return [{"prompt": past(one), "chosen": one.corrected, "rejected": one.wrong} for one in reflections]


def _first(past: Sequence[Turn], keep: int) -> int:
    """The first turn whose screen is kept."""
    if keep < 1:
        raise ValueError(f"keep is {keep}; expected at least 1, the present screen")
    return max(len(past) + 1 - keep, 0)
