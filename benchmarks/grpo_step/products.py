"""The matrix products of a GRPO step and nothing else: a floor under any implementation that uses XLA's.

python benchmarks/grpo_step/products.py small
"""

import json
import statistics

import cases
import jax


def shapes(case: cases.Case) -> list[tuple[int, int]]:
    """[in, out] of the weights of all layers."""
    key_width = case.width * case.kv_heads // case.heads
    attention = [(case.width, case.width), (case.width, key_width), (case.width, key_width), (case.width, case.width)]
    return (attention + [(case.width, case.ffn), (case.width, case.ffn), (case.ffn, case.width)]) * case.layers


def forward(xs, weights):
    """y = x W for every weight."""
    return [x @ w for x, w in zip(xs, weights, strict=True)]


def backward(xs, ys, weights):
    """(x^T y, y W^T) for every weight: the gradients of the weight and of its input."""
    return [(x.T @ y, y @ w.T) for x, y, w in zip(xs, ys, weights, strict=True)]


def measure(part: str, times: int, function, *inputs, repeats: int) -> float:
    """Prints a JSON line; returns the least CPU milliseconds of a step's `times` calls."""
    program = jax.jit(function).lower(*inputs).compile()
    jax.block_until_ready(program(*inputs))
    watch = cases.Stopwatch()
    for _ in range(repeats):
        jax.block_until_ready(program(*inputs))
        watch.lap()
    cpu = [1e3 * times * lap[0] for lap in watch.laps]
    print(json.dumps({"part": part, "cpu_ms": round(statistics.median(cpu), 2), "cpu_min_ms": round(min(cpu), 2)}))
    return min(cpu)


def main():
    """Prints one JSON line for each part and for their sum."""
    options = cases.arguments()
    case = cases.CASES[options.case]
    rows = case.prompts * case.group
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    draw = lambda *shape: jax.random.normal(next(keys), shape)
    columns = case.prompt_tokens + case.new_tokens - 1
    # every operand is an array of its own, or XLA would compute equal products once
    sizes = [(rows * columns, *shape) for shape in shapes(case)]
    sizes.append((rows * case.new_tokens, case.width, case.vocabulary))
    xs, ys = [draw(n, i) for n, i, _ in sizes], [draw(n, o) for n, _, o in sizes]
    weights = [draw(i, o) for _, i, o in sizes]
    rest = {"repeats": options.steps}
    total = measure("reference and policy, forward", 2, forward, xs, weights, **rest)
    total += measure("policy, backward", 1, backward, xs, ys, weights, **rest)
    one = [x[:rows] for x in xs]
    total += measure("decoding", case.new_tokens, forward, one, weights, **rest)
    print(json.dumps({"part": "all, least", "cpu_min_ms": round(total, 2)}))


if __name__ == "__main__":
    main()
