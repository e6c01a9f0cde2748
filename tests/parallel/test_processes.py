"""Two real processes are one program: values, errors, batches, training, checkpoints, and the ways to start them."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxrl import checkpoint
from jaxrl.parallel import processes
from tests.parallel import launch, worker


def said(text: str) -> dict:
    return json.loads(next(line for line in text.splitlines() if line.startswith("="))[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def both(folder):
    """What two processes of four devices saw."""
    return [said(text) for text in launch.run(folder, *launch.WORKER, "together", str(folder / "saved"))]


def test_they_know_each_other(both):
    assert [(one["index"], one["count"], one["devices"]) for one in both] == [(0, 2, 8), (1, 2, 8)]
    for one in both:
        assert one["gathered"] == [[0, 1], [1, 1]]
        assert one["from main"] == {"index": 0, "text": "x" * 5000}


def test_an_error_of_process_0_is_that_of_all(both):
    assert {one["on_main"] for one in both} == {"FileNotFoundError: nothing here, says 0"}
    for one in both:
        assert one["same"].startswith("ValueError: process 1 has other hat than process 0")


def test_values_of_the_hosts_go_to_all_devices(both):
    assert [one["own shards"] for one in both] == [[0, 2, 4, 6], [8, 10, 12, 14]]  # and to no other process's
    for one in both:
        assert one["fetched"] == list(range(16))
        assert one["drawn"] == float(jax.random.uniform(jax.random.key(3)))


def test_each_process_reads_its_own_rows(both):
    assert both[0]["batch"] == both[1]["batch"] == both[0]["mine"] + both[1]["mine"]
    assert len(set(both[0]["batch"])) == 16


def test_training_and_checkpoints_are_those_of_one_process(both, folder):
    """float32, sums in another order: within 1e-5."""
    assert both[0]["losses"] == both[1]["losses"] and both[0]["onwards"] == both[1]["onwards"]
    _, losses = worker.train("fsdp=8", 6)
    np.testing.assert_allclose(both[0]["losses"] + both[0]["onwards"], losses, rtol=1e-5)
    assert both[0]["restored"] == pytest.approx(both[0]["total"], rel=1e-6)
    _, like, _, _ = worker.prepare("fsdp=8")
    restored, step = checkpoint.restore(folder / "saved", like)  # two processes -> one
    assert step == 4 and worker.total(restored) == pytest.approx(both[0]["total"], rel=1e-6)


def clean(monkeypatch, **values):
    for name in list(os.environ):
        if name.startswith(("JAX_", "SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JOB_")) and name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip
PLAIN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "given", "found"),
    [
        ({}, {}, None),
        (SLURM, {}, ("node3", 2, 1)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, ("node3", 1, 0)),
        (OMPI, {}, ("10.96.0.1", 4, 2)),
        ({name: OMPI[name] for name in list(OMPI)[1:]}, {"coordinator": "a:1"}, ("a:1", 4, 2)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, {}, None),
        (PLAIN, {}, ("10.0.0.1:8476", 2, 1)),
        (SLURM | PLAIN, {}, ("10.0.0.1:8476", 2, 1)),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, {}, None),
        ({}, {"coordinator": "a:1", "processes": 3, "process": 2}, ("a:1", 3, 2)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}, None),
    ],
)
def test_who_started_this(environment, given, found, monkeypatch):
    clean(monkeypatch, **environment)
    given = {"coordinator": None, "processes": None, "process": None, **given}
    values = processes._found(**given, timeout=1)
    assert (values and values[:3]) == found or (values[0].rpartition(":")[0], *values[1:3]) == found  # a port of JAX's


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"JAX_NUM_PROCESSES": "2"},
            "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not set.*JAX_COORDINATOR_ADDRESS=HOST0",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, "JAX_COORDINATOR_ADDRESS not set;"),
        (PLAIN | {"JAX_PROCESS_ID": "2"}, "process 2 of 2; expected a number from 0 to 1"),
        (PLAIN | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; expected a number"),
        (PLAIN | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "'10.0.0.1'; expected host:port"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(environment, message, monkeypatch):
    clean(monkeypatch, **environment)
    with pytest.raises(ValueError, match="(?s)" + message):
        processes.initialise()


def test_one_process_is_no_group(monkeypatch):
    clean(monkeypatch)
    assert processes.initialise() == (0, 1) and processes.is_main() and processes.count() == 1
    assert processes.on_main(lambda: 3) == 3
    with pytest.raises(ValueError, match="1 processes were started, expected 4"):
        processes.initialise(expected=4)


def test_a_backend_that_was_queried_is_refused(monkeypatch):
    clean(monkeypatch, **PLAIN)
    with pytest.raises(RuntimeError, match="process 1 of 2 .*expected to be called first.*right after the imports"):
        processes.initialise()


def test_whoever_waits_in_vain_is_told_what_to_run(tmp_path):
    environment = {
        **os.environ, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{launch.free_port()}", "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1", "JAXRL_TIMEOUT": "1",
    }  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-m", "jaxrl.cli", "train", "sft", "--out", str(tmp_path)], env=environment,
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert out.returncode == 1, out.stderr
    assert "not all of 2 processes came to 127.0.0.1:" in out.stderr and "within 1 s; this is process 1" in out.stderr
    for i in range(2):
        assert f"JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={i} jaxrl train sft --out {tmp_path}" in out.stderr
