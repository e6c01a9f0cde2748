"""The other end of `isolate.isolated`: a process that loads one function of one file and answers calls.

Run by path, so that it imports nothing but the standard library and the file. Calls come as pickles on the standard
input; each answer is one line of JSON, of which nothing can be run in the process that asked.
"""

import importlib.util
import json
import os
import pickle
import sys
from typing import Any

_guarded = False
_generated: tuple[bytes, ...] = ()


def main() -> None:
    """Answers pickled calls on the standard input by JSON lines, until it ends."""
    global _guarded, _generated
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints goes to the standard error
    try:
        module, function = _load(settings["file"], settings["name"])
        if not settings["evaluation"]:
            _generated = getattr(module, "GENERATED", ())
            sys.addaudithook(_refuse)
        _limit_memory(settings["memory_gb"])
        getattr(module, "prepare", lambda: None)()
    except Exception as error:
        return _answer(answers, {"error": f"{type(error).__name__}: {error}"})
    _answer(answers, {"ready": True})
    while True:
        try:
            inputs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        _guarded = True
        try:
            answer = {"values": [_plain(value) for value in function(**inputs)]}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        _guarded = False
        _answer(answers, answer)


def _load(file: str, name: str) -> tuple[Any, Any]:
    spec = importlib.util.spec_from_file_location("isolated_reward", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    function: Any = getattr(module, name, None)
    if not callable(function):
        found = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(f"no function {name!r} in {file}; found {', '.join(found) or 'none'}")
    return module, function


def _refuse(event: str, args: tuple) -> None:
    """eval, exec and compile of text end here while a call is answered; files are compiled under their own names."""
    if event == "compile" and _guarded and args[0] is not None and args[1] in ("<string>", "<unknown>", None):
        code = args[0].encode() if isinstance(args[0], str) else bytes(args[0])
        if not code.startswith(_generated):
            raise RuntimeError("evaluation of text is switched off here")


def _limit_memory(gigabytes: float | None) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    if gigabytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 1e9), resource.getrlimit(resource.RLIMIT_AS)[1]))


def _plain(value):
    return value if value is None or isinstance(value, str) else float(value)


def _answer(stream, answer) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
