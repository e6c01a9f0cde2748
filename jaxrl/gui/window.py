"""The window of `jaxrl.envs.gui` for agents that write: its words, its tokeniser, and somebody to imitate.

    Thought: press red
    Action: click(start_box='<|box_start|>(271,438)<|box_end|>')

The demonstrator can be made to slip: to think of a wrong button and press it, to see that, and to go on rightly. An
agent that imitates it learns the slips too; pairs of a slip and its correction, `reflections`, get them out again.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs import gui
from jaxrl.gui import actions, coordinates, screens
from jaxrl.gui.episodes import World
from jaxrl.gui.history import Reflection, Trace, correct

REGRET = "that was wrong: "
"""How the thought after a slip begins."""


def window(screen: gui.Screen = gui.Screen()) -> World:  # noqa: B008  (immutable)
    """The environment, its tasks in words, places in thousandths of its sides."""
    return World(gui.make(screen), partial(gui.instruction, screen), partial(to_array, screen))


def tokenizer(screen: gui.Screen, *pieces: str) -> screens.PieceTokenizer:
    """One token for each word of the tasks, the frame of an action, a digit and a patch of the screen.

    pieces: more of them, such as `sight.PLACEHOLDER`.
    """
    words = ["press ", "write ", "scroll up", "scroll down", "click the field", " then ", REGRET]
    words += [*list(gui.COLOURS)[: screen.buttons], *list(gui.WORDS)[: screen.words]]
    box, call = actions.BOX, "(start_box='<|box_start|>("
    frames = [f"{name}{call}" for name in ("click", "scroll")] + ["type(content='", "finished()", "wait()"]
    frames += [f"{box.after}')", f"{box.after}', direction='up')", f"{box.after}', direction='down')"]
    letters = "".join(chr(i) for i in range(32, 127)) + "\n" + screens.letters(screen.palette)
    return screens.PieceTokenizer(letters, (actions.THOUGHT, f"\n{actions.ACTION}", *words, *frames, *pieces))


def to_array(screen: gui.Screen, action: actions.Action) -> np.ndarray:
    """What an action does in the window, int32 [4]; there, actions it does not know are like waiting."""
    kind, place, argument = gui.WAIT, actions.Point(0, 0), 0
    words = [*gui.WORDS][: screen.words]
    match action:
        case actions.Click(at):
            kind, place = gui.CLICK, coordinates.to_pixels(at, (screen.pixels, screen.pixels))
        case actions.Type(content) if content in words:
            kind, argument = gui.TYPE, words.index(content)
        case actions.Scroll(_, direction):
            kind, argument = gui.SCROLL, ("up", "down", "left", "right").index(direction)
        case actions.Finished() | actions.CallUser():
            kind = gui.FINISHED
    return np.asarray([kind, *place, argument], np.int32)


def to_action(screen: gui.Screen, array: np.ndarray) -> actions.Action:
    """The action that `to_array` makes this of; scrolling is done in the middle of the screen."""
    kind, x, y, argument = map(int, array)
    if kind == gui.CLICK:
        return actions.Click(coordinates.to_thousandths(actions.Point(x, y), (screen.pixels, screen.pixels)))
    if kind == gui.TYPE:
        return actions.Type([*gui.WORDS][argument])
    if kind == gui.SCROLL:
        return actions.Scroll(actions.Point(500, 500), ("up", "down", "left", "right")[argument])
    return actions.Finished() if kind == gui.FINISHED else actions.Wait()


def demonstrator(screen: gui.Screen, *, slip: float = 0.0) -> Callable:
    """A `respond` for `episodes.play` that looks at the state and does what is next.

    Args:
      screen: of the window.
      slip: how often the first click of an episode is on a wrong button.
    """
    expert, press = _compiled(screen)

    def respond(tasks, pasts, seen, states, key) -> list[str]:
        draws = np.asarray(jax.random.uniform(key, (len(tasks), 2)))
        together = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *states)
        right = np.asarray(expert(together))
        wrong = np.asarray([_wrong(screen, state, draw[1]) for state, draw in zip(states, draws, strict=True)])
        wrong = np.where((draws[:, 0] < slip) & [not past for past in pasts], wrong, -1)
        pressed = np.asarray(press(together, jnp.asarray(np.maximum(wrong, 0))))
        responses = []
        for i, (state, past) in enumerate(zip(states, pasts, strict=True)):
            if wrong[i] >= 0:
                thought, taken = gui.named(screen, int(wrong[i])), pressed[i]
            else:
                regret = REGRET if past and _slipped(screen, state, past[-1].response) else ""
                thought, taken = regret + _thought(screen, state, right[i]), right[i]
            responses.append(actions.format(actions.Step(thought, to_action(screen, taken))))
        return responses

    return respond


def reflections(trace: Trace) -> list[Reflection]:
    """For each slip that the next turn regrets: what should have been done, as that turn does it."""
    found = []
    for i in range(1, len(trace.turns)):
        thought, action, _ = actions.parse(trace.turns[i].response)
        if thought and thought.startswith(REGRET):
            corrected = actions.format(actions.Step(thought.removeprefix(REGRET), action))
            found.append(correct(trace, i - 1, corrected))
    return found


@lru_cache(maxsize=16)
def _compiled(screen: gui.Screen):
    return jax.jit(jax.vmap(partial(gui.expert, screen))), jax.jit(jax.vmap(partial(gui.press_of, screen)))


def _thought(screen: gui.Screen, state: gui.State, taken: np.ndarray) -> str:
    part = int(state.goal[min(int(state.done), screen.targets - 1)])
    if taken[0] == gui.SCROLL:
        return f"scroll {('up', 'down')[taken[3]]}"
    return "click the field" if part >= screen.buttons and taken[0] == gui.CLICK else gui.named(screen, part)


def _wrong(screen: gui.Screen, state: gui.State, draw: float) -> int:
    """A button in sight that is not the next part of the task, or -1."""
    part = int(state.goal[min(int(state.done), screen.targets - 1)])
    shown = np.asarray(state.places) // screen.places == int(state.page)
    others = [i for i in range(screen.buttons) if shown[i] and i != part]
    return others[int(draw * len(others))] if others else -1


def _slipped(screen: gui.Screen, state: gui.State, response: str) -> bool:
    """Whether the last turn pressed a button that was not asked for then."""
    thought = (actions.parse(response).thought or "").removeprefix(REGRET)
    last = gui.named(screen, int(state.goal[int(state.done) - 1])) if state.done > 0 else ""
    return thought.startswith("press ") and thought != last
