"""Tasks of the package `reasoning-gym` as records: prompts whose answers the task itself can score.

    rows = reasoning_records("leg_counting", count=500, seed=0, max_animals=5)
    reward = rewards.combine({"right": rewards.reasoning_reward(), "format": (rewards.format_reward(), 0.2)})

Some scorers read an answer by evaluating it as Python. Those tasks are refused: what a model wrote is never evaluated.
"""

import difflib
import functools
import importlib
import json
import types
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrl.data.sources import Record

INSTRUCTION = "Think first, then write the final answer between <answer> and </answer>."

_EVALUATES = {"eval", "exec", "compile", "__import__", "sympy", "sympify", "parse_expr"}


def reasoning_tasks() -> list[str]:
    """Names of the tasks that can be used, sorted. Raises ValueError if reasoning-gym is not installed."""
    return [name for name in sorted(_datasets()) if name != "composite" and _evaluates(name) is None]


def reasoning_records(
    task: str, *, count: int, seed: int = 0, instruction: str = INSTRUCTION, **options: Any
) -> list[Record]:
    """Problems of one task, made by reasoning-gym; the same arguments make the same problems.

    A few tasks iterate over sets of text and are the same only under one PYTHONHASHSEED. Write records that must last
    to a file: they are plain JSON.

    Args:
      task: a name of `reasoning_tasks()`.
      count: problems.
      seed: of the generator.
      instruction: put after the question, two lines below; empty leaves it out.
      options: the task's own, such as the range of its difficulty.

    Returns:
      Records of `prompt`, `answer` (text; empty where a task has no single one), `task`, `options` and `metadata`,
      which the reward `reasoning` reads.

    Raises:
      ValueError: reasoning-gym is not installed; an unknown task or option, with the nearest name; options that the
        task refuses; a task whose scorer evaluates answers; or a count below 1.
    """
    if count < 1:
        raise ValueError(f"reasoning: count is {count}; expected at least 1 problem")
    if "size" in options:
        raise ValueError(f"reasoning: size is {options['size']}; expected the number of problems as count")
    dataset = _dataset(task, _json({**options, "seed": seed, "size": count}))
    ending = f"\n\n{instruction}" if instruction else ""
    return [
        {
            "prompt": f"{entry['question']}{ending}",
            "answer": "" if entry["answer"] is None else str(entry["answer"]),
            "task": task,
            "options": options,
            "metadata": entry["metadata"],
        }
        for entry in (dataset[i] for i in range(count))
    ]


def score_answer(given: str, *, answer: str, task: str, options: dict[str, Any] | None, metadata: Any) -> float:
    """The score that a task gives to an answer to one of its records, mostly in [0, 1], part marks included.

    An answer that the scorer cannot read scores 0. The other arguments are the record's columns.

    Raises:
      ValueError: as `reasoning_records`; or for a record whose own answer its task does not accept, such as one of
        `arc_agi` that went through JSON, which knows no tuples.
    """
    dataset = _dataset(task, _json(options or {}))
    entry = {"question": "", "answer": answer or None, "metadata": metadata}
    _check_entry(task, dataset, entry)
    return _score(dataset, given, entry)


def _json(options: dict[str, Any]) -> str:
    try:
        return json.dumps(options, sort_keys=True)
    except TypeError as error:
        raise ValueError(
            f"reasoning: options {options} are no JSON ({error}); expected numbers, texts, lists"
        ) from None


def _score(dataset: Any, given: str, entry: dict[str, Any]) -> float:
    try:
        return float(dataset.score_answer(given, entry))
    except Exception:  # scorers differ in what they take; an answer that none can read is wrong
        return 0.0


def _check_entry(task: str, dataset: Any, entry: dict[str, Any]) -> None:
    """Once for each task and process: its own answer is right."""
    if entry["answer"] is None or getattr(dataset, "_own_answer_is_right", False):
        return
    if _score(dataset, entry["answer"], entry) < 1.0:
        raise ValueError(
            f"task {task!r} does not accept the answer {entry['answer']!r} of its own record; expected a record of "
            "reasoning_records as it was made. Was it changed, or written as JSON, which has no tuples?"
        )
    dataset._own_answer_is_right = True


def _datasets() -> dict[str, tuple[type, type]]:
    try:
        return importlib.import_module("reasoning_gym.factory").DATASETS if _gym() else {}
    except ImportError as error:
        raise ValueError(f"reasoning-gym cannot be imported ({error}): pip install 'jaxrl[reasoning]'") from error


@functools.cache
def _gym() -> types.ModuleType:
    return importlib.import_module("reasoning_gym")


@functools.lru_cache(maxsize=64)
def _dataset(task: str, options: str) -> Any:
    """The generator of a task, with options as JSON so that they can be looked up."""
    datasets, given = _datasets(), json.loads(options)
    if task not in datasets or task == "composite":
        near = difflib.get_close_matches(task, datasets.keys() - {"composite"}, n=3)
        raise ValueError(
            f"reasoning-gym has no task {task!r}; "
            f"{'did you mean ' + ' or '.join(near) + '?' if near else 'reasoning_tasks() lists them'}"
        )
    path = _evaluates(task)
    if path is not None:
        raise ValueError(
            f"task {task!r}: its scorer ({path}) evaluates answers, and what a model wrote is never evaluated; "
            "expected a task of reasoning_tasks(), or score its answers with a reward of your own"
        )
    config = datasets[task][1]
    known = sorted(config.__dataclass_fields__)
    unknown = sorted(set(given) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
        raise ValueError(f"task {task!r} has no option {unknown[0]!r}; {hint}")
    try:
        return _gym().create_dataset(task, **given)
    except Exception as error:
        raise ValueError(f"task {task!r} refuses the options {given}: {type(error).__name__}: {error}") from error


@functools.cache
def _evaluates(task: str) -> str | None:
    """How a task's scorer reaches eval, exec, compile or SymPy, which evaluates texts; None if it does not.

    Followed is every function, method and class of reasoning-gym whose name stands in the code, whether called or not.
    """
    dataset = _datasets()[task][0]
    seen: set[types.FunctionType] = set()

    def search(function: types.FunctionType) -> str | None:
        if function in seen:
            return None
        seen.add(function)
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if name in _EVALUATES and value is None or _module(value).partition(".")[0] == "sympy":
                return f"{function.__qualname__}: {name}"
            for inner in (*_functions(value), *_functions(getattr(dataset, name, None))):
                found = search(inner)
                if found:
                    return found
        return None

    return search(dataset.score_answer)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _module(value: Any) -> str:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "")
    return name if isinstance(name, str) else ""


def _functions(value: Any) -> Sequence[types.FunctionType]:
    values = vars(value).values() if isinstance(value, type) else [value]
    values = [getattr(v, "__func__", v) for v in values]
    return [v for v in values if isinstance(v, types.FunctionType) and v.__module__.startswith("reasoning_gym")]
