"""Whole runs of agents: a population, the loop, evaluation, checkpoints and a run folder, from one frozen config.

    from jaxrl.agents import training

    outcome = training.train("ppo", training.options("ppo", "CartPole-v1"))
    print(outcome.summary["members"])

The pure functions this is made of are the agents' own; write your own loop around them where this is too narrow.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxrl import checkpoint, config, envs, loop, metrics, parallel, plots, runs, statistics
from jaxrl.agents import anakin, catalogue, film, population
from jaxrl.agents.presets import PRESETS
from jaxrl.display import Display, metrics_line
from jaxrl.parallel import faults


@dataclasses.dataclass(frozen=True)
class AgentRun:
    """What every run of an agent needs."""

    env: str = "CartPole-v1"
    """Environment: a name that `jaxrl envs` lists, or gymnax:NAME, gymnasium:NAME, brax:NAME."""
    out: str = ""
    """Run folder; empty chooses runs/<agent>-<env>."""
    env_steps: int = 500_000
    """Environment steps of each member, those before a resume included; rounded up to whole rounds."""
    round_steps: int = 0
    """Environment steps of a round, after which come an evaluation and a log line; 0: a fiftieth of env_steps."""
    seed: int = 0
    """Everything random follows from it."""
    seeds: int = 1
    """Members that differ in their seed alone: seed, seed + 1, ..."""
    grid: tuple[str, ...] = ()
    """Values of the agent's numbers to combine, such as learning_rate=1e-3,3e-4 entropy=0.0,0.01."""
    episodes: int = 32
    """Greedy episodes in an evaluation."""
    saves: int = 5
    """Checkpoints in the course of a run."""
    keep: int = 2
    """Checkpoints kept."""
    mesh: str = ""
    """Devices that share the environments of each member, such as data=8; auto is all of them, empty is one."""


class Outcome(NamedTuple):
    """What a run made: its folder, what `summary.json` holds, and the final population."""

    folder: Path
    summary: dict[str, Any]
    members: population.Members


def options(agent: str, env: str = "CartPole-v1") -> Any:
    """The default config of a run: an `AgentRun` with the agent's config under `agent`, tuned for `env` where known."""
    entry = catalogue.find(agent)
    own, env_steps = PRESETS.get((agent, env)) or (entry.config(), AgentRun.env_steps)
    field = ("agent", entry.config, dataclasses.field(default_factory=lambda: own))
    run = dataclasses.make_dataclass(f"{entry.config.__name__}Run", [field], bases=(AgentRun,), frozen=True)
    text = catalogue.AGENTS[agent][1]
    run.__doc__ = f"{text[0].upper()}{text[1:]}, on {env}."
    return run(env=env, env_steps=env_steps)


def train(name: str, run: Any, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Trains every member of a run.

    Args:
      name: the agent.
      run: from `options`, with what is to be different.
      resume: go on from the newest intact checkpoint in `run.out`.
      display: where to show progress; None makes one.

    Raises:
      ValueError: on sizes, names or a folder that cannot serve, before anything is compiled or overwritten.
      Preempted: told to stop (SIGTERM), after the round in progress and a checkpoint.
    """
    run = dataclasses.replace(run, out=run.out or f"runs/{name}-{run.env}".replace(":", "-"))
    folder, members = Path(run.out), members_of(run)
    people, rounds = gather(name, run, members)
    run = dataclasses.replace(run, round_steps=people.env_steps)
    init, shapes = jax.jit(people.init), jax.eval_shape(people.init)
    if run.mesh:
        init, shapes = on_mesh(name, run, members)
    jax.eval_shape(people.round, shapes)  # what does not fit together is found before anything is written
    if resume:
        _check_same_rounds(folder, run)
    else:
        runs.check_new(folder)
    if checkpoint.steps(folder / runs.CHECKPOINTS):
        state, done = checkpoint.restore(folder / runs.CHECKPOINTS, shapes)
    else:
        state, done = init(), 0
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_config(folder, name, run)
    log = metrics.MetricsLog(folder / runs.METRICS, after_step=done * people.env_steps)
    spent = max((row.get("time/elapsed", 0.0) for row in metrics.read(log.path)), default=0.0)
    begun = time.perf_counter()
    evaluate = jax.jit(people.evaluate)
    save_every = max(1, rounds // max(run.saves, 1))

    with contextlib.nullcontext(display) if display else Display() as view, faults.preemption() as told_to_stop:
        view.stage(f"{name} on {run.env}", steps=rounds * people.env_steps, done=done * people.env_steps)
        compiled = 0.0
        try:
            for progress in loop.run(people.round, state, None, steps=rounds, chunk=1):
                state, done = progress.state, progress.step
                compiled += progress.compile_seconds
                rate = people.env_steps * len(members) / progress.seconds
                returns = np.asarray(evaluate(state, _evaluation_key(run.seed, done)))
                row = {
                    **progress.metrics[0],
                    "eval/return": float(returns.mean()),
                    "throughput/env_steps_per_second": rate,
                    "time/elapsed": spent + time.perf_counter() - begun,
                }
                log.write(done * people.env_steps, {**row, "eval/returns": returns.mean(axis=1).tolist()})
                if done == 1 and row.get("episode/count") == 0.0:
                    view.note(
                        "  no episode ended yet; if none does, reinforce without a baseline learns nothing: "
                        "raise --agent.steps"
                    )
                view.update(done * people.env_steps, row, rate=f"{rate:,.0f} env steps/s")
                if done % max(1, rounds // 10) == 0 or done == rounds:
                    view.note(f"  {done * people.env_steps:>10,} steps: {metrics_line(row)}")
                stop = told_to_stop()
                if done % save_every == 0 or done == rounds or stop:
                    checkpoint.save(folder / runs.CHECKPOINTS, done, state, keep=run.keep)
                if stop and done < rounds:
                    view.note(f"told to stop; go on with: jaxrl train {name} --resume {folder}")
                    raise faults.Preempted()
        except KeyboardInterrupt:
            view.note(f"interrupted; go on with: jaxrl train {name} --resume {folder}")
            raise

    rows = list(metrics.read(log.path))
    labels = curve_labels(members)
    scores = np.asarray([row["eval/returns"] for row in rows])
    curves = {label: scores[:, [i for i, own in enumerate(labels) if own == label]] for label in dict.fromkeys(labels)}
    plots.bands(np.asarray([row["step"] for row in rows]), curves, folder / "curves.png", title=f"{name} on {run.env}")
    summary = {
        "kind": name,
        "env_steps": done * people.env_steps,
        "seconds": spent + time.perf_counter() - begun,
        "compile_seconds": compiled,
        "members": [{**member, "return": float(score)} for member, score in zip(members, scores[-1], strict=True)],
        "groups": [{"group": label, **_score(values[-1])} for label, values in curves.items()],
        "config": config.to_json(run),
        **runs.environment(),
    }
    runs.write_json(folder / runs.SUMMARY, summary)
    return Outcome(folder, summary, state)


def members_of(run: AgentRun) -> list[dict[str, float]]:
    """What each member of a run is: the grid's values and its seed.

    Raises:
      ValueError: a grid that cannot be read, or no seeds.
    """
    if run.seeds < 1 or run.env_steps < 1:
        raise ValueError(f"seeds is {run.seeds} and env_steps {run.env_steps}; expected at least 1 of each")
    grid = {}
    for word in run.grid:
        name, _, values = word.partition("=")
        name = name.replace("-", "_")
        if name == "seed":
            raise ValueError(f"grid {word!r}: seeds are not part of the grid; use --seed and --seeds")
        if name in grid:
            raise ValueError(f"grid names {name!r} twice; list its values once, as in {name}=1e-3,3e-4")
        try:
            grid[name] = [float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"grid {word!r} is not of the form learning_rate=1e-3,3e-4") from None
    return population.combinations(grid, range(run.seed, run.seed + run.seeds))


def gather(name: str, run: Any, members: list[dict[str, float]]) -> tuple[population.Population, int]:
    """The population of a run, and the rounds it takes. An `anneal` of -1 in the agent's config becomes the run's."""
    env = envs.make(run.env)
    make_agent = catalogue.find(name).make
    if run.mesh:
        make_agent = functools.partial(anakin.spread, make_agent, mesh=mesh_of(run))
    agent = run.agent if getattr(run.agent, "anneal", 0) != -1 else dataclasses.replace(run.agent, anneal=0)
    of_update = make_agent(agent, env).env_steps
    updates = -(-run.env_steps // of_update)
    each = max(1, round(run.round_steps / of_update) if run.round_steps else updates // 50)
    rounds = -(-updates // each)
    if agent is not run.agent:
        agent = dataclasses.replace(agent, anneal=rounds * each)
    people = population.make(make_agent, agent, env, members, updates=each, episodes=run.episodes)
    return people, rounds


def mesh_of(run: AgentRun) -> jax.sharding.Mesh:
    """The mesh that a run names.

    Raises:
      ValueError: one that does not fit the devices, or that has an axis other than `data`.
    """
    mesh = parallel.make_mesh("" if run.mesh == "auto" else run.mesh)
    others = [name for name, size in mesh.shape.items() if size > 1 and name != anakin.AXIS]
    if others:
        raise ValueError(
            f"mesh {run.mesh!r} has devices on {', '.join(others)}; agents divide their environments over the axis "
            f"{anakin.AXIS!r} alone: --mesh {anakin.AXIS}={mesh.size}"
        )
    return mesh


def on_mesh(name: str, run: Any, members: list[dict[str, float]]) -> tuple[Callable, Any]:
    """(what makes a population laid out on the run's mesh, the shapes and places of its state)."""
    whole, twice = (
        gather(name, dataclasses.replace(run, agent=agent), members)[0].init
        for agent in (run.agent, anakin.doubled(run.agent))
    )
    specs = anakin.layout(whole, twice)
    places = jax.tree.map(lambda spec: NamedSharding(mesh_of(run), spec), specs)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.jit(whole, out_shardings=places), jax.tree.map(place, jax.eval_shape(whole), places)


def open_run(folder: str | Path) -> tuple[str, Any, population.Population, population.Members]:
    """(agent, config, population, newest intact members) of a run folder.

    Raises:
      ValueError: when the folder holds no run of an agent.
    """
    name, values = runs.read_config(folder)
    if name not in catalogue.AGENTS:
        raise ValueError(f"{folder} is a run of {name}, not of an agent ({', '.join(catalogue.AGENTS)})")
    run = config.from_json(options(name, values["env"]), values, source=f"{folder}/{runs.CONFIG}")
    run = dataclasses.replace(run, mesh="")  # to look at it, one device will do
    people, _ = gather(name, run, members_of(run))
    state, _ = checkpoint.restore(Path(folder) / runs.CHECKPOINTS, jax.eval_shape(people.init))
    return name, run, people, state


def evaluate(folder: str | Path, *, episodes: int = 100) -> list[tuple[dict[str, float], np.ndarray]]:
    """For each member of a run what it is, and its returns [episodes] in fresh greedy episodes."""
    name, run, _, state = open_run(folder)
    members = members_of(run)
    people, _ = gather(name, dataclasses.replace(run, episodes=episodes), members)
    returns = jax.jit(people.evaluate)(state, _evaluation_key(run.seed, 0))  # round 0 is never evaluated
    return list(zip(members, np.asarray(returns), strict=True))


def make_film(folder: str | Path, path: str | Path, *, member: int = 0, seed: int = 0, steps: int = 500) -> Path:
    """Films one greedy episode of a run's member; `path` ends in .gif or .png (a strip)."""
    name, run, _, state = open_run(folder)
    members = members_of(run)
    if not 0 <= member < len(members):
        raise ValueError(f"member is {member}; {folder} has members 0 to {len(members) - 1}")
    env = envs.make(run.env)
    agent = catalogue.find(name).make(run.agent, env)
    params = jax.tree.map(lambda x: x[member], state.agents.params)
    return film.save(film.record(agent, env, params, jax.random.key(seed), steps=steps), path)


def curve_labels(members: list[dict[str, float]]) -> list[str]:
    """For each member the values it shares with those that differ in the seed alone."""
    return [", ".join(f"{k}={v:g}" for k, v in member.items() if k != "seed") or "all seeds" for member in members]


def next_steps(folder: str | Path) -> str:
    """What to do with a finished run, one command a line."""
    path = Path(folder)
    kind, values = runs.read_config(path)
    plot = path / "curves.png"
    lines = {
        "learning curves": str(plot) if plot.exists() else "none: pip install 'jaxrl[plot]' draws them",
        "evaluate it": f"jaxrl eval {path}",
        "see it act": f"jaxrl film {path}",
        "train on": f"jaxrl train {kind} --resume {path} --env-steps {2 * values['env_steps']}",
    }
    return "\n".join(f"{what:<18}{command}" for what, command in lines.items())


def _check_same_rounds(folder: Path, run: Any) -> None:
    """A population counts rounds, so a resumed run must go on in rounds of the same length."""
    saved = runs.read_config(folder)[1]["round_steps"]
    if saved != run.round_steps:
        raise ValueError(
            f"rounds of {folder} have {saved} environment steps, and these flags give {run.round_steps}; "
            "resume without --round-steps and without what changes the steps of an update"
        )


def _evaluation_key(seed: int, done: int) -> jax.Array:
    """Of a domain of its own: agents fold small numbers into the run's key."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), (1 << 32) - 1), done)


def _score(returns: np.ndarray) -> dict[str, Any]:
    low, high = statistics.bootstrap(returns, _mean)
    return {"mean": float(returns.mean()), "low": float(low), "high": float(high), "seeds": len(returns)}


def _mean(scores: np.ndarray) -> np.ndarray:
    return scores.mean(axis=0)
