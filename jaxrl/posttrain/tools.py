"""Tools that a model may call in the middle of a completion, and the forms that calls and results have in its text.

A tool is a function from text to text. `tags` and `hermes` are forms of a call; `call` runs one and never fails: what
goes wrong becomes a result that says so, for the model to read.
"""

import ast
import inspect
import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from jaxrl.posttrain.rewards.combine import launch
from jaxrl.posttrain.rewards.load import load_function


class Tool(NamedTuple):
    """`function`: `(text) -> text`, plain or async. It may raise; the model reads the message."""

    name: str
    description: str
    function: Callable[[str], Any]


class Form(NamedTuple):
    """How a call and its result stand in a completion: `begin call end before result after`.

    The model writes as far as `end`; from `before` to `after` the tokens are given to it. `read`: from the text between
    `begin` and `end` to `(name of the tool, text for it)`; an empty name is the only tool. It raises ValueError on a
    call it cannot read.
    """

    begin: str
    end: str
    before: str
    after: str
    read: Callable[[str], tuple[str, str]]


class Result(NamedTuple):
    """What the model gets to read, and whether the call failed."""

    text: str
    failed: bool


def tags(
    begin: str = "<tool>",
    end: str = "</tool>",
    before: str = "<result>",
    after: str = "</result>",
    *,
    named: bool = False,
) -> Form:
    """`<tool>3*(4+5)</tool><result>27</result>`.

    Args:
      begin, end, before, after: any texts; `before` and `after` may be empty, so `[47*85=3995]` is
        `tags("[", "=", "", "]")`.
      named: calls begin with the tool's name, `<tool>calculator: 3*(4+5)</tool>`, as they must where there are several.
    """

    def read(text: str) -> tuple[str, str]:
        name, colon, argument = text.partition(":")
        if named and not colon:
            raise ValueError(f"expected {begin}name: text{end}")
        return (name.strip(), argument.strip()) if named else ("", text.strip())

    return _checked(Form(begin, end, before, after, read))


def hermes(
    before: str = "<|im_end|>\n<|im_start|>user\n<tool_response>\n",
    after: str = "\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
) -> Form:
    """`<tool_call>{"name": "calculator", "arguments": {"text": "3*(4+5)"}}</tool_call>`, as Hermes and Qwen models do.

    The result stands in a turn of its own. A single text among the arguments is the tool's text; all else is given to
    it as JSON. Of several calls in one turn the first is answered.

    Args:
      before, after: what stands around the result; the default is Qwen's chat template.
    """

    def read(text: str) -> tuple[str, str]:
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError('expected {"name": ..., "arguments": {...}}') from None
        if not isinstance(name, str):
            raise ValueError(f"the name is {name!r}; expected text")
        values = list(arguments.values()) if isinstance(arguments, dict) else [arguments]
        sole = len(values) == 1 and isinstance(values[0], str)
        return name, values[0] if sole else json.dumps(arguments, ensure_ascii=False)

    return _checked(Form("<tool_call>", "</tool_call>", before, after, read))


def _checked(form: Form) -> Form:
    if not form.begin or not form.end:
        raise ValueError(f"a call stands between {form.begin!r} and {form.end!r}; neither may be empty")
    return form


def describe(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as chat templates take them: the column `tools` beside a prompt of messages."""
    text = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    one = lambda tool: {"name": tool.name, "description": tool.description, "parameters": text}
    return [{"type": "function", "function": one(tool)} for tool in tools]


def as_tool(function: Tool | Callable[[str], Any]) -> Tool:
    """A plain function as a tool: its name, and the first line of its docstring."""
    if isinstance(function, Tool):
        return function
    name = getattr(function, "__name__", type(function).__name__)
    return Tool(name, (inspect.getdoc(function) or "").partition("\n")[0], function)


def load_tools(spec: str) -> list[Tool]:
    """Tools by name: `calculator`, `path/to/file.py:function`, several with commas between them.

    Raises:
      ValueError: a name, file or function that is not there, or two tools of one name.
    """
    found = []
    for name in (part.strip() for part in spec.split(",")):
        if name in BUILT_IN:
            found.append(as_tool(BUILT_IN[name]))
        elif name.partition(":")[0].endswith(".py") and name.partition(":")[2]:
            path, _, function = name.partition(":")
            found.append(as_tool(load_function(path, function, name, what="tool")))
        else:
            raise ValueError(
                f"tools {spec!r}: {name!r} is none of {', '.join(BUILT_IN)} and no path/to/file.py:function"
            )
    names = [tool.name for tool in found]
    if len(set(names)) < len(names):
        raise ValueError(f"tools {spec!r}: two have one name, {', '.join(sorted(names))}; rename one")
    return found


def call(
    tools: Sequence[Tool], form: Form, texts: Sequence[str], *, timeout: float = 10.0, limit: int = 1000
) -> list[Result]:
    """Runs the calls of one turn side by side.

    Args:
      tools: with one, a form without names calls it.
      form: of the calls.
      texts: what the model wrote between `form.begin` and `form.end`.
      timeout: seconds for them all, after which a call has failed. Its thread cannot be ended and is left behind.
      limit: characters of a result; a longer one is a failure, never cut.

    Returns:
      One `Result` for each text.
    """
    named, start = {tool.name: tool for tool in tools}, time.monotonic()

    def begin(text: str) -> Future | Result:
        try:
            name, argument = form.read(text)
        except ValueError as error:
            return Result(f"error: {error}", True)
        tool = tools[0] if not name and len(tools) == 1 else named.get(name)
        if tool is None:
            return Result(f"error: there is no tool {name!r}; there is {', '.join(named)}", True)
        return launch(lambda: tool.function(argument), {}, timeout)

    def end(started: Future | Result) -> Result:
        if isinstance(started, Result):
            return started._replace(text=_short(started.text))
        try:
            error = started.exception(max(start + timeout - time.monotonic(), 0.0))
        except TimeoutError:
            return Result(f"error: no answer within {timeout:g} seconds", True)
        if error is not None:  # a tool may even exit
            return Result(_short(f"error: {str(error) or type(error).__name__}"), True)
        value = str(started.result())
        if len(value) > limit:
            return Result(f"error: the result has {len(value)} characters, more than {limit}", True)
        return Result(value, False)

    return [end(started) for started in [begin(text) for text in texts]]


def _short(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


_LONGEST = 200
_BITS = 4096  # of numerators and denominators
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")


def calculator(text: str) -> str:
    """Works out an expression of numbers, + - * / // % ** and brackets, exactly.

    Fractions are exact inside; what is no decimal of 20 places is rounded to 12 digits. Nothing is evaluated as code:
    the expression is parsed and walked, and sizes are bounded.

    Raises:
      ValueError: names, other signs, a division by zero, a number that becomes too large.
    """
    text = text.translate(str.maketrans("\u00d7\u00f7\u2212", "*/-")).strip()
    if len(text) > _LONGEST:
        raise ValueError(f"the expression has {len(text)} characters, more than {_LONGEST}")
    strange = re.sub(r"[0-9.+\-*/%()eE \t]", "", text)
    if strange or not text:
        raise ValueError(f"{strange[0]!r} is no part of arithmetic" if strange else "the expression is empty")
    try:
        return _written(_value(ast.parse(text, mode="eval").body, text))
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"cannot read {text!r}") from None


def _value(node: ast.AST, text: str) -> Fraction:
    if isinstance(node, ast.Constant):
        literal = ast.get_source_segment(text, node) or ""
        if not _NUMBER.fullmatch(literal):
            raise ValueError(f"cannot read the number {literal!r}")
        return _bounded(Fraction(literal))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _value(node.left, text), _value(node.right, text)
        if right == 0 and isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
            raise ValueError("division by zero")
        return _bounded(_OPERATIONS[type(node.op)](left, right))
    raise ValueError(f"cannot read {ast.get_source_segment(text, node)!r}")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("powers must be whole numbers")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > 1 and bits * abs(exponent) > _BITS:
        raise ValueError("the number is too large")
    return base ** int(exponent) if bits > 1 else Fraction(base ** int(exponent % 2))


_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: lambda a, b: a % b,
    ast.Pow: _power,
}


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _BITS:
        raise ValueError("the number is too large")
    return value


def _written(value: Fraction) -> str:
    """A whole number, a decimal of up to 20 places, or 12 significant digits."""
    if value.denominator == 1:
        return str(value.numerator)
    places = next((n for n in range(1, 21) if 10**n % value.denominator == 0), None)
    if places is None:
        context = Context(prec=12, Emax=10**6, Emin=-(10**6))
        return str(context.divide(Decimal(value.numerator), Decimal(value.denominator)))
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"


BUILT_IN: dict[str, Callable[[str], str]] = {"calculator": calculator}
"""Tools that need no file."""

FORMS: dict[str, Callable[..., Form]] = {"tags": tags, "hermes": lambda named: hermes()}
"""Forms of a call, by name; `named` where there are several tools."""
