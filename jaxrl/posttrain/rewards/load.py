"""Rewards by name, from files, and weighted sums of both, as a command line gives them."""

import ast
import difflib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from jaxrl.posttrain.rewards.answers import math_reward, number_reward, reasoning_reward
from jaxrl.posttrain.rewards.combine import combine
from jaxrl.posttrain.rewards.exact import exact_reward
from jaxrl.posttrain.rewards.host import Reward
from jaxrl.posttrain.rewards.isolate import isolated
from jaxrl.posttrain.rewards.length import cosine_reward, overlong_reward
from jaxrl.posttrain.rewards.text import format_reward, language_reward, repetition_reward

_WEIGHT = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]-?[0-9]+)?)\s*\*")
_TERM = re.compile(r"([A-Za-z_]\w*)\s*(?:\((.*)\))?", re.DOTALL)


def _cosine(*, accuracy: str = "number", **options: Any) -> Reward:
    return cosine_reward(load_reward(accuracy), **options)


def _model(*, folder: str) -> Reward:
    from jaxrl.posttrain.learned_reward import learned_reward  # which is made of rewards itself

    return learned_reward(folder)


BUILT_IN: dict[str, Callable[..., Reward]] = {
    "exact": exact_reward,
    "format": format_reward,
    "number": number_reward,
    "math": math_reward,
    "reasoning": reasoning_reward,
    "language": language_reward,
    "repetition": repetition_reward,
    "overlong": overlong_reward,
    "cosine": _cosine,
    "isolated": isolated,
    "model": _model,
}
"""Rewards that need no file; what they take stands with each function."""


def load_reward(spec: str, *, timeout: float | None = None, normalise: bool = False, strict: bool = False) -> Reward:
    """Loads a reward, or a weighted sum of several.

        rewards.py:close                                the function `close` of a file
        rewards.py                                      its function `reward`
        number(marker="####", tolerance=0.01)           a built-in one, with options
        number + 0.2*format(soft=True) + -0.5*rewards.py:rude       a weighted sum

    Options are literals, never evaluated; a word without quotes is a text. A sum is a `combine`, its parts named after
    the functions. A file is the user's own code and is executed; model output never is.

    Args:
      spec: as above.
      timeout, normalise, strict: as in `combine`; any of them makes a `combine` of a single reward too.

    Raises:
      ValueError: a file, function, name or option that is not there, or a sum that cannot be read; the message lists
        what there is.
    """
    terms = [_term(term, spec) for term in _split(spec)]
    if len(terms) == 1 and terms[0][2] == 1.0 and timeout is None and not normalise:
        return terms[0][1]
    parts: dict[str, tuple[Reward, float]] = {}
    for name, reward, weight in terms:
        number = sum(known.partition("#")[0] == name for known in parts) + 1
        parts[name if number == 1 else f"{name}#{number}"] = (reward, weight)
    return combine(parts, timeout=timeout, normalise=normalise, strict=strict)


def _split(spec: str) -> list[str]:
    """The terms of a sum: cut at each `+` outside brackets and quotes that does not follow the e of a number."""
    if os.path.isfile(spec.rpartition(":")[0] or spec):
        return [spec]
    terms, depth, quote = [""], 0, ""
    for letter in spec:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += 0 if quote else (letter in "([{") - (letter in ")]}")
        if letter == "+" and not quote and depth == 0:
            terms.append("")
        else:
            terms[-1] += letter
    return terms


def _term(term: str, spec: str) -> tuple[str, Reward, float]:
    """Name, reward and weight of one term of a sum."""
    found = _WEIGHT.match(term)
    weight, source = (float(found[1]), term[found.end() :].strip()) if found else (1.0, term.strip())
    if source.partition(":")[0].endswith(".py"):
        path, _, name = source.partition(":")
        return name or "reward", load_function(path, name or "reward", source), weight
    call = _TERM.fullmatch(source)
    if call is None:
        raise ValueError(
            f"reward {spec!r}: cannot read {term.strip()!r}; {source!r} is not a Python file; expected "
            "path/to/rewards.py:function, a name such as number, name(option=value), or a sum such as "
            "number + 0.2*format"
        )
    name, options = call[1], call[2] or ""
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(BUILT_IN)},"
        raise ValueError(
            f"reward {spec!r}: {name!r} is not a Python file and no built-in reward; {hint} "
            "or path/to/rewards.py:function"
        )
    return name, _built(name, _options(options, source), spec), weight


def _built(name: str, options: dict[str, Any], spec: str) -> Reward:
    factory = BUILT_IN[name]
    try:
        inspect.signature(factory).bind(**options)
        return factory(**options)
    except TypeError as error:
        takes = inspect.signature(cosine_reward if factory is _cosine else factory)
        raise ValueError(f"reward {spec!r}: {name}{takes}: {error}") from None


def _options(text: str, source: str) -> dict[str, Any]:
    """`key=value, ...` with literal values."""
    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
        return {
            keyword.arg or "**": keyword.value.id
            if isinstance(keyword.value, ast.Name)
            else ast.literal_eval(keyword.value)
            for keyword in call.keywords
        }
    except (SyntaxError, ValueError, AssertionError, MemoryError, RecursionError):
        raise ValueError(
            f"reward options {source!r} cannot be read; expected name(option=value, ...) with numbers, texts in "
            "quotes, True, False or None"
        ) from None


def load_function(path: str, name: str, spec: str, *, what: str = "reward") -> Reward:
    """The function of a Python file, which is run; errors say what it was wanted for, and quote the `spec`."""
    file = Path(path)
    if not os.path.isfile(file):
        raise ValueError(f"{what} {spec!r}: {path!r} is not a Python file; expected path/to/{what}s.py:function")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules.setdefault(module.__name__, module)  # where the file's dataclasses look for it
    module_spec.loader.exec_module(module)
    function: Any = getattr(module, name, None)
    if not callable(function):
        found = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(f"{what} {spec!r}: no function {name!r} in {path}; found {', '.join(found) or 'none'}")
    return cast(Reward, function)
