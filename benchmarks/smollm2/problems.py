"""A small arithmetic set for a chat model: 1,500 sums, differences and products in words. python problems.py FILE"""

import itertools
import json
import random
import sys

FORMS = {
    "+": (
        "What is {} + {}?",
        "What is the sum of {} and {}?",
        "Tom has {} apples and gets {} more. How many has he now?",
    ),
    "-": ("What is {} - {}?", "How much is {} minus {}?", "Of {} birds {} fly away. How many are left?"),
    "*": ("What is {} * {}?", "How much is {} times {}?", "There are {} boxes of {} pens. How many pens are there?"),
}


def problems() -> list[dict]:
    """Always the same ones, each with a chat prompt and its answer."""
    draw = random.Random(0)
    pairs = {
        "+": list(itertools.product(range(2, 50), repeat=2)),
        "-": [(a, b) for a, b in itertools.product(range(2, 50), repeat=2) if b < a],
        "*": list(itertools.product(range(2, 13), repeat=2)),
    }
    results = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    drawn = []
    for sign, number in {"+": 600, "-": 540, "*": 360}.items():
        drawn += draw.sample([(sign, pair, form) for pair in pairs[sign] for form in range(3)], number)
    return [
        {
            "prompt": [{"role": "user", "content": FORMS[sign][form].format(*pair)}],
            "answer": str(results[sign](*pair)),
        }
        for sign, pair, form in drawn
    ]


if __name__ == "__main__":
    with open(sys.argv[1], "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in problems())
