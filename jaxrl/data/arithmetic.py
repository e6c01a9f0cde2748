"""Two-digit addition with its working shown: a verifiable task that needs no download.

The prompt `47+85=` is to be continued by `120+12=132`: the tens, the units, and what they add up to. What stands after
the last `=` is the answer, and a reward can check it without knowing how it was reached.
"""

import itertools

from jaxrl.data.records import Record
from jaxrl.data.tokenizer import CharTokenizer

ALPHABET = "0123456789+="
MARKER = "="
MAX_COMPLETION = 12  # "120+12=132" and the EOS, with one to spare


def problem(a: int, b: int) -> Record:
    """The record of `a + b`, both from 10 to 99: prompt, worked completion and answer."""
    tens, units = 10 * (a // 10 + b // 10), a % 10 + b % 10
    return {"prompt": f"{a}+{b}=", "completion": f"{tens}+{units}={a + b}", "answer": str(a + b)}


def problems() -> list[Record]:
    """All 8,100 problems, in order of `a`, then `b`."""
    return [problem(a, b) for a, b in itertools.product(range(10, 100), repeat=2)]


def tokenizer() -> CharTokenizer:
    """Characters of the task: the digits, `+` and `=`."""
    return CharTokenizer(ALPHABET)
