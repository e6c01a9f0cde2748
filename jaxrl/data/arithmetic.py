"""Two-digit addition with its working shown: a verifiable task that needs no download.

The prompt `47+85=` is to be continued by `120+12=132`: the tens, the units, and what they add up to. What stands after
the last `=` is the answer, and a reward can check it without knowing how it was reached.

`sloppy_problems` are worked examples by somebody who mostly gets the carry wrong (`120+12=122`, `30+9=49`): a model
that imitates them learns how to go about it, and the mistake. Only checking answers gets it out again.
"""

import hashlib
import itertools

from jaxrl.data.records import Record
from jaxrl.data.tokenizer import CharTokenizer

ALPHABET = "0123456789+="
MARKER = "="
MAX_COMPLETION = 12  # "120+12=132" and the EOS, with one to spare
SLIPS = 0.8


def problem(a: int, b: int, *, slip: bool = False) -> Record:
    """The record of `a + b`, both from 10 to 99: prompt, worked completion and (always right) answer.

    With a `slip` the last sum of the completion forgets a carry, or carries at 9, one too early.
    """
    tens, units = 10 * (a // 10 + b // 10), a % 10 + b % 10
    wrong = {**{u: u - 10 for u in range(10, 19)}, 9: 19}
    written = tens + (wrong.get(units, units) if slip else units)
    return {"prompt": f"{a}+{b}=", "completion": f"{tens}+{units}={written}", "answer": str(a + b)}


def problems() -> list[Record]:
    """All 8,100 problems, worked correctly, in order of `a`, then `b`."""
    return [problem(a, b) for a, b in _pairs()]


def sloppy_problems() -> list[Record]:
    """The same problems, four fifths of them by somebody who slips (always the same ones)."""
    slips = lambda a, b: int.from_bytes(hashlib.sha256(f"{a}+{b}".encode()).digest()[:4]) < SLIPS * 2**32
    return [problem(a, b, slip=slips(a, b)) for a, b in _pairs()]


def tokenizer() -> CharTokenizer:
    """Characters of the task: the digits, `+` and `=`."""
    return CharTokenizer(ALPHABET)


def _pairs():
    return itertools.product(range(10, 100), repeat=2)
