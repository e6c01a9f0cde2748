"""Python rewards: loading one from a file and calling it on a rollout."""

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxrl.types import Finish, Rollout

Reward = Callable[..., Sequence[float | None]]


def load_reward(spec: str) -> Reward:
    """Loads `path/to/file.py:function` (or the function `reward` of `path/to/file.py`).

    The file is the user's own code and is executed; model output never is.

    Raises:
      ValueError: when the file or the function is missing; the message lists the functions found.
    """
    path, _, name = spec.partition(":")
    name = name or "reward"
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"reward {spec!r}: {path!r} is not a Python file; expected path/to/rewards.py:function")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules.setdefault(module.__name__, module)  # where the file's dataclasses look for it
    module_spec.loader.exec_module(module)
    function: Any = getattr(module, name, None)
    if not callable(function):
        found = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(f"reward {spec!r}: no function {name!r} in {path}; found {', '.join(found) or 'none'}")
    return cast(Reward, function)


def score(
    reward: Reward,
    rollout: Rollout,
    tokenizer,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence],
    *,
    samples: int,
) -> np.ndarray:
    """Calls a Python reward on a rollout.

    Args:
      reward: keyword-only, see `jaxrl.posttrain.rewards`.
      rollout: `B` completions of `B / samples` prompts.
      tokenizer: decodes the completions.
      prompts: `B / samples` prompt texts; repeated for the reward, as are the columns.
      columns: the data's further columns, passed by name.
      samples: completions for each prompt.

    Returns:
      `[B]` float32; NaN where the reward returned None.

    Raises:
      ValueError: when the reward returns another number of values, or something that is no number.
    """
    finish = np.asarray(rollout.finish)
    ids = [
        row[: length - (reason == Finish.EOS)].tolist()
        for row, length, reason in zip(
            np.asarray(rollout.completions), np.asarray(rollout.lengths), finish, strict=True
        )
    ]
    repeated = lambda values: [value for value in values for _ in range(samples)]
    taken = {"prompts", "completions", "completion_ids", "lengths", "finish_reasons"} & columns.keys()
    if taken:
        raise ValueError(f"the data has a column {taken.pop()!r}, a name that rewards get from the sampler; rename it")
    values = reward(
        prompts=repeated(prompts),
        completions=[tokenizer.decode(row) for row in ids],
        completion_ids=ids,
        lengths=np.asarray(rollout.lengths).tolist(),
        finish_reasons=[Finish(reason).name.lower() for reason in finish],
        **{name: repeated(column) for name, column in columns.items()},
    )
    name = getattr(reward, "__name__", "the reward")
    if not hasattr(values, "__len__") or len(values) != len(ids):
        found = f"{len(values)} values" if hasattr(values, "__len__") else type(values).__name__
        raise ValueError(
            f"{name} returned {found} for {len(ids)} completions; return one number (or None) for each completion"
        )
    try:
        return np.asarray([math.nan if value is None else float(value) for value in values], np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} returned something that is no number: {error}") from error
