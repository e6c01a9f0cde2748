"""Whether two formulas are equal, by math-verify. Runs in the process of `isolate`, so it imports nothing of ours.

math-verify is an extra, so it is imported where it is used.
"""

import importlib
import logging
import re

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its time limits are off on purpose: the process has one

_DELIMITER = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}")
_FUNCTIONS = {"sin", "cos", "tan", "log", "ln", "exp", "sqrt", "pi", "max", "min", "mod", "infty"}
_PER_CENT = re.compile(r"(?<!\\)%")
_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?%?|-?\.[0-9]+")


GENERATED = (b"def monomial_",)
"""How the code begins that SymPy makes from templates of its own, for polynomials; no other may be compiled."""

_WARM_UP = [
    (r"\frac{x}{2}+\sqrt{y}", "x+1"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\sin(x)^2+\cos(x)^2", "1"),
    (r"\log_2 8", r"e^{\pi i}"),
    (r"\{1,2\}", "[0,1)"),
    (r"x<3", "y=2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\x\end{pmatrix}"),
    (r"\int x dx", r"\sum_{i=1}^{3} i"),
    (r"\binom{4}{2}", r"|x|+3!"),
]


def equivalent(*, given: list[str], expected: list[str]) -> list[float]:
    """1 where a text's formula equals the expected one; 0 where it does not or cannot be read."""
    return [float(_equal(a, b)) for a, b in zip(given, expected, strict=True)]


def prepare() -> None:
    """Loads what SymPy loads late, then takes from it, in this process, the evaluation of text.

    math-verify's grammar hands each number to `sympy.Number`, which would evaluate a line of Python made of it.
    """
    importlib.import_module("sympy.physics.units")  # `simplify` loads it late, and as it loads it reads texts
    from sympy.parsing import sympy_parser

    for given, expected in _WARM_UP:
        equivalent(given=[given], expected=[expected])
    sympy_parser.parse_expr = _plain_number


def _plain_number(text: str, **_):
    import sympy

    digits = text.strip().lstrip("-").isdecimal()
    return sympy.Integer(text.strip()) if digits else sympy.Float(text.strip())


def _equal(given: str, expected: str) -> bool:
    from math_verify import verify

    right, answer = _parse(_formula(expected)), _parse(_formula(given))
    if not right or not answer:
        return " ".join(given.split()) == " ".join(expected.split())
    return bool(verify(right, answer, timeout_seconds=None))


def _parse(text: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    # only the LaTeX grammar: math-verify reads plain expressions with SymPy's parse_expr, which evaluates them
    config = [LatexExtractionConfig()]
    return parse(text, extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore


def _formula(text: str) -> str:
    """The text as LaTeX: as it is where it has delimiters, its last number where it is prose, else all of it."""
    if _DELIMITER.search(text):
        return text
    if any(word not in _FUNCTIONS for word in _WORD.findall(text)):
        numbers = _NUMBER.findall(text)
        text = numbers[-1] if numbers else text
    return "$" + _PER_CENT.sub(r"\\%", text) + "$"
