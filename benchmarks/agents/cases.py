"""What every library trains, in the settings of the library that first published them; standard library only."""

import dataclasses
import statistics


@dataclasses.dataclass(frozen=True)
class Case:
    """An agent on an environment for `steps` environment steps.

    `settings` are in our names; `source` says whose they are.
    """

    agent: str
    env: str
    steps: int
    settings: dict
    source: str


PPO = {"epochs": 4, "minibatches": 4, "discount": 0.99, "lambda_": 0.95, "clip": 0.2, "entropy": 0.01, "value": 0.5}

CASES = {
    "ppo-4x128": Case(
        "ppo",
        "CartPole-v1",
        499_712,
        {"envs": 4, "steps": 128, "learning_rate": 2.5e-4, "anneal": 976, **PPO},
        "PureJaxRL's ppo.py",
    ),
    "ppo-64x16": Case(
        "ppo",
        "CartPole-v1",
        499_712,
        {"envs": 64, "steps": 16, "learning_rate": 2.5e-3, "anneal": 488, **PPO},
        "PureJaxRL's ppo.py with more environments",
    ),
    "dqn": Case(
        "dqn",
        "CartPole-v1",
        100_000,
        {
            "envs": 10,
            "updates": 5,
            "batch": 100,
            "capacity": 50_000,
            "warmup": 5_000,
            "learning_rate": 1e-3,
            "target_every": 10,
            "target_rate": 0.02,
            "epsilon_end": 0.05,
            "epsilon_steps": 50_000,
        },
        "Rejax's cartpole.yaml",
    ),
    "td3": Case(
        "td3",
        "Pendulum-v1",
        10_000,
        {"envs": 1, "updates": 1, "batch": 100, "capacity": 10_000, "warmup": 1_000, "target_rate": 0.05},
        "Rejax's pendulum.yaml",
    ),
    "sac": Case(
        "sac",
        "Pendulum-v1",
        10_000,
        {"envs": 1, "updates": 1, "batch": 256, "capacity": 10_000, "warmup": 256, "target_rate": 0.02},
        "Rejax's pendulum.yaml, learning rate 1e-3",
    ),
}


def line(library: str, case: str, *, trace: float, compile: float, runs: list[tuple[float, float]], **more) -> dict:
    """The JSON line of a script: `runs` holds (CPU, wall) seconds of whole trainings."""
    cpu, wall = zip(*runs, strict=True)
    return {
        "library": library,
        "case": case,
        "trace_s": trace,
        "compile_s": compile,
        "cpu_s": statistics.median(cpu),
        "cpu_min_s": min(cpu),
        "wall_s": statistics.median(wall),
        **more,
    }
