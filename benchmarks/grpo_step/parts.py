"""Where a step of ours goes: time, temporary memory and compile time of sampling, learning and the whole.

python benchmarks/grpo_step/parts.py small
"""

import json
import statistics
import time

import cases
import jax
import ours


def measure(part: str, function, *inputs, repeats: int):
    """Compiles and times one part, prints a JSON line, returns the part's result."""
    begun = time.process_time(), time.perf_counter()
    program = jax.jit(function).lower(*inputs).compile()
    compile_cpu, compile_wall = time.process_time() - begun[0], time.perf_counter() - begun[1]
    result = jax.block_until_ready(program(*inputs))
    watch = cases.Stopwatch()
    for _ in range(repeats):
        jax.block_until_ready(program(*inputs))
        watch.lap()
    cpu, memory = [lap[0] for lap in watch.laps], program.memory_analysis()
    line = {
        "part": part,
        "cpu_ms": round(1e3 * statistics.median(cpu), 2),
        "cpu_min_ms": round(1e3 * min(cpu), 2),
        "temporary_mb": memory and round(memory.temp_size_in_bytes / 1e6, 2),
        "compile_s": round(compile_wall, 1),
        "compile_cpu_s": round(compile_cpu, 1),
    }
    print(json.dumps(line), flush=True)
    return result


def main():
    """Prints one JSON line for each part."""
    options = cases.arguments()
    state, data, step, run = ours.build(cases.CASES[options.case])
    completions, _ = measure("sample", run.sample, state, data.prompts, repeats=options.steps)
    rewards = jax.jit(ours.reward)(completions, None)
    measure("learn", run.learn, state, completions, rewards, repeats=options.steps)
    measure("step", step, state, data, repeats=options.steps)


if __name__ == "__main__":
    main()
