"""The command line: `jaxrl COMMAND ...` finds the command, joins the processes of a run, and says how it ended."""

import difflib
import os
import shlex
import sys
import warnings
from collections.abc import Sequence

import jaxrl
from jaxrl import supervise
from jaxrl.commands import AGENTS as AGENTS
from jaxrl.commands import COMMANDS, SHARED
from jaxrl.commands import MODELS as MODELS
from jaxrl.config import take

GROUPS = {name.split()[0] for name in COMMANDS if " " in name}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 (the run failed), 2 (usage) or 130 (interrupted).

    A run that is told to stop (SIGTERM) saves and raises `SystemExit` with status 75.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv in (["--version"], ["-V"]):
        print(f"jaxrl {jaxrl.__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    names = [name for name in COMMANDS if name.split() == argv[: len(name.split())]]
    if not names:
        given = " ".join(argv[: 2 if argv[0] in GROUPS else 1])
        near = difflib.get_close_matches(given, COMMANDS, n=1)
        hint = f"did you mean 'jaxrl {near[0]}'?" if near else "see 'jaxrl --help'"
        if argv[0] in GROUPS and len(argv) == 1 or argv[1:2] in (["-h"], ["--help"]):
            print(_usage())
            return 0 if len(argv) > 1 else 2
        print(f"jaxrl: no command {given!r}; {hint}", file=sys.stderr)
        return 2
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("NPROC", "64")  # XLA's threads: with fewer, devices that all wait leave none to go on
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(caches, "jaxrl"))  # compile once, not in each run
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    command, _ = COMMANDS[names[0]]
    joins = argv[0] == "train" and not {"-h", "--help"} & set(argv)
    if joins and supervise.is_due():
        folder = take(argv, "--resume")[0] or take(argv, "--out")[0] or "FOLDER"
        words = [sys.executable, "-m", "jaxrl.cli", *argv]
        return supervise.supervise(words, again=f"jaxrl {names[0]} --resume {shlex.quote(folder)}")
    try:
        if joins:
            supervise.follow()
            _join(names[0])
        command(argv[len(names[0].split()) :])
    except (ValueError, FileNotFoundError, FloatingPointError, TimeoutError) as error:
        print(f"jaxrl {names[0]}: {error}", file=sys.stderr)
        return _ended(str(error), 2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        return _ended("interrupted", 130)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _ended("nobody reads its output any more", 0)
    return 0


def _join(name: str) -> None:
    """Joins the other processes of a run, where the environment speaks of some."""
    from jaxrl.parallel import processes

    seconds = lambda name, default: float(os.environ.get(name, "") or default)
    count = processes.initialise(
        timeout=seconds("JAXRL_TIMEOUT", processes.TIMEOUT), heartbeat=seconds("JAXRL_HEARTBEAT", processes.HEARTBEAT)
    ).count
    if count > 1 and name.removeprefix("train ") not in SHARED:
        raise ValueError(
            f"this command runs in one process, and {count} were started; start one (--mesh takes all its devices), or "
            f"train one of {', '.join(SHARED)}"
        )


def _several() -> bool:
    """Whether this process has joined others; does not wait for JAX."""
    processes = sys.modules.get("jaxrl.parallel.processes")
    return processes is not None and processes.count() > 1


def _ended(message: str, status: int) -> int:
    """The exit status; the other processes of the run are told of the error first."""
    if _several():
        from jaxrl.parallel import faults

        faults.fail(message, status)
    return status


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  jaxrl {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "jaxrl: reinforcement learning and language-model post-training as pure functions in JAX",
            "",
            *lines,
            "",
            "'jaxrl COMMAND --help' lists a command's flags; '--config file.toml' fills them from a file.",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
