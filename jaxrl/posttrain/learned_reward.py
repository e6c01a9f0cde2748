"""A trained reward model as a Python reward, alone or where no rule can judge."""

from typing import Any

import jax
import numpy as np

from jaxrl.data.records import encode_prompt, pad
from jaxrl.nets.language_model import language_model
from jaxrl.posttrain import reward_model
from jaxrl.posttrain.rewards import Reward, Scores, combine
from jaxrl.posttrain.rewards.combine import call_async, numbers
from jaxrl.types import TokenBatch

WIDTH = 64  # rows are as wide as a multiple of it, and a power of two in number: few programs


def learned_reward(folder: str) -> Reward:
    """The score of a reward model, read at the last token of each completion, as `reward_model.score_rollout` does.

    Args:
      folder: of `jaxrl train rm`, with the policy's tokenizer.

    Returns:
      A reward. It raises ValueError on completions of another tokenizer.

    Raises:
      ValueError: no reward model in the folder.
      FileNotFoundError: no intact checkpoint yet.
    """
    judge = reward_model.load(folder)

    @jax.jit
    def score(params, batch: TokenBatch):
        width, model = batch.tokens.shape[1], judge.language_model
        if width > judge.transformer.max_length:
            model = language_model(judge.transformer.with_room(width))
        return reward_model.score(model, params, batch)

    def learned(*, prompts, completions, completion_ids, finish_reasons, tools=None, **_) -> list[float]:
        rows = []
        for prompt, text, ids, reason, given in zip(
            prompts, completions, completion_ids, finish_reasons, tools or [None] * len(prompts), strict=True
        ):
            if judge.tokenizer.decode(ids) != text:
                raise ValueError(
                    f"the reward model of {folder} has another tokenizer than the policy: it reads {text!r} as "
                    f"{judge.tokenizer.decode(ids)!r}; train both from one model, or with one --tokenizer"
                )
            asked = encode_prompt({"prompt": prompt} | ({"tools": given} if given else {}), judge.tokenizer)
            rows.append([*asked, *ids, *([judge.tokenizer.eos_id] if reason == "eos" else [])])
        if not rows:
            return []
        number, longest = len(rows), max(map(len, rows))
        rows += rows[:1] * ((1 << (number - 1).bit_length()) - number)
        tokens, lengths = pad(rows, judge.tokenizer, -(-longest // WIDTH) * WIDTH, left=False)
        last = np.arange(tokens.shape[1])[None] == lengths[:, None] - 1
        batch = TokenBatch(tokens, last.astype(np.float32))  # pyright: ignore  (numpy for JAX)
        return np.asarray(score(judge.params, batch))[:number].tolist()

    return learned


def where_answered(rules: Reward, otherwise: Reward) -> Reward:
    """`rules` for problems that have an `answer`, `otherwise` for all else (DeepSeek-R1, arXiv 2501.12948, 2.3.4:
    rule-based rewards for reasoning, reward models for general data).

    Both are called in each step, with empty lists where there is nothing for them. Reports `rewards/rules/*` and
    `rewards/otherwise/*`.
    """
    parts = {"rules": _on(rules, answered=True), "otherwise": _on(otherwise, answered=False)}
    return combine(parts, strict=True)


def _on(reward: Reward, *, answered: bool) -> Reward:
    """The reward of the completions whose problem has an answer, or has none; None for the others."""

    def part(**inputs: Any) -> Scores:
        count = len(inputs["completions"])
        inputs.setdefault("answer", [None] * count)
        rows = [i for i, answer in enumerate(inputs["answer"]) if (answer is not None) == answered]
        given = call_async(reward, {name: [column[i] for i in rows] for name, column in inputs.items()})
        values = np.full(count, np.nan)
        values[rows] = numbers(given, len(rows), name=getattr(reward, "__name__", "the reward"))
        known = [None if np.isnan(value) else float(value) for value in values]
        return Scores(known, getattr(given, "metrics", {}))

    return part
