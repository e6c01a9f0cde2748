"""Calling a Python reward on a rollout."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl.parallel import processes
from jaxrl.posttrain.rewards.combine import call_async, numbers
from jaxrl.types import Finish, Rollout

Reward = Callable[..., Sequence[float | None]]


class Scored(NamedTuple):
    """`values`: `[B]` float32, NaN where the reward returned None; `metrics` of a combined reward's parts."""

    values: np.ndarray
    metrics: dict[str, float]


def host_rewards(reward: Callable, completions: Any, rows: Any) -> Scored:
    """What `reward(completions on the host, rows)` gives, called on process 0 and known to all.

    Args:
      reward: gives `Scored`, or `[B]` numbers alone.
      completions, rows: pytrees of arrays, wherever they lie.
    """
    given = processes.fetch((completions, rows))

    def call():
        found = reward(*given)
        found = found if isinstance(found, Scored) else Scored(found, {})
        return np.asarray(found.values, np.float32).tolist(), {k: float(v) for k, v in found.metrics.items()}

    values, metrics = processes.on_main(call)
    return Scored(np.asarray(values, np.float32), metrics)


def score(
    reward: Reward,
    rollout: Rollout,
    tokenizer,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence],
    *,
    samples: int,
) -> np.ndarray:
    """The values of `score_parts` alone, `[B]` float32, NaN where the reward returned None."""
    return score_parts(reward, rollout, tokenizer, prompts, columns, samples=samples).values


def score_parts(
    reward: Reward,
    rollout: Rollout,
    tokenizer,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence],
    *,
    samples: int,
) -> Scored:
    """Calls a Python reward on a rollout, and waits for it if it is async.

    Args:
      reward: keyword-only, see `jaxrl.posttrain.rewards`.
      rollout: `B` completions of `B / samples` prompts.
      tokenizer: decodes the completions.
      prompts: `B / samples` prompt texts; repeated for the reward, as are the columns.
      columns: the data's further columns, passed by name.
      samples: completions for each prompt.

    Returns:
      Values, and what a combined reward reports of its parts.

    Raises:
      ValueError: when the reward returns another number of values, or something that is no finite number.
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
    inputs: dict[str, Any] = {
        "prompts": repeated(prompts),
        "completions": [tokenizer.decode(row) for row in ids],
        "completion_ids": ids,
        "lengths": np.asarray(rollout.lengths).tolist(),
        "finish_reasons": [Finish(reason).name.lower() for reason in finish],
        **{name: repeated(column) for name, column in columns.items()},
    }
    answer = call_async(reward, inputs)
    values = numbers(answer, len(ids), name=getattr(reward, "__name__", "the reward"))
    return Scored(values.astype(np.float32), getattr(answer, "metrics", {}))
