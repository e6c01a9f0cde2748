"""Tools: the calculator against exact arithmetic, the forms of calls, and that no call ever fails the run."""

import ast
import operator
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.posttrain.tools import Tool, as_tool, calculator, call, describe, hermes, load_tools, tags

CALCULATOR = as_tool(calculator)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3*(4+5)", "27"),
        ("47*85", "3995"),
        ("0.1+0.2", "0.3"),
        ("-7/2", "-3.5"),
        ("-7//2", "-4"),
        ("7%3", "1"),
        ("2**100", str(2**100)),
        ("2**-2", "0.25"),
        ("(-1)**100001", "-1"),
        ("1/3", "0.333333333333"),
        ("-2**2", "-4"),
        ("1e3", "1000"),
        ("1.50", "1.5"),
        (".5", "0.5"),
        ("12 × 3 ÷ 4", "9"),
        ("-0.05", "-0.05"),
    ],
)
def test_calculator(text, answer):
    assert calculator(text) == answer


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.integers(0, 99), lambda x: st.tuples(x, st.sampled_from(sorted(OPERATORS)), x), max_leaves=8))
def test_calculator_against_fractions(tree):
    """Random expressions, worked out by Fractions along their tree; the text is read back as a fraction."""

    def text(tree):
        return str(tree) if isinstance(tree, int) else f"({text(tree[0])}{tree[1]}{text(tree[2])})"

    def value(tree):
        if isinstance(tree, int):
            return Fraction(tree)
        return Fraction(OPERATORS[tree[1]](value(tree[0]), value(tree[2])))

    try:
        expected = value(tree)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            calculator(text(tree))
        return
    assert abs(Fraction(calculator(text(tree))) - expected) <= abs(expected) * Fraction(1, 10**11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1/0", "division by zero"),
        ("1%0", "division by zero"),
        ("0**-1", "division by zero"),
        ("__import__('os')", "'_' is no part of arithmetic"),
        ("e", "cannot read 'e'"),
        ("9**9**9", "too large"),
        ("(2**4000)*(2**4000)", "too large"),
        ("1e999999", "cannot read the number '1e999999'"),
        ("2**0.5", "powers must be whole"),
        ("1+", r"cannot read '1\+'"),
        ("1(2)", "cannot read"),
        ("(" * 99 + "1" + ")" * 99, "cannot read|^$"),
        ("-" * 150, "cannot read"),
        ("1" * 300, "300 characters, more than 200"),
        ("  ", "empty"),
        ("1,000", "',' is no part"),
    ],
)
def test_calculator_refuses(text, message):
    if message.endswith("^$"):  # deep brackets are fine, if Python's parser takes them
        assert calculator(text) == "1"
        return
    with pytest.raises(ValueError, match=message):
        calculator(text)


@given(st.text("0123456789+-*/%()eE. ", max_size=40))
@settings(max_examples=300, deadline=None)
def test_calculator_answers_or_refuses(text):
    """Whatever is asked, there is an answer or a ValueError, soon."""
    try:
        answer = calculator(text)
    except ValueError as error:
        assert str(error)
    else:
        assert isinstance(ast.literal_eval(answer.replace("E+", "e")), int | float)


def one(tools, form, text, **options):
    (result,) = call(tools, form, [text], **options)
    return result


def test_forms_of_calls():
    assert one([CALCULATOR], tags(), " 3*(4+5) ") == ("27", False)
    assert one([CALCULATOR], hermes(), '\n{"name": "calculator", "arguments": {"x": "6*7"}}\n') == (
        "42",
        False,
    )
    echo = Tool("echo", "says it again", lambda text: text)
    both = [CALCULATOR, echo]
    assert one(both, tags(named=True), "echo: a: b") == ("a: b", False)
    assert one(both, hermes(), '{"name": "echo", "arguments": {"a": 1, "b": "x"}}') == ('{"a": 1, "b": "x"}', False)
    assert one(both, hermes(), '{"name": "echo"}') == ("{}", False)


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        (tags(named=True), "3+4", "expected <tool>name: text</tool>"),
        (tags(named=True), "adder: 3", "there is no tool 'adder'; there is calculator"),
        (hermes(), "{", 'expected {"name": ..., "arguments": {...}}'),
        (hermes(), "[]", 'expected {"name"'),
        (hermes(), '{"name": 3}', "the name is 3"),
        (hermes(), '{"name": "add", "arguments": {}}', "there is no tool 'add'"),
        (tags(), "1/0", "division by zero"),
    ],
)
def test_bad_calls_are_answered(form, text, message):
    result = one([CALCULATOR], form, text)
    assert result.failed and result.text.startswith("error: ") and message in result.text


def test_failures_of_tools_are_results():
    def exits(text):
        raise SystemExit(3)

    def silent(text):
        raise RuntimeError

    def late(text):
        raise TimeoutError("of its own")

    async def waits(text):
        return text + "!"

    run = lambda function, **options: one([as_tool(function)], tags(), "x", **options)
    assert run(exits) == ("error: 3", True)
    assert run(silent) == ("error: RuntimeError", True)
    assert run(late) == ("error: of its own", True)
    assert run(waits) == ("x!", False)
    assert run(lambda text: 17) == ("17", False)
    assert run(lambda text: text * 11, limit=10) == ("error: the result has 11 characters, more than 10", True)
    assert len(run(lambda text: {}["k" * 900]).text) == 200


def test_time_limit_is_for_all_calls_together():
    def slow(text):
        time.sleep(float(text))
        return text

    begun = time.monotonic()
    results = call([as_tool(slow)], tags(), ["0", "5", "5", "5"], timeout=0.3)
    assert time.monotonic() - begun < 2
    assert results[0] == ("0", False)
    assert results[1:] == [("error: no answer within 0.3 seconds", True)] * 3


def test_tools_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('def shout(text):\n    """Says it loudly.\n\n    Very."""\n    return text.upper()\n')
    tools = load_tools(f"calculator, {file}:shout")
    assert [tool.name for tool in tools] == ["calculator", "shout"] and tools[1].function("a") == "A"
    schema = describe(tools)[1]["function"]
    assert schema["name"] == "shout" and schema["description"] == "Says it loudly."
    for spec, message in {
        "calculater": "'calculater' is none of calculator and no path",
        f"{file}": "no path/to/file.py:function",
        f"{file}:whisper": "no function 'whisper'",
        "nowhere.py:f": "is not a Python file",
        "calculator,calculator": "two have one name",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_tools(spec)
    with pytest.raises(ValueError, match="neither may be empty"):
        tags("", "=")
