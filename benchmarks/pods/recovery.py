"""How long a run of two processes takes to notice a loss and to go on: `python benchmarks/pods/recovery.py`.

Two processes of `jaxrl train sft`, four fake CPU devices each, on one machine. One is killed or stopped while both
train; then both are started again. Writes results.json and results.md beside this file; ten minutes on two busy cores.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxrl import checkpoint, metrics, runs

HERE = Path(__file__).parent
HEARTBEAT = 10.0
CASES = [(1, "SIGKILL"), (0, "SIGKILL"), (1, "SIGSTOP"), (0, "SIGSTOP")]
REPEATS = 2
FLAGS = [
    *("train", "sft", "--tokenizer", "char:0123456789=", "--held-out", "16", "--chunk", "10", "--max-tokens", "4"),
    *("--steps", "1000000", "--save-every", "50", "--eval-every", "0", "--mesh", "fsdp=8", "--sft.batch", "16"),
    *(
        "--model.width",
        "64",
        "--model.layers",
        "2",
        "--model.heads",
        "4",
        "--model.kv-heads",
        "4",
        "--model.ffn",
        "256",
    ),
]


def start(folder: Path, out: Path, *words: str, supervised: bool) -> list[subprocess.Popen]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    group = []
    for i in range(2):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAXRL_HEARTBEAT": str(HEARTBEAT),
        }
        if not supervised:  # a parent would be stopped in the child's place
            environment["JAXRL_PARENT"] = str(os.getpid())
        command = [sys.executable, "-m", "jaxrl.cli", *FLAGS, *words]
        with (folder / f"output{i}").open("w") as file:
            group.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    return group


def rows(out: Path) -> int:
    """The last step that was reported."""
    file = out / "metrics.jsonl"
    return max((row["step"] for row in metrics.read(file)), default=0) if file.exists() else 0


def until(group: list[subprocess.Popen], condition) -> float:
    begun = time.perf_counter()
    while not condition():
        assert all(process.poll() is None for process in group), "a process ended by itself"
        time.sleep(0.01)
    return time.perf_counter() - begun


def measure(victim: int, name: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data, out = folder / "digits.jsonl", folder / "run"
        records = [{"prompt": f"{a}=", "completion": str(a % 10), "answer": str(a % 10)} for a in range(100, 200)]
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        given = ["--data", str(data)]
        group = start(folder, out, *given, "--out", str(out), supervised=name == "SIGKILL")
        first = until(group, lambda: rows(out) > 0)
        until(group, lambda: checkpoint.steps(out / "checkpoints") and rows(out) % 50 > 20)
        begun = time.perf_counter()
        group[victim].send_signal(getattr(signal, name))
        group[1 - victim].wait()
        noticed = time.perf_counter() - begun
        group[victim].kill()
        group[victim].wait()
        reached, saved = rows(out), checkpoint.steps(out / "checkpoints")[-1]
        group = start(folder, out, *given, "--resume", str(out), supervised=True)
        again = until(group, lambda: rows(out) > reached)
        for process in group:
            process.send_signal(signal.SIGTERM)
        begun = time.perf_counter()
        statuses = [process.wait() for process in group]
        assert statuses == [75, 75], statuses
        return {
            "victim": victim, "signal": name, "first_step": first, "noticed": noticed, "restarted": again,
            "steps_done_again": reached - saved, "told_to_stop": time.perf_counter() - begun,
        }  # fmt: skip


def main() -> None:
    measured = []
    for victim, name in CASES:
        for _ in range(REPEATS):
            measured.append(measure(victim, name))
            print(measured[-1], flush=True)
    about = {"heartbeat": HEARTBEAT, "load": os.getloadavg(), **runs.environment()}
    runs.write_json(HERE / "results.json", {"about": about, "rows": measured})
    lines = [
        f"Two processes, four fake CPU devices each; heartbeat {HEARTBEAT:g} s; {os.cpu_count()} cores, load "
        f"{about['load'][0]:.1f} at the end; medians (and ranges) of {REPEATS}, seconds.",
        "",
        "| what happens to | the other ends after | started again, first new step after | steps done again |",
        "|---|---|---|---|",
    ]
    for victim, name in CASES:
        these = [row for row in measured if (row["victim"], row["signal"]) == (victim, name)]
        spread = lambda field: [row[field] for row in these]
        cell = lambda x: f"{statistics.median(x):.1f} ({min(x):.1f} to {max(x):.1f})"
        again = statistics.median(spread("steps_done_again"))
        lines.append(
            f"| process {victim}: {name} | {cell(spread('noticed'))} | {cell(spread('restarted'))} | {again:.0f} |"
        )
    every = [row["first_step"] for row in measured], [row["told_to_stop"] for row in measured]
    first, stop = (f"{statistics.median(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in every)
    lines += ["", f"A fresh start, with nothing compiled: first step after {first} s. SIGTERM to the end: {stop} s."]
    (HERE / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
