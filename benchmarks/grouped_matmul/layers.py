"""One expert layer in every form, in turn: python benchmarks/grouped_matmul/layers.py mixtral-8x7b/8 both"""

import argparse
import json
import statistics
import time
from functools import partial

import cases
import jax
import jax.numpy as jnp

from jaxrl.kernels.experts import combine, dispatch, sort_by_expert
from jaxrl.kernels.grouped_matmul import grouped_matmul
from jaxrl.kernels.quantised import FP8, INT8, quantised_grouped_matmul

PRODUCTS = {
    "tiles": partial(grouped_matmul, implementation="tiles"),
    "ragged_dot": partial(grouped_matmul, implementation="ragged_dot"),
    "int8": partial(quantised_grouped_matmul, scheme=INT8),
    "fp8": partial(quantised_grouped_matmul, scheme=FP8),
}


def sorted_rows(product, x, weights, matrices, experts):
    """Rows sorted by expert; each expert sees its own."""
    gate, up, down = matrices
    routing = sort_by_expert(experts, num_experts=gate.shape[0])
    rows, sizes = dispatch(x, routing), routing.group_sizes
    return combine(
        product(jax.nn.silu(product(rows, gate, sizes)) * product(rows, up, sizes), down, sizes), routing, weights
    )


def spread(weights, experts, count):
    """The weight of every expert for every token, mostly zero, [T, E]."""
    return jnp.sum(jax.nn.one_hot(experts, count) * weights[..., None], axis=1)


def dense(x, weights, matrices, experts):
    """Every expert sees every token, all at once."""
    gate, up, down = matrices
    hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)
    return jnp.einsum("tef,efd->td", hidden * spread(weights, experts, gate.shape[0])[..., None], down)


def loop(x, weights, matrices, experts):
    """Every expert sees every token, one expert after the other."""

    def add(y, expert):
        (gate, up, down), weight = expert
        return y + weight[:, None] * ((jax.nn.silu(x @ gate) * (x @ up)) @ down), None

    by_expert = spread(weights, experts, matrices[0].shape[0]).T
    return jax.lax.scan(add, jnp.zeros_like(x), (matrices, by_expert))[0]


def program(form: str, case: cases.Case, which: str):
    """(the compiled call, its arrays)."""
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (case.tokens, case.width))
    weights, experts = jax.lax.top_k(
        jax.nn.softmax(jax.random.normal(keys[1], (case.tokens, case.experts))), case.chosen
    )
    shapes = ((case.width, case.hidden), (case.width, case.hidden), (case.hidden, case.width))
    draw = lambda key, shape: jax.random.normal(key, (case.experts, *shape)) * shape[0] ** -0.5
    matrices = tuple(draw(key, shape) for key, shape in zip(keys[2:5], shapes, strict=True))
    layer = {"dense": dense, "loop": loop}.get(form) or partial(sorted_rows, PRODUCTS[form])
    run = lambda x, weights, matrices: layer(x, weights, matrices, experts)
    if which == "both":
        cotangent = jax.random.normal(keys[5], x.shape)
        run = jax.value_and_grad(lambda *arrays: jnp.sum(layer(*arrays, experts) * cotangent), (0, 1, 2))
    return jax.jit(run).lower(x, weights, matrices).compile(), (x, weights, matrices)


def main():
    """Prints one JSON line: a list, a row for each form."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=cases.CASES)
    parser.add_argument("which", choices=cases.PASSES)
    parser.add_argument(
        "--rounds", type=int, default=5, help="calls of each form, in turn, after one that does not count"
    )
    options = parser.parse_args()
    programs = {form: program(form, cases.CASES[options.case], options.which) for form in cases.FORMS}
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
        row = {"form": form, "case": options.case, "pass": options.which}
        row |= {"cpu_ms": statistics.median(cpu), "cpu_min_ms": min(cpu), "wall_ms": statistics.median(wall)}
        rows.append(row | {"temporary_mb": memory and memory.temp_size_in_bytes / 1e6})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
