"""One way to write each action, one way to read it, and errors that say where."""

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxrl.data.tokenizer import HuggingFaceTokenizer
from jaxrl.gui import actions
from jaxrl.gui.actions import BOX, PLAIN, POINT, Point, Step, decode, format, parse

FORMS = pytest.mark.parametrize("form", [BOX, PLAIN, POINT], ids=["box", "plain", "point"])
texts = st.text(st.characters(codec="utf-8")) | st.text(st.sampled_from("\\'\"n\n()=, ")) | st.just("\nAction: wait()")
points = st.builds(Point, st.integers(0, 1000), st.integers(0, 1000))
directions = st.sampled_from(["up", "down", "left", "right"])
every = st.one_of(
    *(st.builds(kind, points) for kind in (actions.Click, actions.LeftDouble, actions.RightSingle, actions.LongPress)),
    *(st.builds(kind, texts) for kind in (actions.Hotkey, actions.Type, actions.OpenApp, actions.Finished)),
    *(st.builds(kind) for kind in (actions.Wait, actions.PressHome, actions.PressBack, actions.PressEnter)),
    st.builds(actions.Finished),
    st.builds(actions.CallUser),
    st.builds(actions.Drag, points, points),
    st.builds(actions.Scroll, points, directions),
)
headings = st.sampled_from(["Thought", "Reflection", "Action_Summary"])
steps = st.builds(Step, st.none() | texts, every, st.just("Thought")) | st.builds(Step, texts, every, headings)
QUICK = settings(max_examples=150, deadline=None)


@FORMS
@QUICK
@given(step=steps)
def test_reading_undoes_writing(form, step):
    text = format(step, form)
    assert parse(text, form) == step and format(parse(text, form), form) == text
    assert actions.parse_action(format(step.action, form).removeprefix("Action: "), form) == step.action


@FORMS
@QUICK
@given(step=steps, data=st.data())
def test_what_is_read_is_what_would_be_written(form, step, data):
    """A letter more, less or other: an error, or a text with a meaning of its own."""
    text = format(step, form)
    place = data.draw(st.integers(0, len(text)))
    letter = data.draw(st.sampled_from(["", *"\\'\"n\n()=, 0x7><|²٣"]))
    changed = text[:place] + letter + text[place + data.draw(st.integers(0, 1)) :]
    try:
        found = parse(changed, form)
    except ValueError as error:
        assert str(error).startswith("action, character ")
    else:
        assert format(found, form) == changed
        assert (found == step) == (changed == text)


@QUICK
@given(text=st.text(string.printable))
def test_any_text_is_read_or_refused(text):
    for whole in (text, f"Action: {text}", f"Thought: {text}\nAction: click({text}"):
        try:
            assert format(parse(whole)) == whole
        except ValueError as error:
            assert "expected" in str(error)


def test_published_forms():
    at, to = Point(412, 96), Point(7, 1000)
    cases = {
        actions.Click(at): (
            "click(start_box='<|box_start|>(412,96)<|box_end|>')",
            "click(start_box='(412,96)')",
            "click(point='<point>412 96</point>')",
        ),
        actions.Drag(at, to): (
            "drag(start_box='<|box_start|>(412,96)<|box_end|>', end_box='<|box_start|>(7,1000)<|box_end|>')",
            "drag(start_box='(412,96)', end_box='(7,1000)')",
            "drag(start_point='<point>412 96</point>', end_point='<point>7 1000</point>')",
        ),
        actions.Scroll(at, "down"): (
            "scroll(start_box='<|box_start|>(412,96)<|box_end|>', direction='down')",
            "scroll(start_box='(412,96)', direction='down')",
            "scroll(point='<point>412 96</point>', direction='down')",
        ),
        actions.Hotkey("ctrl c"): ("hotkey(key='ctrl c')",) * 3,
        actions.Type('say "no"\n'): ("type(content='say \\\"no\\\"\\n')",) * 3,
        actions.OpenApp("Maps"): ("open_app(app_name='Maps')",) * 3,
        actions.Finished(): ("finished()",) * 3,
        actions.Finished(""): ("finished(content='')",) * 3,
        actions.CallUser(): ("call_user()",) * 3,
    }
    for action, written in cases.items():
        for form, text in zip((BOX, PLAIN, POINT), written, strict=True):
            assert parse(f"Thought: It is there.\nAction: {text}", form) == Step("It is there.", action)
            assert parse(f"Action: {text}", form) == Step(None, action)
    assert set(actions.DESKTOP) | set(actions.MOBILE) == set(actions.ACTIONS) and len(actions.ACTIONS) == 15


def test_thoughts_may_look_like_actions():
    text = "Thought: First.\nAction: wait()\nNo.\nAction: call_user()"
    assert parse(text) == Step("First.\nAction: wait()\nNo.", actions.CallUser())
    assert parse("Thought: \nAction: wait()").thought == ""


def test_headings_of_the_published_parser():
    text = "Reflection: Not that one.\nAction_Summary: The other.\nAction: wait()"
    step = Step("Not that one.\nAction_Summary: The other.", actions.Wait(), "Reflection")
    assert parse(text) == step and format(step) == text
    assert parse("Action_Summary: Wait.\nAction: wait()") == Step("Wait.", actions.Wait(), "Action_Summary")
    with pytest.raises(ValueError, match="heading is 'Idea'; expected one of Thought, Reflection, Action_Summary"):
        format(step._replace(heading="Idea"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Bytes, and the box tokens as special tokens, as Qwen2-VL has them."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    reader = Tokenizer(models.BPE(letters, []))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    reader.decoder = decoders.ByteLevel()  # pyright: ignore
    reader.add_special_tokens(["<|im_end|>", "<|endoftext|>", *BOX.marks])
    reader.save(str(file))
    return HuggingFaceTokenizer(str(file), eos_token="<|im_end|>", pad_token="<|endoftext|>")


def test_box_tokens_that_are_special_are_read_and_tokenised_again(qwen):
    step = Step("The café's button.", actions.Drag(Point(12, 34), Point(0, 1000)))
    ids = qwen.encode(format(step))
    assert [ids.count(qwen.token_id(mark)) for mark in BOX.marks] == [2, 2]
    text = decode(qwen, [*ids, qwen.eos_id])
    assert parse(text) == step and qwen.encode(text) == ids
    with pytest.raises(ValueError, match=r"expected '<\|box_start\|>\('"):
        parse(qwen.decode(ids))
    assert parse(qwen.decode(ids), PLAIN) == step
    assert decode(qwen, [ids[0], qwen.eos_id], POINT) == "T" and decode(qwen, []) == ""


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("", 0, "found the end, expected 'Thought: ' or 'Action: '"),
        ("wait()", 0, "found 'wait()', expected 'Thought: '"),
        ("Thought: hm", 11, "found the end, expected a line that begins with 'Action: '"),
        ("Action: jump()", 8, "found 'jump()', expected one of click, left_double"),
        ("Action: wait", 8, "expected one of click"),
        ("Action: wait( )", 13, "found ' )', expected ')'"),
        ("Action: wait()\n", 14, "expected the end"),
        ("Action: wait()wait()", 14, "found 'wait()', expected the end"),
        ("Action: click(point='<point>1 2</point>')", 14, 'expected "start_box=\'"'),
        ("Action: click(start_box='(1,2)')", 25, "expected '<|box_start|>('"),
        ("Action: click(start_box='<|box_start|>(1, 2)<|box_end|>')", 41, "a whole number from 0 to 1000"),
        ("Action: click(start_box='<|box_start|>(01,2)<|box_end|>')", 39, "without leading zeros"),
        ("Action: click(start_box='<|box_start|>(1001,2)<|box_end|>')", 39, "a whole number from 0 to 1000"),
        ("Action: click(start_box='<|box_start|>(-1,2)<|box_end|>')", 39, "a whole number"),
        ("Action: click(start_box='<|box_start|>(1+1,2)<|box_end|>')", 40, "expected ','"),
        ("Action: type(content='it's')", 25, "found \"s')\", expected ')'"),
        ("Action: type(content='a\"b')", 23, 'expected \\" in its place'),
        ("Action: type(content='a\nb')", 23, "expected \\n in its place"),
        ("Action: type(content='a\\tb')", 23, "one of the escapes"),
        ("Action: type(content='a\\')", 26, 'expected "\'"'),
        ("Action: type(content='abc", 25, "found the end"),
        ("Action: type(text='a')", 13, 'expected "content=\'"'),
        ("Action: type()", 13, 'expected "content=\'"'),
        ("Action: scroll(start_box='<|box_start|>(1,2)<|box_end|>', direction='downwards')", 69, "one of up, down"),
        ("Action: __import__('os').system('true')", 8, "expected one of"),
    ],
)
def test_errors_say_where_and_what(text, place, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        parse(text)
    with pytest.raises(ValueError, match=f"^action, character {place}: found "):
        parse(text)


def test_a_long_number_is_no_number():
    with pytest.raises(ValueError, match="character 28: .* a whole number without"):
        parse(f"Action: click(point='<point>{'9' * 5000} 2</point>')", POINT)


def test_errors_of_writing():
    for action, message in {
        actions.Click(Point(0, 1001)): "y is 1001; expected a whole number from 0 to 1000",
        actions.Click(Point(-1, 0)): "x is -1",
        actions.Click(Point(0.5, 0)): "x is 0.5; expected a whole number",  # pyright: ignore
        actions.Click((1, 2)): "at is (1, 2); expected a Point",  # pyright: ignore
        actions.Click("1"): "at is '1'; expected a Point",  # pyright: ignore
        actions.Hotkey(7): "key is 7; expected text",  # pyright: ignore
        actions.Scroll(Point(0, 0), "away"): "direction is 'away'; expected one of up",  # pyright: ignore
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            format(action)
    assert format(actions.Click(Point(0, 1001)), POINT).endswith("0 1001</point>')")
    with pytest.raises(ValueError, match="'wait' is no action"):
        format("wait")  # pyright: ignore


def test_only_the_actions_that_are_known():
    with pytest.raises(ValueError, match="found 'press_back\\(\\)', expected one of click, left_double"):
        parse("Action: press_back()", actions=actions.DESKTOP)
    assert parse("Action: press_back()", actions=actions.MOBILE).action == actions.PressBack()
