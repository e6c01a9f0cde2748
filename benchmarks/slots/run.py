"""Completions of skewed lengths: all rows at once, in waves, and in slots that refill (continuous batching).

    python benchmarks/slots/run.py                    # 256 rows of a small model, for a CPU
    python benchmarks/slots/run.py --model qwen3_0_6b # 512 rows of Qwen3-0.6B's sizes in bfloat16, for a GPU

Random weights; a constant feature beside the hidden state biases the EOS, so that each token ends its row with a
probability of about 1 / mean length. Prints one JSON line for each cache type and form.
"""

import argparse
import json
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.nets import presets
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.posttrain.slots import rollout_in_slots
from jaxrl.types import Prompts

EOS = 1


class Case(NamedTuple):
    """Prompts, completions of each, widths, rows decoded at once, mean length."""

    prompts: int
    group: int
    prompt: int
    completion: int
    slots: int
    mean: int


CASES = {"small": Case(256, 1, 16, 256, 32, 64), "qwen3_0_6b": Case(128, 4, 128, 512, 128, 100)}


def config(name: str, **changes) -> TransformerConfig:
    """The sizes of a case's model."""
    if name == "qwen3_0_6b":
        return presets.qwen3_0_6b(dtype="bfloat16", param_dtype="bfloat16", **changes)
    sizes = {"width": 64, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 192}
    return TransformerConfig(vocab_size=64, max_length=512, **sizes, **changes)


def biased(model: LanguageModel, vocabulary: int, mean: int) -> LanguageModel:
    """The model with a feature that is always 1 and carries the bias of the EOS."""

    def apply(params, tokens, **options):
        hidden, cache = model.apply(params, tokens, **options)
        return jnp.concatenate([hidden, jnp.ones((*hidden.shape[:2], 1), hidden.dtype)], -1), cache

    def unembedding(params):
        weights = 0.1 * model.unembedding(params)
        row = jnp.zeros((1, vocabulary), weights.dtype).at[0, EOS].set(jnp.log(vocabulary / mean))
        return jnp.concatenate([weights, row])

    return model._replace(apply=apply, unembedding=unembedding)


def main():
    """Measures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="small", choices=CASES)
    parser.add_argument("--caches", nargs="+", default=["none"], help="none (the compute type), bfloat16, int8")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    case, sizes = CASES[options.model], config(options.model)
    params = jax.jit(language_model(sizes).init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (case.prompts, case.prompt), 2, sizes.vocab_size)
    prompts = Prompts(tokens, jnp.full(case.prompts, case.prompt))
    knobs = {"sampling": Sampling(max_tokens=case.completion), "eos_id": EOS, "pad_id": 0, "samples": case.group}
    wave = case.slots // case.group
    waves = [jax.tree.map(lambda x, i=i: x[i : i + wave], prompts) for i in range(0, case.prompts, wave)]

    for cache in options.caches:
        changes = {} if cache == "none" else {"cache_dtype": cache}
        model = biased(language_model(config(options.model, **changes)), sizes.vocab_size, case.mean)
        plain = jax.jit(lambda params, prompts, key, model=model: rollout(model, params, prompts, key, **knobs))
        refilled = jax.jit(
            lambda params, prompts, key, model=model: rollout_in_slots(
                model, params, prompts, key, slots=case.slots, **knobs
            )
        )
        forms = {"slots": (refilled, [prompts]), "at once": (plain, [prompts]), "waves": (plain, waves)}
        programs = {
            name: form.lower(params, parts[0], jax.random.key(0)).compile() for name, (form, parts) in forms.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        counted = {name: 0 for name in forms}
        for number in range(1 + options.rounds):  # the first one warms up
            for name, (_, parts) in forms.items():
                key, begun = jax.random.key(number), time.perf_counter()
                keys = jax.random.split(key, len(parts))
                drawn = [programs[name](params, part, one) for part, one in zip(parts, keys, strict=True)]
                jax.block_until_ready(drawn)
                if number:
                    seconds[name].append(time.perf_counter() - begun)
                    counted[name] += sum(int(part.lengths.sum()) for part in drawn)
        for name, program in programs.items():
            row = {"model": options.model, "cache": cache, "form": name, "seconds": statistics.median(seconds[name])}
            row["tokens_per_second"] = round(counted[name] / sum(seconds[name]))
            row["mean_length"] = round(counted[name] / options.rounds / case.prompts / case.group, 1)
            row["temporaries_gb"] = round(program.memory_analysis().temp_size_in_bytes / 2**30, 3)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
