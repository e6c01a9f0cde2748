"""Write the golden values of tests/envs/test_dynamics.py: transitions of Gymnasium's classic control environments.

    python tests/golden/make_envs.py

made with gymnasium 1.3.0. Random actions; every third step starts from a random state of the whole space, so that
walls, speed limits and goals are met. For each environment envs.json holds, one entry a step,
  state, after   Gymnasium's internal state before and after the step
  time           steps taken in the episode before this one
  action, observation, reward, terminated, truncated
"""

import json
from pathlib import Path

import gymnasium
import numpy as np

SPREAD = {
    "CartPole-v1": (2.5, 3.0, 0.22, 3.0),
    "Acrobot-v1": (3.1, 3.1, 12.0, 27.0),
    "MountainCar-v0": (0.95, 0.085),
    "MountainCarContinuous-v0": (0.95, 0.085),
    "Pendulum-v1": (9.0, 8.0),
}
CENTRE = {"MountainCar-v0": (-0.3, 0.0), "MountainCarContinuous-v0": (-0.3, 0.0)}


def play(name: str, *, steps: int, seed: int) -> dict[str, list]:
    """Transitions of an environment, a list for each kind of value."""
    env = gymnasium.make(name)
    env.action_space.seed(seed)
    env.reset(seed=seed)
    inner, random = env.unwrapped, np.random.default_rng(seed)
    rows, time = [], 0
    for step in range(steps):
        if step % 3 == 2:
            jump = random.uniform(-1.0, 1.0, len(SPREAD[name])) * SPREAD[name] + CENTRE.get(name, 0.0)
            inner.state = jump.astype(np.float64)
        state, action = np.array(inner.state, np.float64), env.action_space.sample()
        observation, reward, terminated, truncated, _ = env.step(action)
        row = {
            "state": state.tolist(),
            "after": np.array(inner.state, np.float64).tolist(),
            "time": time,
            "action": action.tolist(),
            "observation": observation.tolist(),
            "reward": float(reward),
            "terminated": bool(terminated),
            "truncated": bool(truncated),
        }
        rows.append(row)
        time += 1
        if terminated or truncated:
            env.reset()
            time = 0
    return {kind: [row[kind] for row in rows] for kind in rows[0]}


if __name__ == "__main__":
    golden = {name: play(name, steps=60, seed=2) for name in SPREAD}
    Path(__file__).with_name("envs.json").write_text(json.dumps(golden) + "\n")
