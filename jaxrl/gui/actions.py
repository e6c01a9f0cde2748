"""The actions of UI-TARS as values, and the one way to write each (Qin et al. 2025, arXiv 2501.12326).

    Thought: The red button is at the top.
    Action: click(start_box='<|box_start|>(412,96)<|box_end|>')

`parse` and `format` are each other's inverses: every text that `parse` takes is what `format` writes, so that a
completion cannot mean two things. Nothing is evaluated: a reader walks over the text and says where it stopped.
"""

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxrl.data.tokenizer import Tokenizer

Direction = Literal["up", "down", "left", "right"]


class Point(NamedTuple):
    """A place on the screen, x to the right and y downwards, whole numbers in the units of the `Form`."""

    x: int
    y: int


@dataclass(frozen=True)
class Click:
    """A click of the left button, or a tap."""

    at: Point


@dataclass(frozen=True)
class LeftDouble:
    """A double click."""

    at: Point


@dataclass(frozen=True)
class RightSingle:
    """A click of the right button."""

    at: Point


@dataclass(frozen=True)
class LongPress:
    """A tap that stays (mobile)."""

    at: Point


@dataclass(frozen=True)
class Drag:
    """From one place to another with the button held."""

    start: Point
    end: Point


@dataclass(frozen=True)
class Scroll:
    """Shows more of what lies in that direction."""

    at: Point
    direction: Direction


@dataclass(frozen=True)
class Hotkey:
    """Keys pressed together, in lower case with spaces between them: `ctrl c`."""

    key: str


@dataclass(frozen=True)
class Type:
    """Text typed where the focus is; a newline at its end submits it."""

    content: str


@dataclass(frozen=True)
class OpenApp:
    """An app by its name (mobile)."""

    app_name: str


@dataclass(frozen=True)
class Wait:
    """Nothing, for a while, and another screenshot."""


@dataclass(frozen=True)
class PressHome:
    """The home button (mobile)."""


@dataclass(frozen=True)
class PressBack:
    """The back button (mobile)."""


@dataclass(frozen=True)
class PressEnter:
    """The enter key (mobile)."""


@dataclass(frozen=True)
class Finished:
    """The task is done; the content is an answer, or None where there is none to give."""

    content: str | None = None


@dataclass(frozen=True)
class CallUser:
    """The task cannot be done, or not without the user."""


DESKTOP = {
    "click": Click,
    "left_double": LeftDouble,
    "right_single": RightSingle,
    "drag": Drag,
    "hotkey": Hotkey,
    "type": Type,
    "scroll": Scroll,
    "wait": Wait,
    "finished": Finished,
    "call_user": CallUser,
}
"""Actions of a computer by name."""

MOBILE = {
    "click": Click,
    "long_press": LongPress,
    "type": Type,
    "scroll": Scroll,
    "drag": Drag,
    "open_app": OpenApp,
    "press_home": PressHome,
    "press_back": PressBack,
    "press_enter": PressEnter,
    "wait": Wait,
    "finished": Finished,
    "call_user": CallUser,
}
"""Actions of a telephone by name."""

ACTIONS = DESKTOP | MOBILE
NAMES = {kind: name for name, kind in ACTIONS.items()}

Action = (
    Click | LeftDouble | RightSingle | LongPress | Drag | Scroll | Hotkey | Type | OpenApp | Wait
    | PressHome | PressBack | PressEnter | Finished | CallUser
)  # fmt: skip


Heading = Literal["Thought", "Reflection", "Action_Summary"]


class Step(NamedTuple):
    """What the model writes in a turn. A thought of None has no line of its own, one of "" an empty line.

    heading: what the thought stands under. The published parser knows two besides Thought: Reflection, whose text goes
    on with a line `Action_Summary: ...`, and Action_Summary alone. Both stay as they are written, in `thought`.
    """

    thought: str | None
    action: Action
    heading: Heading = "Thought"


class Form(NamedTuple):
    """How places are written: `at`, `start`, `end` are names of arguments, `before x between y after` their text.

    `largest`: the greatest coordinate there is, or None. `marks`: the parts of this text that published tokenizers have
    as special tokens, which decoding would drop; see `decode`.
    """

    at: str
    start: str
    end: str
    before: str
    between: str
    after: str
    largest: int | None
    marks: tuple[str, ...] = ()


_BOX = ("<|box_start|>", "<|box_end|>")
BOX = Form("start_box", "start_box", "end_box", f"{_BOX[0]}(", ",", f"){_BOX[1]}", 1000, _BOX)
"""UI-TARS: thousandths of the screen's width and height."""

PLAIN = BOX._replace(before="(", after=")", marks=())
"""What is left of `BOX` in a text decoded without special tokens, as servers return it; it is the published parser's
own form. Where places are pixels (UI-TARS-1.5): `PLAIN._replace(largest=None)`."""

POINT = Form("point", "start_point", "end_point", "<point>", " ", "</point>", None)
"""UI-TARS-1.5's prompts: pixels of the resized screenshot."""

THOUGHT, ACTION = "Thought: ", "Action: "
_HEADINGS = typing.get_args(Heading)
_ESCAPES = {"\\": "\\\\", "'": "\\'", '"': '\\"', "\n": "\\n"}
_DIRECTIONS = typing.get_args(Direction)
_DIGITS, _PLACES = "0123456789", ("at", "start", "end")


def format(step: Step | Action, form: Form = BOX) -> str:
    """The text of a step, or of an action alone.

    Text arguments escape backslash, both quotes and newline, as the published prompt asks; every other character
    stands for itself.

    Raises:
      ValueError: a coordinate outside the form's, or a direction or heading that is none.
    """
    if isinstance(step, Step):
        if step.heading not in _HEADINGS:
            raise ValueError(f"heading is {step.heading!r}; expected one of {', '.join(_HEADINGS)}")
        thought = "" if step.thought is None else f"{step.heading}: {step.thought}\n"
        return thought + ACTION + format(step.action, form)
    arguments = ", ".join(f"{name}='{_written(field, value, form)}'" for name, field, value in _filled(step, form))
    return f"{NAMES[type(step)]}({arguments})"


def parse(text: str, form: Form = BOX, *, actions: dict[str, type] = ACTIONS) -> Step:
    """The step that a text means: what `format` made it from.

    A thought may have several lines, even lines that look like actions: the last line alone is the action.

    Args:
      text: `Thought: ...` (or another heading), a newline and `Action: ...`; or the line of the action alone.
      form: of its places.
      actions: those that are known, by name.

    Raises:
      ValueError: anything else, with the place and what was expected there.
    """
    thought, place = None, 0
    heading: Heading = next((name for name in _HEADINGS if text.startswith(f"{name}: ")), "Thought")
    if text.startswith(f"{heading}: "):
        place = text.rfind(f"\n{ACTION}") + 1
        if not place:
            raise _error(text, len(text), f"a line that begins with {ACTION!r}")
        thought = text[len(heading) + 2 : place - 1]
    elif not text.startswith(ACTION):
        raise _error(text, 0, f"{THOUGHT!r} or {ACTION!r}")
    action, place = _call(text, place + len(ACTION), form, actions)
    if place < len(text):
        raise _error(text, place, "the end of the text")
    return Step(thought, action, heading)


def parse_action(text: str, form: Form = BOX, *, actions: dict[str, type] = ACTIONS) -> Action:
    """As `parse`, of a call alone: `click(start_box='...')`."""
    action, place = _call(text, 0, form, actions)
    if place < len(text):
        raise _error(text, place, "the end of the text")
    return action


def decode(tokenizer: Tokenizer, ids: Sequence[int], form: Form = BOX) -> str:
    """The text of what a model wrote, with the marks of the form, special or not, and without other special tokens.

    So the text can be parsed, and tokenised again as part of a later prompt it gives what was drawn.
    """
    marks = {i: mark for mark in form.marks if (i := tokenizer.token_id(mark)) is not None}
    text, start = "", 0
    for end in [*(place for place, i in enumerate(ids) if i in marks), len(ids)]:
        text += tokenizer.decode(ids[start:end]) + marks.get(ids[end] if end < len(ids) else -1, "")
        start = end + 1
    return text


def _filled(action: Action, form: Form):
    """(name in the text, field, value) of an action's arguments."""
    if type(action) not in NAMES:
        raise ValueError(f"{action!r} is no action; expected a Step or one of {', '.join(k.__name__ for k in NAMES)}")
    for field in dataclasses.fields(action):
        value = getattr(action, field.name)
        if value is not None:
            yield _name(field.name, form), field.name, value


def _name(field: str, form: Form) -> str:
    return {"at": form.at, "start": form.start, "end": form.end}.get(field, field)


def _written(field: str, value: Any, form: Form) -> str:
    if isinstance(value, Point):
        for axis, number in zip("xy", value, strict=True):
            small = isinstance(number, int) and (form.largest is None or number <= form.largest)
            if not small or number < 0:
                limit = "at least 0" if form.largest is None else f"from 0 to {form.largest}"
                raise ValueError(f"{axis} is {number!r}; expected a whole number {limit}")
        return f"{form.before}{value.x}{form.between}{value.y}{form.after}"
    if field in _PLACES or not isinstance(value, str):
        raise ValueError(f"{field} is {value!r}; expected {'a Point' if field in _PLACES else 'text'}")
    if field == "direction" and value not in _DIRECTIONS:
        raise ValueError(f"direction is {value!r}; expected one of {', '.join(_DIRECTIONS)}")
    return value.translate(str.maketrans(_ESCAPES))


def _call(text: str, place: int, form: Form, actions: dict[str, type]) -> tuple[Action, int]:
    bracket = text.find("(", place)
    name = text[place:bracket] if bracket >= 0 else ""
    if name not in actions:
        raise _error(text, place, f"one of {', '.join(actions)} and a bracket")
    kind, place = actions[name], bracket + 1
    fields = dataclasses.fields(kind)
    optional = all(field.default is not dataclasses.MISSING for field in fields)
    if optional and text.startswith(")", place):
        return kind(), place + 1
    values = []
    for i, field in enumerate(fields):
        place = _literal(text, place, f"{', ' if i else ''}{_name(field.name, form)}='")
        if field.name in _PLACES:
            value, place = _point(text, place, form)
        elif field.name == "direction":
            value, place = _word(text, place, _DIRECTIONS)
        else:
            value, place = _string(text, place)
        values.append(value)
        place = _literal(text, place, "'")
    return kind(*values), _literal(text, place, ")")


def _literal(text: str, place: int, expected: str) -> int:
    if not text.startswith(expected, place):
        raise _error(text, place, repr(expected))
    return place + len(expected)


def _word(text: str, place: int, words) -> tuple[str, int]:
    for word in words:
        if text.startswith(f"{word}'", place):
            return word, place + len(word)
    raise _error(text, place, f"one of {', '.join(words)}")


def _point(text: str, place: int, form: Form) -> tuple[Point, int]:
    x, place = _number(text, _literal(text, place, form.before), form.largest)
    y, place = _number(text, _literal(text, place, form.between), form.largest)
    return Point(x, y), _literal(text, place, form.after)


def _number(text: str, place: int, largest: int | None) -> tuple[int, int]:
    end = place
    while end < len(text) and text[end] in _DIGITS:
        end += 1
    digits = text[place:end]
    limit = "" if largest is None else f" from 0 to {largest}"
    sized = len(digits) < 10 and (largest is None or int(digits or "0") <= largest)
    if not digits or (digits[0] == "0" and len(digits) > 1) or not sized:
        raise _error(text, place, f"a whole number{limit} without leading zeros")
    return int(digits), end


def _string(text: str, place: int) -> tuple[str, int]:
    """Reads as far as the quote that ends it."""
    plain = {escape: character for character, escape in _ESCAPES.items()}
    value = []
    while place < len(text) and text[place] != "'":
        if text[place] == "\\":
            escape = text[place : place + 2]
            if escape not in plain:
                raise _error(text, place, f"one of the escapes {' '.join(plain)}")
            value.append(plain[escape])
        elif text[place] in _ESCAPES:
            raise _error(text, place, f"{_ESCAPES[text[place]]} in its place")
        else:
            value.append(text[place])
        place += len(_ESCAPES.get(value[-1], " "))
    return "".join(value), place


def _error(text: str, place: int, expected: str) -> ValueError:
    found = repr(text[place : place + 24]) if place < len(text) else "the end"
    return ValueError(f"action, character {place}: found {found}, expected {expected}")
