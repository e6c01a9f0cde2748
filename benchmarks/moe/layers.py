"""One layer in every form, in turn: python benchmarks/moe/layers.py mixtral-8x7b/8 both"""

import argparse
import dataclasses
import json
import math
import statistics
import time

import cases
import jax
import jax.numpy as jnp

from jaxrl.nets import moe
from jaxrl.nets.layers import FeedForward


def spread(ids, weights, count):
    """The weight of every expert for every token, mostly zero, [B, T, E]."""
    return jnp.sum(jax.nn.one_hot(ids, count) * weights[..., None], axis=-2)


def all_experts(x, ids, weights, gate, up, down):
    """Every expert sees every token."""
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    by_expert = spread(ids, weights, gate.shape[0])
    return jnp.einsum("btef,efd->btd", hidden * by_expert[..., None], down)


def one_hot(x, ids, weights, gate, up, down):
    """Tokens go to places [E, C] and come back by products (Lepikhin et al. 2020, arXiv:2006.16668); some drop."""
    b, t, k = ids.shape
    count = gate.shape[0]
    room = math.ceil(1.25 * k * t / count)
    chosen = jax.nn.one_hot(jnp.swapaxes(ids, 1, 2).reshape(b, k * t), count, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(chosen, axis=1) - 1) * chosen, axis=-1)
    at = (chosen[..., None] * jax.nn.one_hot(place, room, dtype=jnp.int32)[:, :, None]).astype(x.dtype)
    at = at.reshape(b, k, t, count, room)
    combine = jnp.einsum("bktec,btk->btec", at, weights)
    rows = jnp.einsum("btec,btd->becd", at.sum(1), x)
    hidden = jax.nn.silu(jnp.einsum("becd,edf->becf", rows, gate)) * jnp.einsum("becd,edf->becf", rows, up)
    return jnp.einsum("btec,becd->btd", combine, jnp.einsum("becf,efd->becd", hidden, down))


def program(form: str, case: cases.Case, which: str):
    """(the compiled call, its arrays)."""
    sizes = {"ffn": case.ffn, "shared": case.shared}
    config = dataclasses.replace(moe.GATINGS[case.gating], **sizes)
    if form == "dense layer":
        module = FeedForward(config.top_k * config.ffn + config.shared)
    else:
        run = {"grouped": moe.experts, "one-hot": one_hot, "all experts": all_experts}[form]
        module = moe.MoE(config, experts=run)
    first, second, third = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(first, (1, case.tokens, case.width))
    params = module.init(second, x)["params"]
    cotangent = jax.random.normal(third, x.shape)
    layer = lambda params, x: module.apply({"params": params}, x)
    if which == "both":
        layer = jax.value_and_grad(lambda params, x: jnp.sum(module.apply({"params": params}, x) * cotangent), (0, 1))
    return jax.jit(layer).lower(params, x).compile(), (params, x)


def main():
    """Prints one JSON line: a list, a row for each form."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=cases.CASES)
    parser.add_argument("which", choices=cases.PASSES)
    parser.add_argument(
        "--rounds", type=int, default=5, help="calls of each form, in turn, after one that is not timed"
    )
    options = parser.parse_args()
    case = cases.CASES[options.case]
    programs = {form: program(form, case, options.which) for form in cases.FORMS}
    laps: dict[str, list[tuple[float, float]]] = {form: [] for form in programs}
    for _ in range(options.rounds + 1):
        for form, (call, arrays) in programs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(call(*arrays))
            laps[form].append((1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)))
    rows = []
    for form, times in laps.items():
        cpu, wall = zip(*times[1:], strict=True)
        memory = programs[form][0].memory_analysis()
        row = {"form": form, "case": options.case, "pass": options.which, "tokens": case.tokens}
        row |= {"cpu_ms": statistics.median(cpu), "cpu_min_ms": min(cpu), "wall_ms": statistics.median(wall)}
        rows.append(row | {"temporary_mb": memory and memory.temp_size_in_bytes / 1e6})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
