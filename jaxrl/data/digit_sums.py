"""Sums of digits with or without their partial sums shown: a task in which thinking is longer, and pays.

The prompt `3518:` is to be continued by `=7`, or by the partial sums modulo 10 before it, `s8s9s7=7`. A small model can
learn each step of the second form, and hardly the first.
"""

import numpy as np

from jaxrl.data.sources import Record

ALPHABET = "0123456789=:sσ"
MARKER = "="
DIGITS = 4


def digit_sums(*, seed: int) -> list[Record]:
    """All sums of four digits modulo 10 in a random order: `3518:`, to be answered `=7`."""
    order = np.random.default_rng(seed).permutation(10**DIGITS)
    rows = [f"{digits:0{DIGITS}d}" for digits in order]
    return [{"prompt": f"{row}:", "answer": str(sum(map(int, row)) % 10)} for row in rows]


def worked(record: Record, random: np.random.Generator) -> Record:
    """A worked example of a digit sum: half of them the answer alone, half with its partial sums, `s8σ9s7=7`.

    The letter before a partial sum is Latin or, two times in five, Greek: a second language.
    """
    sums = np.cumsum([int(digit) for digit in record["prompt"][:-1]])[1:] % 10
    letters = np.where(random.random(len(sums)) < 0.4, "σ", "s")
    steps = "".join(f"{letter}{value}" for letter, value in zip(letters, sums, strict=True))
    return {"prompt": record["prompt"], "completion": (steps if random.random() < 0.5 else "") + f"={record['answer']}"}
