"""A window with coloured buttons, pages and a text field: a screen to be operated by what is seen on it.

The task is a list of parts, "press red then blue then write yes": of the buttons only some are asked for, in an order.
After the four-button screens with which UI-TARS (Qin et al. 2025, arXiv 2501.12326) can be tried at a small scale; the
agent that reads and writes text is in `jaxrl.gui`.

The screen is a square grid of cells. Its first row is the title bar, which shows with `hint` what is still to be done;
its last column is the scrollbar; its last row is the text field; buttons, one cell each, stand in between.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs.env import Box, Env, TimeStep

COLOURS = {
    "red": (204, 51, 51),
    "green": (51, 170, 68),
    "blue": (51, 85, 204),
    "yellow": (238, 204, 34),
    "purple": (153, 51, 187),
    "orange": (238, 136, 17),
    "cyan": (34, 187, 204),
    "pink": (238, 130, 180),
}
WORDS = {"yes": (90, 90, 90), "no": (150, 150, 150)}
"""What can be written, and the grey that it looks like in the field."""
_FURNITURE = ((244, 244, 246), (60, 64, 72), (255, 255, 255), (200, 220, 255), (216, 216, 220), (120, 120, 128))
_WINDOW, _BAR, _FIELD, _FOCUS, _TRACK, _THUMB = range(len(_FURNITURE))

CLICK, TYPE, SCROLL, WAIT, FINISHED = range(5)
"""Kinds of actions."""
UP, DOWN, LEFT, RIGHT = range(4)


class Screen(NamedTuple):
    """What a window is like: `buttons` of the colours in their order, `targets` parts of a task, `pages` to scroll
    through, `words` that can be asked for, `side` cells of `cell` pixels along a side, `hint` in the title bar."""

    buttons: int = 4
    targets: int = 1
    pages: int = 1
    words: int = 0
    side: int = 6
    cell: int = 4
    hint: bool = False

    @property
    def pixels(self) -> int:
        """Width and height."""
        return self.side * self.cell

    @property
    def places(self) -> int:
        """Cells of a page where a button may stand."""
        return (self.side - 2) * (self.side - 1)

    @property
    def palette(self) -> np.ndarray:
        """All colours of its pictures: furniture, buttons, pressed buttons, words; uint8 [n, 3]."""
        buttons = list(COLOURS.values())[: self.buttons]
        pressed = [tuple(x // 2 for x in colour) for colour in buttons]
        return np.asarray([*_FURNITURE, *buttons, *pressed, *list(WORDS.values())[: self.words]], np.uint8)


class State(NamedTuple):
    """`places`: int32 [buttons], over all pages; `pressed`: bool [buttons]. `goal`: int32 [targets], numbers of
    buttons, and from `buttons` on of words; `done`: how many of them. `page`: int32. `focus`: whether the field has it.
    `typed`: the word in the field, from 1 on, or 0."""

    places: jax.Array
    pressed: jax.Array
    goal: jax.Array
    done: jax.Array
    page: jax.Array
    focus: jax.Array
    typed: jax.Array


def make(screen: Screen = Screen(hint=True)) -> Env:  # noqa: B008  (immutable)
    """The window as an environment.

    Actions are int32 [4]: kind (CLICK, TYPE, SCROLL, WAIT, FINISHED), x and y in pixels (of CLICK), and an argument:
    the word's number for TYPE, UP or DOWN for SCROLL. A click on a button presses it, on the field gives it the focus,
    which any other click takes away; only a field with focus takes a word. What is out of turn is seen but counts for
    nothing: wrap it in `time_limit` to make it cost.

    The reward is 1 with the last part of the task, which ends the episode. FINISHED before that ends it with 0.

    Args:
      screen: its settings.

    Returns:
      Env with uint8 observations [pixels, pixels, 3], the picture.

    Raises:
      ValueError: settings for which there is no room or there are no names.
    """
    _check(screen)
    size, most = screen.pixels, max(RIGHT, screen.words - 1)

    def reset(key):
        place_key, order_key, word_key, last_key = jax.random.split(key, 4)
        places = jax.random.permutation(place_key, screen.pages * screen.places)[: screen.buttons]
        goal = jax.random.permutation(order_key, screen.buttons)[: screen.targets]
        if screen.words:  # half of the tasks end with a word
            word = screen.buttons + jax.random.randint(word_key, (), 0, screen.words)
            goal = goal.at[-1].set(jnp.where(jax.random.bernoulli(last_key), word, goal[-1]))
        none = jnp.zeros((), jnp.int32)
        pressed, focus = jnp.zeros(screen.buttons, bool), jnp.zeros((), bool)
        state = State(places.astype(jnp.int32), pressed, goal.astype(jnp.int32), none, none, focus, none)
        return state, draw(screen, state)

    def step(key, state, action):
        kind, x, y, argument = action[0], action[1], action[2], action[3]
        column, row = x // screen.cell, y // screen.cell
        clicked, written = kind == CLICK, (kind == TYPE) & state.focus & (argument >= 0) & (argument < screen.words)
        hit = clicked & (column == _column(screen, state.places)) & (row == _row(screen, state.places))
        hit &= _page(screen, state.places) == state.page
        part = state.goal[jnp.minimum(state.done, screen.targets - 1)]
        numbers = jnp.arange(screen.buttons)
        right = (hit & (numbers == part)).any() | written & (screen.buttons + argument == part)
        move = (kind == SCROLL) * ((argument == DOWN).astype(jnp.int32) - (argument == UP))
        after = state._replace(
            pressed=state.pressed | hit,
            done=state.done + right,
            page=jnp.clip(state.page + move, 0, screen.pages - 1),
            focus=jnp.where(clicked, _on_field(screen, column, row), state.focus),
            typed=jnp.where(written, argument + 1, state.typed),
        )
        complete = after.done >= screen.targets
        observation = draw(screen, after)
        over, never = complete | (kind == FINISHED), jnp.zeros((), bool)
        return after, TimeStep(observation, complete.astype(jnp.float32), over, never, observation)

    def render(state):
        scale = -(-192 // size)
        return np.repeat(np.repeat(np.asarray(draw(screen, state)), scale, axis=0), scale, axis=1)

    actions = Box(0, (FINISHED, size - 1, size - 1, most), (4,), jnp.int32)
    return Env("GUI", reset, step, Box(0, 255, (size, size, 3), jnp.uint8), actions, render=render)


def draw(screen: Screen, state: State) -> jax.Array:
    """The picture of a state, uint8 [pixels, pixels, 3]; buttons leave a margin free below and on the right."""
    side = screen.side
    under = jnp.full((side, side), _WINDOW).at[0].set(_BAR)
    if screen.pages > 1:
        thumb = 1 + state.page * (side - 2) // screen.pages
        under = under.at[1:-1, -1].set(_TRACK).at[thumb, -1].set(_THUMB)
    if screen.words:
        seen = jnp.where(state.focus, _FOCUS, _FIELD)
        word = len(_FURNITURE) + 2 * screen.buttons + state.typed - 1
        under = under.at[-1, :-1].set(seen).at[-1, 0].set(jnp.where(state.typed > 0, word, seen))
    row = jnp.where(_page(screen, state.places) == state.page, _row(screen, state.places), side)  # others: nowhere
    colours = len(_FURNITURE) + jnp.arange(screen.buttons) + screen.buttons * state.pressed
    over = under.at[row, _column(screen, state.places)].set(colours, mode="drop")
    if screen.hint:
        word = state.goal >= screen.buttons
        colours = len(_FURNITURE) + state.goal + screen.buttons * word
        left = jnp.where(jnp.arange(screen.targets) < state.done, _BAR, colours)
        over = over.at[0, : screen.targets].set(left)
    inside = jnp.arange(screen.pixels) % screen.cell < max(screen.cell - 1, 1)
    inside = inside[:, None] & inside[None]
    large = lambda ids: jnp.repeat(jnp.repeat(ids, screen.cell, axis=0), screen.cell, axis=1)
    return jnp.asarray(screen.palette)[jnp.where(inside, large(over), large(under))]


def expert(screen: Screen, state: State) -> jax.Array:
    """The action that does the next part of the task, or brings it nearer; int32 [4]."""
    part = state.goal[jnp.minimum(state.done, screen.targets - 1)]
    button = jnp.minimum(part, screen.buttons - 1)
    away = _page(screen, state.places[button]) - state.page
    scroll = jnp.array([SCROLL, 0, 0, 0]).at[3].set(jnp.where(away > 0, DOWN, UP))
    press = jnp.where(away == 0, press_of(screen, state, button), scroll)
    middle = screen.cell // 2
    focus = jnp.array([CLICK, middle, screen.pixels - screen.cell + middle, 0])
    write = jnp.array([TYPE, 0, 0, 0]).at[3].set(part - screen.buttons)
    return jnp.where(part < screen.buttons, press, jnp.where(state.focus, write, focus)).astype(jnp.int32)


def press_of(screen: Screen, state: State, button: jax.Array) -> jax.Array:
    """A click on the middle of a button, int32 [4]."""
    middle = lambda cells: cells * screen.cell + screen.cell // 2
    place = state.places[button]
    x, y = middle(_column(screen, place)), middle(_row(screen, place))
    return jnp.stack([jnp.int32(CLICK), x, y, jnp.int32(0)]).astype(jnp.int32)


def instruction(screen: Screen, state: State) -> str:
    """The task in words: `press red then blue`, `press red then write yes`."""
    parts = [named(screen, int(part)) for part in np.asarray(state.goal)]
    return " then ".join(parts).replace("then press ", "then ")


def named(screen: Screen, part: int) -> str:
    """One part of a task in words: `press red`, `write yes`."""
    return f"press {[*COLOURS][part]}" if part < screen.buttons else f"write {[*WORDS][part - screen.buttons]}"


def _row(screen: Screen, place):
    return 1 + place % screen.places // (screen.side - 1)


def _column(screen: Screen, place):
    return place % (screen.side - 1)


def _page(screen: Screen, place):
    return place // screen.places


def _on_field(screen: Screen, column, row):
    return (row == screen.side - 1) & (column >= 0) & (column < screen.side - 1) & (screen.words > 0)


def _check(screen: Screen) -> None:
    room = screen.side >= 3 and screen.pages >= 1 and screen.cell >= 1 and screen.targets <= screen.side
    if not room or screen.buttons > screen.pages * screen.places:
        raise ValueError(
            f"{screen}: no room; expected at least 3 cells along a side, a page, {screen.buttons} cells for the "
            "buttons and no more targets than cells along a side"
        )
    if not 1 <= screen.targets <= screen.buttons <= len(COLOURS) or not 0 <= screen.words <= len(WORDS):
        raise ValueError(
            f"{screen}: expected 1 <= targets <= buttons <= {len(COLOURS)}, the colours there are, and at most "
            f"{len(WORDS)} words"
        )
