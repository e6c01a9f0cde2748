"""Memory and time of an SFT step: all parameters, a low-rank adapter beside the base, merged, over bases in few bits.

    python benchmarks/adapters/memory.py --model smollm2_135m --batch 4 --length 256

Random weights; the adapter has rank 16 on every linear layer; Adam. "merged" builds W + s A B anew in every step, as a
function on trees that knows nothing of the layers would. Memory is the compiled program's own account: arguments (the
base, the adapter, moments, data) and temporaries; time is the median of a few steps. With --steps 0 nothing is run, and
no array is made.
"""

import argparse
import json
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxrl.nets import adapters, presets
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.posttrain import sft
from jaxrl.types import TokenBatch

LORA = adapters.LoRAConfig(rank=16, alpha=32)


def merged_model(model, base, adapter):
    """An adapted model that merges before each pass."""
    tree = lambda params: adapters.merge(base, params, adapter).params
    apply = lambda params, *args, **rest: model.apply(tree(params), *args, **rest)
    return LanguageModel(partial(adapter.init, model=model, base=base), apply, lambda _: model.unembedding(base), None)


def forms(model, key):
    """Name -> (function that makes the base, what is trained beside it or None, function that makes the model)."""
    plain = lambda: model.init(key)
    lora = adapters.lora(LORA)
    prompt = adapters.prompt(adapters.PromptConfig(length=32))
    beside = lambda adapter: lambda base: adapters.adapt(model, base, adapter)
    quantised = lambda form: lambda: adapters.quantise_base(model.init(key), form=form)
    return {
        "all parameters": (plain, None, None),
        "LoRA": (plain, lora, beside(lora)),
        "LoRA, merged": (plain, lora, lambda base: merged_model(model, base, lora)),
        "LoRA over int8": (quantised("int8"), lora, beside(lora)),
        "LoRA over NF4": (quantised("nf4"), lora, beside(lora)),
        "DoRA": (plain, dora := adapters.lora(adapters.LoRAConfig(rank=16, alpha=32, magnitude=True)), beside(dora)),
        "prompt": (plain, prompt, beside(prompt)),
    }


def measure(name, model, data, form, *, steps):
    """One JSON line: MB of arguments and temporaries, trained parameters, seconds of a step."""
    make_base, adapter, adapted = form
    config = sft.SFTConfig(batch=data.tokens.shape[0])
    build = lambda model: sft.make(config, model, optax.adam(1e-4))
    make = (lambda function, *given: jax.jit(function)(*given)) if steps else jax.eval_shape
    base = make(make_base)
    if adapter is None:
        params, given, step = base, data, build(model).step
    else:
        params = make(lambda base: adapter.init(jax.random.key(1), model, base), base)
        step = lambda state, given: build(adapted(given.base)).step(state, given.data)
        given = adapters.Based(base, data)
    trained = sum(x.size for x in jax.tree.leaves(params))
    state = make(lambda params: build(model).init(jax.random.key(0), params), params)
    del params, base
    program = jax.jit(step, donate_argnums=0).lower(state, given).compile()
    memory = program.memory_analysis()
    seconds, metrics = [(0.0, 0.0)], {"train/loss": jnp.nan}
    for _ in range(steps + 1 if steps else 0):
        begun = time.perf_counter(), time.process_time()
        state, metrics = program(state, given)
        jax.block_until_ready(metrics)
        seconds.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    wall, cpu = (statistics.median(column) for column in zip(*(seconds[2:] or seconds), strict=True))
    line = {
        "form": name,
        "trained": trained,
        "arguments_mb": round(memory.argument_size_in_bytes / 1e6, 1),
        "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 1),
        "seconds": round(wall, 4),
        "cpu_seconds": round(cpu, 3),
        "loss": round(float(metrics["train/loss"]), 3),
    }
    print(json.dumps(line), flush=True)


def main():
    """Prints one JSON line for each form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    config = getattr(presets, options.model)(dtype=options.dtype, param_dtype=options.dtype)
    model, key = language_model(config), jax.random.key(0)
    shape = (options.batch, options.length)
    data = TokenBatch(jax.random.randint(jax.random.key(2), shape, 0, config.vocab_size), jnp.ones(shape))
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, **vars(options)}), flush=True)
    for name, form in forms(model, key).items():
        if not options.only or options.only in name:
            measure(name, model, data, form, steps=options.steps)


if __name__ == "__main__":
    main()
