"""From many samples of a model to records: rejection sampling, and Kimi k1.5's ways from long answers to short ones.

Kimi Team 2025, arXiv 2501.12599, section 2.4. `sample` draws and scores completions; `select` keeps right ones as
records for supervised tuning (R1's rejection sampling, too: DeepSeek-AI 2025, arXiv 2501.12948, section 2.3.3);
`length_pairs` makes preferences of them; `merge` averages the weights of two models. The paper's fourth way is a second
phase of reinforcement learning with a length reward and a smaller budget of tokens: `recipes.KIMI_RUN`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data.sources import Record
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain import rewards, task
from jaxrl.posttrain.rollout import Sampling
from jaxrl.types import Finish

KEEP = ("shortest", "first", "all")


class Samples(NamedTuple):
    """`n` completions of each of `N` problems.

    `records`: the problems. `texts`: `N` lists of `n`. `scores`: `[N, n]`; NaN where a reward gave none, and where the
    completion was cut off or has no text, so that it is neither right nor wrong. `lengths`: `[N, n]` tokens, the EOS
    included.
    """

    records: Sequence[Record]
    texts: list[list[str]]
    scores: np.ndarray
    lengths: np.ndarray


def merge(long: Any, short: Any, weight: float = 0.5) -> Any:
    """A model between two of one form: (1 - weight) long + weight short, leaf by leaf (Kimi k1.5, section 2.4).

    Args:
      long, short: parameter trees.
      weight: of `short`, in [0, 1]; the paper takes 1/2.

    Returns:
      A tree like `long`, in its types; the average is taken in float32.

    Raises:
      ValueError: trees that differ, naming the first leaf that does, or a weight outside [0, 1].
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"merge: weight is {weight}; expected 0 (the long model) to 1 (the short one)")
    shapes = [{jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
              for leaves in map(jax.tree_util.tree_leaves_with_path, (long, short))]  # fmt: skip
    for name in [*shapes[0], *shapes[1]]:
        one, other = (str(shape.get(name, "missing")) for shape in shapes)
        if one != other:
            raise ValueError(
                f"merge: the leaf {name} is {one} in the long model and {other} in the short one; expected two models "
                "of one form, such as a model and what was fine-tuned from it"
            )
    mix = lambda a, b: ((1 - weight) * jnp.asarray(a, jnp.float32) + weight * jnp.asarray(b, jnp.float32)).astype(
        jnp.asarray(a).dtype
    )
    return jax.tree.map(mix, long, short)


def sample(
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    reward: rewards.Reward,
    key: jax.Array,
    *,
    sampling: Sampling,
    samples: int = 8,
    batch: int = 64,
) -> Samples:
    """Draws and scores completions of problems.

    Args:
      model, params, tokenizer: what is sampled from.
      records: problems with a `prompt` and the columns that the reward reads.
      reward: a Python reward, such as `rewards.load_reward("number")`.
      key: consumed.
      sampling: temperature, filters and the budget of new tokens.
      samples: completions of each problem; the paper takes 8.
      batch: problems decoded at once. One program serves all, the last filled up.

    Raises:
      ValueError: no records, or what `rewards.score_parts` finds wrong with the reward.
    """
    if not records:
        raise ValueError("sample: there are no records; expected at least one problem")
    generate = task.make_generate(model, tokenizer, sampling, samples=samples)
    width = task.prompts_of(list(records), tokenizer).tokens.shape[1]
    texts: list[list[str]] = []
    scores, lengths = [], []
    for start in range(0, len(records), batch):
        rows = list(records[start : start + batch])
        filled = rows + [rows[-1]] * (min(batch, len(records)) - len(rows))
        prompts = task.prompts_of(filled, tokenizer, pad_to=width)
        count = len(rows) * samples
        drawn = jax.device_get(generate(params, prompts, jax.random.fold_in(key, start)))
        drawn = jax.tree.map(lambda x, count=count: x[:count], drawn)
        given = task.score_texts(reward, drawn, rows, tokenizer, samples=samples).values
        written = task.text_of(drawn, tokenizer)
        usable = (drawn.finish != Finish.LENGTH) & np.array([bool(text.strip()) for text in written])
        texts += [written[i : i + samples] for i in range(0, len(written), samples)]
        scores.append(np.where(usable, given, np.nan).reshape(-1, samples))
        lengths.append(drawn.lengths.reshape(-1, samples))
    return Samples(records, texts, np.concatenate(scores), np.concatenate(lengths))


def select(drawn: Samples, *, keep: str = "shortest", solved: float = 1.0) -> tuple[list[Record], int]:
    """Right completions as records for supervised tuning.

    Args:
      drawn: from `sample`.
      keep: which right completions of a problem: shortest (Kimi's shortest rejection sampling; the first of equals),
        first (one at random, as samples are alike), or all (R1; equal texts once).
      solved: score from which on a completion is right.

    Returns:
      `(records with a completion, problems without any right one)`; those problems are left out.

    Raises:
      ValueError: an unknown `keep`.
    """
    if keep not in KEEP:
        raise ValueError(f"select: keep is {keep!r}; expected one of {', '.join(KEEP)}")
    kept: list[Record] = []
    failed = 0
    for record, texts, right, lengths in _problems(drawn, solved):
        failed += not right
        chosen = {"shortest": sorted(right, key=lambda i: lengths[i])[:1], "first": right[:1], "all": right}[keep]
        kept += [{**record, "completion": text} for text in dict.fromkeys(texts[i] for i in chosen)]
    return kept, failed


def length_pairs(
    drawn: Samples, *, ratio: float = 1.5, solved: float = 1.0, shorter_wrong: bool = True
) -> tuple[list[Record], int]:
    """Preferences for DPO: the shortest right completion, before each that is wrong or right but `ratio` times as long.

    Args:
      drawn: from `sample`.
      ratio: how much longer than the chosen one a right completion must be to be rejected.
      solved: score from which on a completion is right; below it is wrong, NaN is neither.
      shorter_wrong: reject wrong completions of any length; False takes the longer ones only, as the paper words it.

    Returns:
      `(records with chosen and rejected, problems that gave no pair)`. A rejected text stands once for a problem.

    Raises:
      ValueError: a ratio below 1.
    """
    if ratio < 1:
        raise ValueError(f"length_pairs: ratio is {ratio}; expected at least 1")
    pairs: list[Record] = []
    failed = 0
    for number, (record, texts, right, lengths) in enumerate(_problems(drawn, solved)):
        best = min(right, key=lambda i: lengths[i], default=None)
        rejected: dict[str, None] = {}
        if best is not None:
            longer = [i for i in right if lengths[i] >= ratio * lengths[best]]
            wrong = [i for i, score in enumerate(drawn.scores[number]) if score < solved]
            wrong = [i for i in wrong if shorter_wrong or lengths[i] > lengths[best]]
            rejected = dict.fromkeys(texts[i] for i in sorted(longer + wrong) if texts[i] != texts[best])
            rest = {name: value for name, value in record.items() if name != "completion"}
            pairs += [{**rest, "chosen": texts[best], "rejected": text} for text in rejected]
        failed += not rejected
    return pairs, failed


def _problems(drawn: Samples, solved: float):
    """Each problem's record, texts, numbers of the right ones, and lengths."""
    for record, texts, scores, lengths in zip(*drawn, strict=True):
        yield record, texts, [i for i, score in enumerate(scores) if score >= solved], lengths
