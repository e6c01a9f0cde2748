"""A checker of environments: says what breaks the protocol, and how to mend it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.envs.env import Box, Discrete, Env, TimeStep
from jaxrl.envs.wrappers import auto_reset, vectorise


def check(env: Env, *, steps: int = 64, seed: int = 0) -> None:
    """Runs an environment as agents do: traced, eagerly, jitted, in a scan and vmapped, with random actions.

    Args:
      env: one environment, as given to an agent: neither vectorised nor with `auto_reset`.
      steps: how many random steps to take.
      seed: of the random actions.

    Raises:
      ValueError: with every fault found, and what to do about each.
    """
    faults = find_faults(env, steps=steps, seed=seed)
    if faults:
        raise ValueError(f"{env.name} breaks the protocol of environments:\n" + "\n".join(f"- {f}" for f in faults))


def find_faults(env: Env, *, steps: int = 64, seed: int = 0) -> list[str]:
    """What `check` would complain about, a sentence for each fault. Faults of one kind hide those of the next."""
    for look in (_spaces, _shapes, _values, _batches):
        try:
            with jax.debug_key_reuse(True):
                faults = list(dict.fromkeys(look(env, seed, steps)))
        except jax.errors.KeyReuseError:
            return ["a random key is used twice: split it (jax.random.split) and use every part once"]
        if faults:
            return faults
    return []


def _spaces(env, seed, steps):
    for name in ("observation_space", "action_space"):
        space = getattr(env, name)
        if isinstance(space, Discrete):
            if space.n < 1:
                yield f"{name} is Discrete({space.n}): it needs at least one element"
        elif isinstance(space, Box):
            try:
                low, high = space.bounds
            except ValueError:
                yield f"{name}: low or high does not fit shape {space.shape}: give numbers or nested tuples of it"
                continue
            if not (low <= high).all():
                yield f"{name}: low is not below high everywhere (low {space.low}, high {space.high})"
        else:
            yield f"{name} is {space!r}, expected envs.Discrete or envs.Box"


def _shapes(env, seed, steps):
    """Faults seen without running anything: structures, shapes and dtypes."""
    reset, fault = _traced("reset", env.reset, jax.random.key(seed))
    if fault:
        return [fault]
    if not (isinstance(reset, tuple) and len(reset) == 2):
        return [f"reset returns {type(reset).__name__}, expected (state, observation)"]
    state, observation = reset
    faults = _against("the observation of reset", observation, env.observation_space)
    action = jax.ShapeDtypeStruct(env.action_space.shape, env.action_space.dtype)
    result, fault = _traced("step", env.step, jax.random.key(seed), state, action)
    if fault:
        return [*faults, fault]
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], TimeStep)):
        kind = type(result[1]).__name__ if isinstance(result, tuple) and len(result) == 2 else type(result).__name__
        return [*faults, f"step returns {kind}, expected (state, envs.TimeStep)"]
    after, timestep = result
    faults += _same_state(state, after)
    faults += _against("the observation of step", timestep.observation, env.observation_space)
    faults += _against("the successor", timestep.successor, env.observation_space)
    wanted = {"reward": (jnp.float32, "jnp.float32(reward)"), "terminated": (bool, ""), "truncated": (bool, "")}
    for name, (dtype, mend) in wanted.items():
        leaf = getattr(timestep, name)
        if _kind(leaf) != ((), jnp.dtype(dtype)):
            mend = mend or "a comparison, or jnp.zeros((), bool) for never"
            faults.append(f"{name} is {_say(leaf)}, expected {jnp.dtype(dtype).name}[]: return {mend}")
    if env.action_mask is not None:
        mask, fault = _traced("action_mask", env.action_mask, state)
        if fault:
            faults.append(fault)
        elif not isinstance(env.action_space, Discrete):
            faults.append("action_mask is given, but the actions are not Discrete: drop it")
        elif _kind(mask) != ((env.action_space.n,), jnp.dtype(bool)):
            faults.append(f"action_mask gives {_say(mask)}, expected bool[{env.action_space.n}]: one flag to an action")
    return faults


def _values(env, seed, steps):
    """Faults of the numbers: runs eagerly and jitted. A key made anew may be used again."""
    reset, step, new = jax.jit(env.reset), jax.jit(env.step), jax.random.key
    started, observation = reset(new(seed))
    again, eager = reset(new(seed))[1], env.reset(new(seed))[1]
    faults = []
    if not _equal(observation, again) or not _equal(observation, eager, close=True):
        faults.append("reset gives different observations for the same key: draw all that is random from the key")
    state = started
    for number in range(seed + 1, seed + 1 + min(steps, 8)):
        action = _action(env, new(-number), state)
        after, timestep = step(new(number), state, action)
        again, eager = step(new(number), state, action)[1], env.step(new(number), state, action)[1]
        if not _equal(timestep, again) or not _equal(timestep, eager, close=True):
            faults.append(
                "step gives different results for the same key, state and action: all that is random comes from the "
                "key, all that lasts is in the state; nothing outside may be read or changed"
            )
            break
        if timestep.terminated or timestep.truncated:
            if not _equal(timestep.observation, timestep.successor):
                faults.append("observation and successor differ at the end of an episode: leave resets to auto_reset")
            after, _ = reset(new(number))
        state = after
    if env.render is not None:
        picture = env.render(started)
        if not (isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2:] == (3,)):
            faults.append(f"render gives {_say(picture)}, expected a NumPy array uint8[height, width, 3]")
    return faults


def _batches(env, seed, steps):
    """Faults that show over time: a scan of two copies, with resets."""
    copies = 2
    many = vectorise(auto_reset(env), copies)

    def run(reset_key, loop_key):
        state, observation = many.reset(reset_key)

        def move(state, key):
            action_key, step_key = jax.random.split(key)
            mask = None if many.action_mask is None else many.action_mask(state)
            actions = jax.vmap(lambda key, state: _action(env, key, state))(jax.random.split(action_key, copies), state)
            after, timestep = many.step(step_key, state, actions)
            return after, (timestep, mask)

        return observation, jax.lax.scan(move, state, jax.random.split(loop_key, steps))[1]

    try:
        first, (timesteps, masks) = jax.jit(run)(*jax.random.split(jax.random.key(seed)))
    except jax.errors.KeyReuseError:
        raise
    except Exception as error:  # whatever tracing under vmap and scan may raise
        return [f"the environment does not run under vmap and scan: {_short(error)}"]
    faults = []
    for name, values in {"observation of reset": first, **timesteps._asdict()}.items():
        if name in ("terminated", "truncated"):
            continue
        values = np.asarray(values)
        if not np.isfinite(values).all():
            faults.append(f"{name} is not finite at some step: look for a division by zero, a root or log of 0")
        elif name != "reward":
            faults += _bounds(name, values, env.observation_space)
    if masks is not None and not np.asarray(masks).any(axis=-1).all():
        faults.append("action_mask forbids every action in some state: allow at least one, or end the episode before")
    return faults


def _bounds(name, values, space):
    if isinstance(space, Discrete):
        low, high = 0, space.n - 1
    else:
        low, high = space.bounds
    # A bound such as pi is not the same number in float32.
    slack = 1e-6 * np.maximum(1.0, np.abs(np.where(np.isfinite(high), high, 1.0)))
    below, above = values < np.asarray(low) - slack, values > np.asarray(high) + slack
    if below.any() or above.any():
        worst = values[below].min() if below.any() else values[above].max()
        return [f"{name} holds {worst}, outside observation_space {space}: widen the bounds, or clip"]
    return []


def _traced(name, function, *arguments):
    """(shapes of the results, None), or (None, the fault)."""
    try:
        return jax.eval_shape(function, *arguments), None
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        return None, (
            f"{name} cannot be traced: a Python `if`, `while`, bool(), int() or NumPy function meets a traced value; "
            f"use jnp.where, jax.lax.cond or jnp ({_short(error)})"
        )
    except jax.errors.KeyReuseError:
        raise
    except Exception as error:
        return None, f"{name} fails for an element of its space: {type(error).__name__}: {_short(error)}"


def _same_state(before, after):
    if jax.tree.structure(before) != jax.tree.structure(after):
        return [
            f"step returns a state of another structure than reset ({jax.tree.structure(after)}, not "
            f"{jax.tree.structure(before)}): a scan cannot carry it; keep the same fields"
        ]
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return [
        f"state{jax.tree_util.keystr(path)} is {_say(old)} after reset but {_say(new)} after step: a scan cannot carry "
        "it; keep shape and dtype (jnp.int32(0), .astype)"
        for (path, old), new in pairs
        if _kind(old) != _kind(new)
    ]


def _against(name, value, space):
    wanted = (tuple(space.shape), jnp.dtype(space.dtype))
    if len(jax.tree.leaves(value)) != 1 or not hasattr(value, "dtype"):
        return [f"{name} is a {type(value).__name__}, expected one array: stack or flatten it"]
    if _kind(value) != wanted:
        shape = ", ".join(map(str, wanted[0]))
        return [f"{name} is {_say(value)}, observation_space says {wanted[1].name}[{shape}]: change one of them"]
    return []


def _action(env, key, state):
    """A random action, one that is allowed."""
    if env.action_mask is None:
        return env.action_space.sample(key)
    logits = jnp.where(env.action_mask(state), 0.0, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _equal(x: Any, y: Any, *, close: bool = False) -> bool:
    def same(a, b):
        a, b = np.asarray(a), np.asarray(b)
        return (
            np.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) if close else np.array_equal(a, b, equal_nan=True)
        )

    return all(same(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def _kind(leaf):
    return tuple(np.shape(leaf)), jnp.dtype(leaf.dtype) if hasattr(leaf, "dtype") else None


def _say(leaf):
    if not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"


def _short(error):
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
