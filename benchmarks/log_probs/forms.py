"""Three ways to log-probabilities, in turn, in one process: python benchmarks/log_probs/forms.py smollm-512 both"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.kernels.log_probs import token_log_probs

CASES = {  # tokens, hidden size, vocabulary: of SmolLM2-135M and of a small Qwen
    "smollm-512": (512, 576, 49_152),
    "smollm-2048": (2048, 576, 49_152),
    "qwen-512": (512, 1024, 151_936),
    "qwen-2048": (2048, 1024, 151_936),
}
PASSES = ("forward", "both")
"""Log-probabilities and entropies alone, or with the gradients of the hidden states and the unembedding."""


def naive(hidden, unembedding, targets):
    """All logits at once, left to autodiff; the fastest of a few ways to write it."""
    x, y = hidden.reshape(-1, hidden.shape[-1]) @ unembedding, targets.reshape(-1)
    lse = jax.nn.logsumexp(x, axis=-1)
    log_probs = jnp.take_along_axis(x, y[:, None], axis=-1)[:, 0] - lse
    entropy = lse - jnp.sum(jnp.exp(x - lse[:, None]) * x, axis=-1)
    return log_probs.reshape(targets.shape), entropy.reshape(targets.shape)


FORMS = {
    "naive": naive,
    "reference": partial(token_log_probs, implementation="reference"),
    "xla": partial(token_log_probs, implementation="xla"),
}


def program(form, which: str, tokens: int, size: int, vocabulary: int):
    """(the compiled call, its arrays)."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (1, tokens, size))
    unembedding = jax.random.normal(keys[1], (size, vocabulary)) / size**0.5
    targets = jax.random.randint(keys[2], (1, tokens), 0, vocabulary)
    weights = jax.random.normal(keys[3], (2, 1, tokens))

    def loss(hidden, unembedding, targets):
        return jnp.sum(weights * jnp.stack(form(hidden, unembedding, targets)))

    run = jax.value_and_grad(loss, (0, 1)) if which == "both" else form
    return jax.jit(run).lower(hidden, unembedding, targets).compile(), (hidden, unembedding, targets)


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("which", choices=PASSES)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    programs = {name: program(form, options.which, *CASES[options.case]) for name, form in FORMS.items()}
    laps: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(options.rounds + 1):
        for name, (call, arrays) in programs.items():
            begun = time.process_time()
            jax.block_until_ready(call(*arrays))
            laps[name].append(1e3 * (time.process_time() - begun))
    memory = {name: call.memory_analysis() for name, (call, _) in programs.items()}
    rows: list[dict[str, Any]] = [
        {
            "form": name,
            "cpu_ms": round(statistics.median(times[1:]), 1),
            "cpu_min_ms": round(min(times[1:]), 1),
            "temporary_mb": (found := memory[name]) and found.temp_size_in_bytes / 1e6,
        }
        for name, times in laps.items()
    ]
    print(json.dumps({"case": options.case, "pass": options.which, "rows": rows}))


if __name__ == "__main__":
    main()
