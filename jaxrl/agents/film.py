"""An episode as moving pictures: acted in one program, drawn on the host."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.agents.agent import Agent
from jaxrl.agents.interact import within
from jaxrl.envs.env import Env


def record(agent: Agent, env: Env, params: Any, key: jax.Array, *, steps: int = 500) -> list[np.ndarray]:
    """Pictures of one greedy episode, the first state included.

    Args:
      agent: its `act` and `memory` are used.
      env: one environment with `render`.
      params: `state.params` of the agent.
      key: consumed.
      steps: pictures at most, the first apart.

    Returns:
      uint8 `[height, width, 3]` each.

    Raises:
      ValueError: an environment that cannot be drawn.
    """
    if env.render is None:
        raise ValueError(f"{env.name} has no render function, so there is nothing to film")
    reset_key, loop_key = jax.random.split(key)
    first, observation = env.reset(reset_key)

    def step(carry, key):
        state, observation, memory = carry
        mask = () if env.action_mask is None else (env.action_mask(state),)
        action, memory = agent.act(params, observation, memory, None, *mask)
        state, timestep = env.step(key, state, within(env.action_space, action))
        return (state, timestep.observation, memory), (state, timestep.terminated | timestep.truncated)

    keys = jax.random.split(loop_key, steps)
    start = (first, observation, jax.tree.map(jnp.asarray, agent.memory()))
    _, (states, done) = jax.device_get(jax.jit(lambda: jax.lax.scan(step, start, keys))())
    length = int(np.argmax(done)) + 1 if done.any() else steps
    later = [jax.tree.map(lambda x: x[i], states) for i in range(length)]
    return [env.render(state) for state in (jax.device_get(first), *later)]


def save(
    pictures: list[np.ndarray], path: str | os.PathLike, *, rate: int = 30, strip: tuple[int, int] = (2, 4)
) -> Path:
    """Writes a GIF, or rows x columns pictures evenly spread over the episode as PNG, by the path's ending.

    Raises:
      ValueError: another ending.
      ModuleNotFoundError: without Pillow, which matplotlib (the extra `plot`) brings.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix == ".gif":
        stride = max(1, -(-len(pictures) // 250))  # long episodes lose pictures, not speed
        frames = [Image.fromarray(picture) for picture in pictures[::stride]]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 * stride // rate, loop=0)
    elif path.suffix == ".png":
        rows, columns = strip
        chosen = np.linspace(0, len(pictures) - 1, rows * columns).round().astype(int).reshape(rows, columns)
        framed = [np.pad(picture, [(2, 2), (2, 2), (0, 0)], constant_values=200) for picture in pictures]
        lines = [np.concatenate([framed[i] for i in line], axis=1) for line in chosen]
        Image.fromarray(np.concatenate(lines)).save(path)
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}; expected .gif or .png")
    return path
