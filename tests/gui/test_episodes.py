"""Episodes side by side, what ends them, which of them are learnt from, and the loop around it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import gui
from jaxrl.envs import gui as env
from jaxrl.gui import actions, episodes, history, screens, window
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.posttrain.rollout import Sampling

SCREEN = env.Screen(buttons=4, targets=2, words=1)
WORLD = window.window(SCREEN)
TOKENIZER = window.tokenizer(SCREEN)
SHOW = screens.mosaic(SCREEN.palette, patch=SCREEN.cell)
WAIT = "Action: wait()"


def played(respond, *, steps=5, seed=0):
    return gui.play(WORLD, respond, jax.random.key(seed), episodes=6, steps=steps)


def test_demonstrations_succeed_and_regret_their_slips():
    traces = played(window.demonstrator(SCREEN, slip=0.6), seed=1)
    assert all(trace.success and trace.valid and episodes.no_repeats(trace) for trace in traces)
    assert 1 <= sum(bool(window.reflections(trace)) for trace in traces) <= 5
    for trace in traces:
        thoughts = [actions.parse(turn.response).thought for turn in trace.turns]
        parts = [
            f"press {part}" if " " not in part else part for part in trace.task.removeprefix("press ").split(" then ")
        ]
        if window.reflections(trace):
            wrong, regret, *rest = thoughts
            assert wrong != parts[0] and regret == f"that was wrong: {parts[0]}"
            (found,) = window.reflections(trace)
            assert found.past == () and found.wrong == trace.turns[0].response
            assert gui.parse(found.corrected).thought == parts[0]
            assert gui.parse(found.corrected).action == gui.parse(trace.turns[1].response).action
            assert (found.screen == trace.turns[0].screen).all()
        else:
            first, *rest = thoughts
            assert first == parts[0]
        assert [thought for thought in rest if thought != "click the field"] == parts[1:]


def test_screens_of_a_trace_are_those_the_response_saw():
    for trace in played(window.demonstrator(SCREEN)):
        first, second = (turn.screen for turn in trace.turns[:2])
        at = window.to_array(SCREEN, gui.parse(trace.turns[0].response).action)
        colour = env.COLOURS[trace.task.split()[1]]
        assert (first[at[2], at[1]] == colour).all() and (second[at[2], at[1]] == np.asarray(colour) // 2).all()


def test_what_cannot_be_read_ends_an_episode():
    right = window.demonstrator(SCREEN)

    def respond(tasks, pasts, seen, states, key):
        asked.append(len(tasks))
        said = right(tasks, pasts, seen, states, key)
        return [*said[:-1], "Action: clack()"] if not pasts[0] else said

    asked: list[int] = []
    traces = played(respond)
    assert [trace.valid for trace in traces] == [True] * 5 + [False] == [trace.success for trace in traces]
    assert len(traces[5].turns) == 1 and asked[:2] == [6, 5]


def test_a_world_has_its_form_of_places():
    world = WORLD._replace(form=actions.POINT, act=lambda action: window.to_array(SCREEN, action))
    read = lambda text: gui.play(world, lambda tasks, *_: [text] * 6, jax.random.key(0), episodes=6, steps=1)[0].valid
    assert read("Action: click(point='<point>1 2</point>')")
    assert not read("Action: click(start_box='<|box_start|>(1,2)<|box_end|>')")


def test_white_space_around_a_response_is_no_fault():
    said = lambda tasks, *_: [f"{WAIT}\n", f" {WAIT} ", WAIT, f"{WAIT}\n\n", f"{WAIT}.", f"{WAIT}\n{WAIT}"]
    traces = played(said, steps=1)
    assert [trace.valid for trace in traces] == [True] * 4 + [False] * 2
    assert {trace.turns[0].response for trace in traces[:4]} == {WAIT}


def test_a_reward_for_what_cannot_be_read_is_no_success():
    def step(key, state, action):
        state, result = WORLD.env.step(key, state, action)
        return state, result._replace(reward=jnp.ones(()))

    world = WORLD._replace(env=WORLD.env._replace(step=step))
    said = lambda tasks, *_: [WAIT] * 5 + ["hm"]
    traces = gui.play(world, said, jax.random.key(0), episodes=6, steps=1)
    assert [trace.success for trace in traces] == [True] * 5 + [False]


def test_steps_run_out_and_finishing_fails():
    idle = played(lambda tasks, *_: [WAIT] * len(tasks), steps=3)
    assert all(not trace.success and len(trace.turns) == 3 and trace.valid for trace in idle)
    ended = played(lambda tasks, *_: ["Action: finished()"] * len(tasks), steps=3)
    assert all(not trace.success and len(trace.turns) == 1 for trace in ended)
    assert not episodes.no_repeats(idle[0]) and episodes.no_repeats(ended[0])


def test_the_agent_answers_the_prompts_of_its_history():
    """An agent that is sampled in parts answers each row as it does alone, and sees its own past."""
    config = presets.tiny(TOKENIZER.vocab_size, width=16, layers=1, heads=2, kv_heads=2, ffn=16)
    model = language_model(config)
    params, apply = jax.jit(model.init)(jax.random.key(0)), jax.jit(model.apply)
    sampling = Sampling(temperature=0.0, max_tokens=3)
    knobs: dict[str, Any] = {"show": SHOW, "width": 64, "sampling": sampling, "keep": 1}
    traces = played(window.demonstrator(SCREEN))[:3]
    tasks, states = [trace.task for trace in traces], [None] * 3
    pasts = [trace.turns[:1] for trace in traces]
    seen = [trace.turns[1].screen for trace in traces]
    together = gui.make_respond(model, TOKENIZER, **knobs)(params)(tasks, pasts, seen, states, jax.random.key(0))
    alone = gui.make_respond(model, TOKENIZER, **knobs, rows=1)(params)
    for i in range(3):
        assert alone(tasks[i : i + 1], pasts[i : i + 1], seen[i : i + 1], [None], jax.random.key(1)) == [together[i]]
        text = history.prompt(tasks[i], pasts[i], seen[i], show=SHOW, keep=1)
        tokens, start = TOKENIZER.encode(text), len(TOKENIZER.encode(text))
        for _ in range(3):
            hidden, _ = apply(params, np.asarray([tokens + [0] * (70 - len(tokens))]))
            tokens.append(int((hidden[0, len(tokens) - 1] @ model.unembedding(params)).argmax()))
        assert TOKENIZER.decode(tokens[start:]) == together[i]
    narrow: dict[str, Any] = {**knobs, "width": 20}
    short = gui.make_respond(model, TOKENIZER, **narrow)(params)
    with pytest.raises(ValueError, match="longer than max_length = 20"):
        short(tasks, pasts, seen, states, jax.random.key(0))


def test_bootstrapping_learns_from_what_passes_the_rules():
    good, bad = (gui.Trace("t", (gui.Turn(np.zeros(1), WAIT),), won) for won in (True, False))
    twice = gui.Trace("t", good.turns * 2, True)
    unread = good._replace(valid=False)
    given = []

    def roll(params, key):
        return [bad, twice, unread] if params == 1 else [good, bad, twice, unread]

    def train(params, traces, key):
        given.append(list(traces))
        return params + 1

    params, rounds = gui.bootstrap(roll, train, 0, jax.random.key(0), rounds=3)
    assert params == 3 and given == [[good], [good], [good, good]]
    assert [row["kept"] for row in rounds] == [0.25, 0.0, 0.25]
    assert rounds[0]["success"] == 0.75 and rounds[1]["success"] == pytest.approx(2 / 3)
    params, _ = gui.bootstrap(lambda *_: [bad], train, 0, jax.random.key(0), rounds=2)
    assert params == 0  # nothing to learn from
    params, rows = gui.bootstrap(roll, train, 0, jax.random.key(0), rounds=1, rules=(episodes.succeeded,))
    assert rows[0]["kept"] == 0.75
