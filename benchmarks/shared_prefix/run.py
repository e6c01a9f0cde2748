"""Loss and gradient of a group, one row for each completion against one for all, on one core: results.json, results.md.

python benchmarks/shared_prefix/run.py
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
import turns  # noqa: E402

PROMPTS, COMPLETIONS, GROUP = (64, 256, 1024), (64, 256), 8
CASES = {f"{prompt}+{completion}": (prompt, completion) for prompt in PROMPTS for completion in COMPLETIONS}
SIZES = {"vocab_size": 2048, "width": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 1024, "tie_embeddings": True}


def programs(prompt: int, completion: int) -> dict:
    """Name -> (the compiled call, its arrays): a policy-gradient loss of one group and its gradient."""
    import jax
    import jax.numpy as jnp

    from jaxrl.losses import group as family
    from jaxrl.losses import reduce
    from jaxrl.nets.language_model import language_model
    from jaxrl.nets.transformer import TransformerConfig
    from jaxrl.posttrain.rollout import completion_log_probs
    from jaxrl.posttrain.shared_prefix import group_log_probs, row_width
    from jaxrl.types import Rollout

    longest = max(prompt + completion, row_width(prompt, completion, GROUP))
    model = language_model(TransformerConfig(**SIZES, max_length=longest))
    params = jax.jit(model.init)(jax.random.key(0))
    shared, own = (jax.random.randint(jax.random.key(seed), shape, 0, SIZES["vocab_size"], jnp.int32)
                   for seed, shape in ((1, (1, prompt)), (2, (GROUP, completion))))  # fmt: skip
    values, lengths = jnp.zeros(own.shape), jnp.full(GROUP, completion)
    rollout = Rollout(
        tokens=jnp.concatenate([jnp.repeat(shared, GROUP, axis=0), own], axis=1),
        prompt_lengths=jnp.full(GROUP, prompt),
        lengths=lengths,
        finish=jnp.zeros(GROUP, jnp.int32),
        log_probs=values,
        behaviour_log_probs=values,
        prompt_width=prompt,
    )
    advantages = jax.random.normal(jax.random.key(3), own.shape)

    def compiled(form):
        def loss(params, rollout):
            log_probs, _ = form(model, params, rollout)
            each, _ = family.loss(log_probs, None, None, advantages, rollout.mask, variant=family.PRESETS["dapo"])
            return reduce.tokens(each, rollout.mask).mean

        return jax.jit(jax.value_and_grad(loss)).lower(params, rollout).compile(), (params, rollout)

    return {"rows": compiled(completion_log_probs), "shared": compiled(partial(group_log_probs, group=GROUP))}


def measure(case: str, rounds: int) -> dict:
    """CPU milliseconds of both in turn, and the temporary memory of their programs."""
    import jax

    calls = programs(*CASES[case])
    laps: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, (call, arrays) in calls.items():
            begun = time.process_time()
            jax.block_until_ready(call(*arrays))
            laps[name].append(1e3 * (time.process_time() - begun))
    result = {}
    for name, (call, _) in calls.items():
        memory = call.memory_analysis()
        result[name] = {
            "cpu_ms": round(statistics.median(laps[name][1:]), 1),
            "cpu_min_ms": round(min(laps[name][1:]), 1),
            "temporary_mb": memory and round(memory.temp_size_in_bytes / 1e6, 1),
        }
    return {"case": case, **result}


def table(results: list[dict]) -> str:
    """Markdown, a line for each case."""
    lines = [
        "| prompt | completion | tokens, rows | tokens, shared | rows, CPU ms / MB | shared, CPU ms / MB "
        "| tokens saved | time saved |",
        "|---" * 8 + "|",
    ]
    for result in results:
        prompt, completion = CASES[result["case"]]
        apart, once = GROUP * (prompt + completion - 1), prompt + GROUP * (completion - 1)
        rows, shared = result["rows"], result["shared"]
        cells = [f"{of['cpu_ms']:.0f} / {of['temporary_mb']:.0f}" for of in (rows, shared)]
        saved = [f"{apart / once:.2f} x", f"{rows['cpu_ms'] / shared['cpu_ms']:.2f} x"]
        lines.append(f"| {prompt} | {completion} | {apart} | {once} | {' | '.join(cells + saved)} |")
    return "\n".join(lines)


def main():
    """Measures and writes; with a case, prints its JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", choices=CASES)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each form, run in turn")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.rounds)))
        return
    results = []
    for case in CASES:
        command = [sys.executable, __file__, case, "--rounds", str(options.rounds)]
        results.append(turns.measure(command, environment=turns.ONE_THREAD, cores=turns.cores()))
        print(json.dumps(results[-1]), flush=True)
    about = turns.about(rounds=options.rounds, group=GROUP, sizes=SIZES, environment=turns.ONE_THREAD)
    turns.write(options.out, about, results, table(results))


if __name__ == "__main__":
    main()
