"""Environment steps per second against the number of environments and of seeds: python benchmarks/agents/scaling.py

PPO on CartPole, a rollout of 128 steps an environment, 4 minibatches, 4 epochs. Seeds are trained one after another
inside the program ("in turn") or as one batch ("side by side").
"""

import json
import statistics
import time
from pathlib import Path

import jax

from jaxrl import envs
from jaxrl.agents import population, ppo


def steps_per_second(number: int, seeds: int, *, side_by_side: bool, repeats: int = 5) -> dict:
    """Env steps of all members per second of CPU and wall time; seconds to build the program."""
    config, env = ppo.PPOConfig(envs=number), envs.make("CartPole-v1")
    members = population.combinations({}, range(seeds))
    updates = max(1, 32 // number)
    people = population.make(ppo.make, config, env, members, updates=updates, side_by_side=side_by_side)
    state = jax.block_until_ready(jax.jit(people.init)())
    begun = time.perf_counter()
    program = jax.jit(people.round, donate_argnums=0).lower(state).compile()
    built = time.perf_counter() - begun
    laps = []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        state, _ = jax.block_until_ready(program(state))
        laps.append((time.process_time() - cpu, time.perf_counter() - wall))
    steps = people.env_steps * seeds
    cpu, wall = (statistics.median(lap) for lap in zip(*laps, strict=True))
    return {
        "envs": number,
        "seeds": seeds,
        "side_by_side": side_by_side,
        "steps_per_cpu_s": round(steps / cpu),
        "steps_per_s": round(steps / wall),
        "build_s": round(built, 1),
    }


def main():
    """Prints JSON lines and writes scaling.md."""
    cases = [(number, 1, False) for number in (1, 4, 16, 64, 256, 1024)]
    cases += [(4, seeds, side) for side in (False, True) for seeds in (4, 16)]
    lines = ["| envs | seeds | | env steps per CPU s | per wall s | build s |", "|---|---|---|---|---|---|"]
    for number, seeds, side in cases:
        row = steps_per_second(number, seeds, side_by_side=side)
        print(json.dumps(row), flush=True)
        how = "" if seeds == 1 else "side by side" if side else "in turn"
        lines.append(
            f"| {number} | {seeds} | {how} | {row['steps_per_cpu_s']:,} | {row['steps_per_s']:,} | {row['build_s']} |"
        )
    Path(__file__).with_name("scaling.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
