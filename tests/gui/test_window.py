"""The window follows its rules, shows its state, and turns into text and back."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import envs
from jaxrl.agents import interact
from jaxrl.data.tokenizer import CharTokenizer
from jaxrl.envs import gui as env
from jaxrl.gui import actions, screens, window

FULL = env.Screen(buttons=5, targets=3, pages=2, words=2, hint=True)


@lru_cache
def compiled(screen):
    made = env.make(screen)
    return jax.jit(made.reset), jax.jit(made.step)


def started(screen, seed=0, **changes):
    state, _ = compiled(screen)[0](jax.random.key(seed))
    return state._replace(**{name: jnp.asarray(value) for name, value in changes.items()})


def run(screen, state, *taken):
    """The state after the actions, and the last TimeStep."""
    for number, action in enumerate(taken):
        state, result = compiled(screen)[1](jax.random.key(number), state, jnp.asarray(action, jnp.int32))
    return state, result


def cells_of(screen, state):
    """The ids of the palette in every cell, by loops."""
    ids = np.zeros((screen.side, screen.side), int)
    ids[0] = 1
    if screen.pages > 1:
        ids[1:-1, -1] = 4
        ids[1 + int(state.page) * (screen.side - 2) // screen.pages, -1] = 5
    if screen.words:
        ids[-1, :-1] = 3 if state.focus else 2
        if state.typed:
            ids[-1, 0] = 6 + 2 * screen.buttons + int(state.typed) - 1
    for button, place in enumerate(np.asarray(state.places)):
        page, place = divmod(int(place), screen.places)
        if page == state.page:
            row, column = divmod(place, screen.side - 1)
            ids[1 + row, column] = 6 + button + screen.buttons * bool(state.pressed[button])
    if screen.hint:
        for i, part in enumerate(np.asarray(state.goal)):
            if i >= state.done:
                ids[0, i] = 6 + part if part < screen.buttons else 6 + screen.buttons + part
    return ids


def test_protocol():
    envs.check(envs.time_limit(env.make(FULL), 10), steps=8)


@pytest.mark.parametrize("seed", range(4))
def test_pictures_and_their_letters_show_the_state(seed):
    changes = [{}, {"page": 1, "typed": 2}, {"focus": True, "done": 1}, {"pressed": [True, False, True, True, False]}]
    state = started(FULL, seed, **changes[seed])
    picture = np.asarray(env.draw(FULL, state))
    ids = cells_of(FULL, state)
    assert picture.shape == (24, 24, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[1::4, 1::4], FULL.palette[ids])
    np.testing.assert_array_equal(screens.patch_ids(jnp.asarray(picture), FULL.palette, patch=4), ids.ravel())
    button = int(np.argmax(np.asarray(state.places) // FULL.places == state.page))
    row, column = divmod(int(state.places[button]) % FULL.places, FULL.side - 1)
    assert (picture[4 * row + 7, 4 * column : 4 * column + 4] == FULL.palette[0]).all()  # the margin below


def test_colours_differ():
    screen = env.Screen(buttons=len(env.COLOURS), words=len(env.WORDS))
    assert len(np.unique(screen.palette, axis=0)) == len(screen.palette)


def test_a_click_presses_what_is_seen_there():
    screen = FULL
    state = started(screen, places=[0, 19, 27, 5, 6], goal=[1, 0, 2])
    after, result = run(screen, state, [env.CLICK, 3, 4, 0])
    assert after.pressed.tolist() == [True, False, False, False, False] and after.done == 0 and not result.terminated
    after, _ = run(screen, after, [env.CLICK, 19, 19, 0])
    assert after.pressed.sum() == 2 and after.done == 1
    assert run(screen, after, [env.CLICK, 4, 4, 0])[0].done == 1  # beside it
    assert run(screen, after, [env.CLICK, 8, 8, 0])[0].pressed.sum() == 2  # on the other page
    assert run(screen, after, [env.SCROLL, 0, 0, env.DOWN], [env.CLICK, 8, 8, 0])[0].pressed[2]
    last, result = run(screen, after, [env.CLICK, 0, 7, 0])
    assert last.done == 2 and not result.terminated
    last, result = run(screen, last, [env.SCROLL, 0, 0, env.DOWN], [env.CLICK, 8, 8, 0])
    assert last.done == 3 and result.reward == 1 and result.terminated


def test_scrolling_stays_within_the_pages():
    pages = [
        int(run(FULL, started(FULL, page=page), [env.SCROLL, 0, 0, way])[0].page) for page in (0, 1) for way in range(4)
    ]
    assert pages == [0, 1, 0, 0, 0, 1, 1, 1]


def test_a_field_takes_a_word_while_it_has_the_focus():
    screen = FULL
    state = started(screen, done=2, goal=[0, 1, 6])  # the second word
    write = [env.TYPE, 0, 0, 1]
    assert run(screen, state, write)[0].typed == 0
    assert run(screen, state, [env.CLICK, 0, 23, 0], [env.CLICK, 23, 23, 0], write)[0].typed == 0
    wrong, result = run(screen, state, [env.CLICK, 0, 23, 0], [env.TYPE, 0, 0, 0])
    assert wrong.typed == 1 and not result.terminated and result.reward == 0
    right, result = run(screen, wrong, write)
    assert right.typed == 2 and result.terminated and result.reward == 1
    assert run(screen, wrong, [env.TYPE, 0, 0, 2])[0].typed == 1  # no such word


def test_finishing_early_is_failing():
    _, result = run(FULL, started(FULL), [env.WAIT, 0, 0, 0], [env.FINISHED, 0, 0, 0])
    assert result.terminated and result.reward == 0


def test_the_expert_does_every_task_and_tasks_are_of_all_kinds():
    many = envs.vectorise(env.make(FULL), 64)
    reset, step = jax.jit(many.reset), jax.jit(many.step)
    expert = jax.jit(jax.vmap(partial(env.expert, FULL)))
    state, _ = reset(jax.random.key(1))
    goals = np.asarray(state.goal)
    assert 0.2 < (goals[:, -1] >= FULL.buttons).mean() < 0.8 and (goals[:, :-1] < FULL.buttons).all()
    assert all(len(set(goal)) == FULL.targets for goal in goals.tolist())
    assert all(len(set(places)) == FULL.buttons for places in np.asarray(state.places).tolist())
    won = np.zeros(64, bool)
    for number in range(8):
        state, result = step(jax.random.key(number), state, expert(state))
        won |= np.asarray(result.reward > 0)
    assert won.all()


def test_the_agents_loop_runs_the_window():
    """A policy of pixels: it presses the button whose colour the title bar shows."""

    def act(observation, mask, memory, noise):
        cells = observation[:, 1::4, 1::4].astype(jnp.int32)
        wanted = (cells == cells[:, :1, :1]).all(-1).at[:, 0].set(False).reshape(len(cells), -1)
        row, column = jnp.divmod(jnp.argmax(wanted, axis=1), 6)
        zero = jnp.zeros_like(row)
        return jnp.stack([zero + env.CLICK, 4 * column + 1, 4 * row + 1, zero], axis=1), memory, ()

    made = envs.make("GUI")
    acting = jax.jit(lambda keys: interact.collect(made, act, interact.begin(made, keys[0], 5), keys[1], steps=6)[1])
    trajectory = acting(jax.random.split(jax.random.key(0)))
    assert trajectory.done.all() and (trajectory.reward == 1).all() and (trajectory.episode_length == 1).all()


def test_instructions():
    state = started(FULL, goal=[0, 4, 6])
    assert env.instruction(FULL, state) == "press red then purple then write no"


def test_actions_and_arrays():
    taken = [[env.CLICK, 3, 22, 0], [env.TYPE, 0, 0, 1], [env.SCROLL, 0, 0, env.DOWN], [env.SCROLL, 0, 0, env.UP]]
    for array in [*taken, [env.WAIT, 0, 0, 0], [env.FINISHED, 0, 0, 0]]:
        np.testing.assert_array_equal(window.to_array(FULL, window.to_action(FULL, np.asarray(array))), array)
    at = actions.Point(999, 0)
    assert window.to_array(FULL, actions.Click(at)).tolist() == [env.CLICK, 23, 0, 0]
    assert window.to_array(FULL, actions.CallUser())[0] == env.FINISHED
    for other in (actions.LeftDouble(at), actions.Type("maybe"), actions.Hotkey("ctrl c"), actions.Drag(at, at)):
        assert window.to_array(FULL, other).tolist() == [env.WAIT, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": 2}, "no room"),
        ({"side": 3, "buttons": 3}, "no room; expected at least 3 cells along a side, a page, 3 cells for the buttons"),
        ({"targets": 5}, "1 <= targets <= buttons <= 8"),
        ({"buttons": 9}, "1 <= targets <= buttons <= 8"),
        ({"words": 3}, "at most 2 words"),
    ],
)
def test_impossible_windows(changes, message):
    with pytest.raises(ValueError, match=message):
        env.make(env.Screen()._replace(**changes))


def test_patches_go_by_the_majority():
    palette = np.asarray([[0, 0, 0], [100, 0, 0], [0, 0, 200]], np.uint8)
    screen = palette[np.asarray([[1, 0, 1, 2], [0, 0, 2, 1]])] + np.asarray([3, 0, 1], np.uint8)
    np.testing.assert_array_equal(screens.patch_ids(jnp.asarray(screen), palette, patch=2), [0, 1])
    assert screens.mosaic(palette, patch=1)(screen) == "".join(chr(0xE000 + i) for i in [1, 0, 1, 2, 0, 0, 2, 1])
    with pytest.raises(ValueError, match="patches of 3 do not fill a screen of 4 x 2"):
        screens.patch_ids(jnp.asarray(screen), palette, patch=3)


def test_pieces_are_one_token_each():
    tokenizer = screens.PieceTokenizer("abcd", ("ab", "abc"))
    assert tokenizer.encode("abcab" + "dc") == [8, 7, 3, 2] and tokenizer.vocab_size == 9
    assert tokenizer.encode("abc", special=False) == [0, 1, 2]
    assert tokenizer.decode([8, tokenizer.eos_id, 7, 3, tokenizer.pad_id, 2]) == "abcabdc"
    assert [tokenizer.token_id(text) for text in ("abc", "a", "<eos>", "x")] == [8, 0, tokenizer.eos_id, None]
    assert [tokenizer.token_text(i) for i in (8, 0, 5)] == ["abc", "a", "<eos>"]
    assert screens.PieceTokenizer.from_json(tokenizer.to_json()) == tokenizer
    assert screens.PieceTokenizer("ab").encode("ba") == CharTokenizer("ab").encode("ba")
    for wrong in (lambda: tokenizer.encode("x"), lambda: tokenizer.decode([9])):
        with pytest.raises(ValueError, match="not in the alphabet|outside the vocabulary"):
            wrong()
    for pieces in (("a",), ("ab", "ab")):
        with pytest.raises(ValueError, match="expected distinct ones of two characters or more"):
            screens.PieceTokenizer("abcd", pieces)


def test_the_windows_tokeniser_writes_all_that_is_said_there():
    tokenizer = window.tokenizer(FULL)
    text = "Thought: that was wrong: press red\nAction: click(start_box='<|box_start|>(104,938)<|box_end|>')"
    assert len(tokenizer.encode(text)) == 14 and tokenizer.decode(tokenizer.encode(text)) == text
