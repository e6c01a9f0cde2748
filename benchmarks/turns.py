"""Runs scripts in turn, each in its own process on one core, and reads the JSON line each prints last; standard library
only."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def cores() -> set[int]:
    """The last core this process may use, where the system lets a process be bound to it; else nothing."""
    return {max(os.sched_getaffinity(0))} if hasattr(os, "sched_getaffinity") else set()


def measure(command: list[str], *, environment: dict[str, str], cores: set[int]) -> dict:
    """The JSON line of one run on these cores (none: wherever it likes)."""
    pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, preexec_fn=pin)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def about(**more) -> dict:
    """The machine, for the head of a results file."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": f"{names[0]}, {len(names)} cores" if names else platform.processor(),
        "python": platform.python_version(),
        "load_after": os.getloadavg() if hasattr(os, "getloadavg") else None,
        **more,
    }


def write(out: Path, about: dict, results: list[dict], table: str) -> None:
    """`out`.json and `out`.md, and the table on the terminal."""
    out.with_suffix(".json").write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    out.with_suffix(".md").write_text(table + "\n")
    print(table)
