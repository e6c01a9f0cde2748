"""Runs of agents from config to folder: members, rounds, resumption, films, and what is refused."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxrl import checkpoint, cli, commands, envs, metrics
from jaxrl.agents import catalogue, film, population, ppo, training
from jaxrl.agents.evaluate import evaluate

SMALL = ppo.PPOConfig(envs=2, steps=8, epochs=1, minibatches=1, hidden=(8,))


def small(out, **changes):
    run = dataclasses.replace(training.options("ppo", "CartPole-v1"), agent=SMALL, out=str(out))
    return dataclasses.replace(run, **{"env_steps": 64, "round_steps": 32, "episodes": 2, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "grid"
    run = small(folder, grid=("learning-rate=1e-3,0.01",), seeds=2, seed=5)
    return training.train("ppo", run)


def test_members_are_every_combination(finished):
    rows = [(m["learning_rate"], m["seed"]) for m in finished.summary["members"]]
    assert rows == [(0.001, 5), (0.001, 6), (0.01, 5), (0.01, 6)]
    assert [group["group"] for group in finished.summary["groups"]] == ["learning_rate=0.001", "learning_rate=0.01"]
    assert int(finished.members.step) == 2 and finished.summary["env_steps"] == 64


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_member_is_the_agent_that_would_be_trained_alone(finished, side_by_side):
    env = envs.make("CartPole-v1")
    members = population.combinations({"learning_rate": [1e-3, 0.01]}, [5, 6])
    people = population.make(ppo.make, SMALL, env, members, updates=2, side_by_side=side_by_side)
    state, _ = jax.jit(people.round)(jax.jit(people.init)())
    alone = ppo.make(dataclasses.replace(SMALL, learning_rate=0.01), env)
    own = jax.jit(lambda key: alone.step(alone.step(alone.init(key))[0])[0])(jax.random.key(6))
    for a, b in zip(jax.tree.leaves(state.agents.params), jax.tree.leaves(own.params), strict=True):
        np.testing.assert_allclose(a[3], b, atol=2e-6)


def test_the_log_has_a_row_for_each_round(finished):
    rows = list(metrics.read(finished.folder / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [32, 64]
    assert all(len(row["eval/returns"]) == 4 for row in rows)
    assert np.mean(rows[-1]["eval/returns"]) == pytest.approx(rows[-1]["eval/return"])
    assert set(rows[-1]) - {"step"} <= set(metrics.GLOSSARY)
    assert (finished.folder / "curves.png").stat().st_size > 5000


def test_resumed_is_uninterrupted(tmp_path, monkeypatch):
    whole = training.train("ppo", small(tmp_path / "whole", env_steps=96))
    real, calls = training.metrics_line, []

    def interrupt(row):
        calls.append(row)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "metrics_line", interrupt)
        training.train("ppo", small(tmp_path / "cut", env_steps=96))
    resumed = training.train("ppo", small(tmp_path / "cut", env_steps=96), resume=True)
    assert same(whole.members, resumed.members)
    logs = [list(metrics.read(outcome.folder / "metrics.jsonl")) for outcome in (whole, resumed)]
    timed = ("time/elapsed", "throughput/env_steps_per_second")
    bare = [[{k: v for k, v in row.items() if k not in timed} for row in log] for log in logs]
    assert bare[0] == bare[1]


def same(members, others):
    bare = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(bare(a), bare(b)), members, others))


def test_told_to_stop_it_saves_and_goes_on_bitwise(tmp_path, monkeypatch, capsys):
    """SIGTERM in the second of four rounds, between the checkpoints that were due."""
    flags = ["--env-steps", "64", "--round-steps", "16", "--episodes", "2", "--saves", "1", "--agent.envs", "2"]
    flags += ["--agent.steps", "8", "--agent.minibatches", "1", "--agent.epochs", "1"]
    assert cli.main(["train", "ppo", *flags, "--out", str(tmp_path / "whole")]) == 0
    real, calls = training.metrics_line, []

    def tell(row):
        calls.append(row)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(row)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(training, "metrics_line", tell)
        cli.main(["train", "ppo", *flags, "--out", str(tmp_path / "cut")])
    signal.signal(signal.SIGTERM, before)  # it stays deaf until the process has ended
    assert stopped.value.code == 75 and len(calls) == 2
    assert f"told to stop; go on with: jaxrl train ppo --resume {tmp_path}/cut" in " ".join(
        capsys.readouterr().out.split()
    )
    assert checkpoint.steps(tmp_path / "cut" / "checkpoints") == [2]
    assert cli.main(["train", "ppo", "--resume", str(tmp_path / "cut")]) == 0
    whole, cut = (training.open_run(tmp_path / name)[-1] for name in ("whole", "cut"))
    assert same(whole, cut) and int(cut.step) == 4


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "data=8"])
def test_sigterm_to_a_process(mesh, tmp_path):
    """Wherever in its rounds it is."""
    words = [sys.executable, "-m", "jaxrl.cli", "train", "dqn"]
    flags = ["--env-steps", "4000", "--round-steps", "100", "--episodes", "2", "--saves", "1", "--mesh", mesh]
    for name, value in {"envs": 8, "batch": 16, "rounds": 5, "warmup": 80, "capacity": 800, "anneal": 0}.items():
        flags += [f"--agent.{name}", str(value)]
    subprocess.run([*words, *flags, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    cut = tmp_path / "cut"
    with subprocess.Popen([*words, *flags, "--out", str(cut)], stdout=subprocess.DEVNULL) as process:
        log, until = cut / "metrics.jsonl", time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= 3) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    (done,) = checkpoint.steps(cut / "checkpoints")
    assert 3 <= done < 50  # of 50 rounds, of which the last alone is saved undisturbed
    subprocess.run([*words, "--resume", str(cut)], check=True, capture_output=True)
    assert same(*(training.open_run(tmp_path / name)[-1] for name in ("whole", "cut")))


MESHES = {
    "ppo": (SMALL, "CartPole-v1"),
    "dqn": (
        catalogue.find("dqn").config(batch=16, rounds=4, warmup=16, capacity=64, hidden=(4,), prioritised=True),
        "CartPole-v1",
    ),
}


@pytest.mark.parametrize("name", ["ppo", pytest.param("dqn", marks=pytest.mark.slow)])
def test_a_run_on_a_mesh(name, tmp_path):
    """Two seeds on eight devices do what they do on one; a folder of either goes on on the other's devices."""
    agent, env = MESHES[name]
    run = dataclasses.replace(training.options(name, env), agent=dataclasses.replace(agent, envs=8))
    run = dataclasses.replace(run, env_steps=128, round_steps=64, episodes=2, seeds=2)
    on = lambda folder, mesh, **changes: dataclasses.replace(run, out=str(tmp_path / folder), mesh=mesh, **changes)
    alone, many = training.train(name, on("one", "")), training.train(name, on("mesh", "data=8"))
    for a, b in zip(
        jax.tree.leaves(alone.members.agents.params), jax.tree.leaves(many.members.agents.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    observation = many.members.agents.interaction.observation
    assert {shard.data.shape for shard in observation.addressable_shards} == {(2, 1, 4)}
    assert many.summary["config"]["mesh"] == "data=8"
    written = many.folder / "config.json"
    written.write_text(written.read_text().replace('"data=8"', '"data=16"'))  # of more devices than there are here
    results = training.evaluate(many.folder, episodes=2)
    assert [member["seed"] for member, _ in results] == [0, 1]
    onward = training.train(name, on("mesh", "", env_steps=192), resume=True)
    rest = training.train(name, on("one", "auto", env_steps=192), resume=True)
    pair = [jax.tree.leaves(outcome.members.agents.params) for outcome in (onward, rest)]
    assert [len(leaves[0].sharding.device_set) for leaves in pair] == [1, 8]
    for a, b in zip(*pair, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("mesh", "envs", "fault"),
    [
        ("fsdp=8", 8, "mesh 'fsdp=8' has devices on fsdp; agents divide .* 'data' alone: --mesh data=8"),
        ("data=2,tensor=4", 8, "has devices on tensor"),
        ("data=3", 8, "3 places for 8 devices"),
        ("data=8", 12, "envs is 12, expected a multiple of the 8 devices of axis 'data'"),
    ],
)
def test_meshes_that_agents_do_not_run_on(mesh, envs, fault, tmp_path):
    with pytest.raises(ValueError, match=fault):
        training.train("ppo", small(tmp_path / "never", mesh=mesh, agent=dataclasses.replace(SMALL, envs=envs)))
    assert not (tmp_path / "never").exists()


def test_a_longer_run_goes_on_where_the_shorter_one_ended(tmp_path):
    """In rounds of the same length, whatever the flags; what does not fit leaves the folder as it was."""
    out = tmp_path / "run"
    training.train("ppo", small(out, env_steps=32))
    before = (out / "config.json").read_text()
    for changes, fault in (
        ({"round_steps": 16}, "rounds of .* have 32 environment steps"),
        ({"agent": dataclasses.replace(SMALL, hidden=(4,))}, "does not fit this configuration"),
    ):
        with pytest.raises(ValueError, match=fault):
            training.train("ppo", small(out, env_steps=64, **changes), resume=True)
    assert (out / "config.json").read_text() == before
    longer = training.train("ppo", small(out, env_steps=64), resume=True)
    assert longer.summary["env_steps"] == 64 and int(longer.members.step) == 2
    assert [row["step"] for row in metrics.read(out / "metrics.jsonl")] == [32, 64]


def test_annealing_over_the_whole_run():
    run = small("x", env_steps=100, agent=dataclasses.replace(SMALL, anneal=-1))
    seen = []
    keep = lambda config, env: (seen.append(config.anneal), ppo.make(config, env))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "find", lambda name: catalogue.Entry(ppo.PPOConfig, keep))
        _, rounds = training.gather("ppo", run, training.members_of(run))
    assert rounds == 4 and seen[-1] == 8  # 4 rounds of 2 updates of 16 steps


def test_the_settings_are_those_of_the_environment(tmp_path):
    """Wherever it is named: as a flag, in a file, in a folder."""
    (tmp_path / "run.toml").write_text('env = "Pendulum-v1"')
    assert commands.value(["--config", str(tmp_path / "run.toml")], "--env") == "Pendulum-v1"
    assert commands.value(["--env", "Catch", "--config", str(tmp_path / "run.toml")], "--env") == "Catch"
    assert training.options("ppo", "Pendulum-v1").agent != training.options("ppo", "CartPole-v1").agent


def test_evaluation_and_films_keep_to_allowed_actions():
    env = envs.make("MaskedChoice")
    chosen = []

    def act(params, observation, memory, key, mask):
        action = jax.numpy.argmax(mask)
        jax.debug.callback(lambda ok: chosen.append(bool(ok)), mask[action])
        return action.astype(jax.numpy.int32), memory

    agent = ppo.make(SMALL, env)._replace(act=act)
    result = evaluate(agent, env, None, jax.random.key(0), episodes=3)
    film.record(agent, env, None, jax.random.key(0), steps=10)
    jax.effects_barrier()
    assert len(chosen) >= 30 and all(chosen) and (result.lengths == 10).all()


def test_evaluation_opens_the_folder(finished):
    results = training.evaluate(finished.folder, episodes=3)
    assert [member["seed"] for member, _ in results] == [5, 6, 5, 6]
    assert all(returns.shape == (3,) and (returns > 0).all() for _, returns in results)


@pytest.mark.parametrize("ending", ["gif", "png"])
def test_film(finished, tmp_path, ending):
    image = pytest.importorskip("PIL.Image")
    path = training.make_film(finished.folder, tmp_path / f"film.{ending}", member=1, steps=20)
    with image.open(path) as picture:
        assert getattr(picture, "n_frames", 1) > 5 if ending == "gif" else picture.width == 4 * (480 + 4)


def test_a_film_ends_with_the_episode():
    env = envs.make("CartPole-v1")
    agent = ppo.make(SMALL, env)._replace(act=lambda params, observation, memory, key: (jax.numpy.int32(1), ()))
    assert 5 < len(film.record(agent, env, None, jax.random.key(0), steps=60)) < 20  # always right falls soon


def test_what_cannot_be_filmed(finished, tmp_path):
    with pytest.raises(ValueError, match=r"expected \.gif or \.png"):
        training.make_film(finished.folder, tmp_path / "film.mp4", steps=2)
    with pytest.raises(ValueError, match="members 0 to 3"):
        training.make_film(finished.folder, tmp_path / "film.gif", member=4)
    with pytest.raises(ValueError, match="nothing to film"):
        film.record(
            ppo.make(SMALL, envs.make("CartPole-v1")), envs.make("CartPole-v1")._replace(render=None), None, None
        )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"grid": ("learning_rat=1",)}, "'learning_rat' cannot vary inside one program; .* learning_rate, discount"),
        ({"grid": ("epochs=1,2",)}, "'epochs' cannot vary"),
        ({"grid": ("lr",)}, "grid 'lr' is not of the form learning_rate=1e-3,3e-4"),
        ({"env": "CartPol"}, "did you mean 'CartPole-v1'"),
        ({"seeds": 0}, "seeds is 0"),
        ({"grid": ("seed=1,2",)}, "seeds are not part of the grid"),
        ({"grid": ("entropy=0.0", "entropy=0.1")}, "grid names 'entropy' twice"),
        ({"agent": dataclasses.replace(SMALL, minibatches=3)}, "minibatches is 3"),
    ],
)
def test_what_cannot_serve_is_refused_before_anything_is_written(changes, fault, tmp_path):
    with pytest.raises(ValueError, match=fault):
        training.train("ppo", small(tmp_path / "never", **changes))
    assert not (tmp_path / "never").exists()


def test_the_command_line_names_every_agent():
    assert {name: text for name, (_, text) in catalogue.AGENTS.items()} == cli.AGENTS
    for name in catalogue.AGENTS:
        assert dataclasses.is_dataclass(catalogue.find(name).config)
    with pytest.raises(ValueError, match="did you mean 'ppo'"):
        catalogue.find("pqo")


def test_commands(capsys, tmp_path):
    run = ["--out", str(tmp_path / "a"), "--env-steps", "32", "--round-steps", "16", "--episodes", "2"]
    own = ["--agent.envs", "2", "--agent.steps", "8", "--agent.minibatches", "1", "--agent.epochs", "1"]
    assert cli.main(["train", "ppo", *run, *own]) == 0
    out = capsys.readouterr().out
    assert "no episode ended yet" in out  # in 8 steps of 2 environments
    assert f"jaxrl film {tmp_path}/a" in out and f"--resume {tmp_path}/a --env-steps 64" in out
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["env_steps"] == 32
    assert cli.main(["eval", str(tmp_path / "a"), "--episodes", "2"]) == 0
    assert "seed 0: return" in capsys.readouterr().out
    assert cli.main(["eval", str(tmp_path / "a"), "--data", "x.jsonl"]) == 2
    assert "is for language models" in capsys.readouterr().err
    assert cli.main(["sweep", "pqo"]) == 2
    assert "did you mean 'ppo'" in capsys.readouterr().err
    assert cli.main(["envs"]) == 0
    assert "CartPole-v1" in capsys.readouterr().out
