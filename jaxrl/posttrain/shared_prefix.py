"""A group's completions behind one copy of their prompt: the trainer's forward pass reads each prompt once."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Causal, Full, Mask, Segments, Span, Tree, Window
from jaxrl.nets.language_model import LanguageModel
from jaxrl.types import Rollout


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Group(Tree):
    """The tree of a prompt and its completions, a row: `[prompt | branch 0 | branch 1 | ...]`.

    `end` as in `Tree`: the row's end for a prompt, the branch's own for a completion, the next column for padding.
    `prompt`, `branch`: columns of the prompt and of each branch. A model that narrows its mask by a window,
    `mask & Window(n)`, gets one that counts along the path from the root: what precedes a branch's first column is the
    prompt's last.
    """

    prompt: int = dataclasses.field(metadata={"static": True})
    branch: int = dataclasses.field(metadata={"static": True})

    def __and__(self, other: Mask) -> Mask:
        if isinstance(other, Window):
            columns = jnp.arange(self.end.shape[1], dtype=jnp.int32)
            back = other.n - 1
            depth = (columns - self.prompt) % max(self.branch, 1)
            crosses = (columns >= self.prompt) & (depth < back)
            first = jnp.where(crosses, self.prompt - back + depth, columns - back)
            return Tree(self.end) & Span(first[None], columns[None] + 1)
        if isinstance(other, Causal | Full | Segments):
            return super().__and__(other)
        raise ValueError(
            f"a layer narrows the mask of a shared prompt by {type(other).__name__}, which counts columns; completions "
            "that share their prompt stand in other columns than alone: train this model with share_prompt=False"
        )


def row_width(prompt: int, completion: int, group: int) -> int:
    """Columns of a row: the prompt's, and those of all completions but for their last tokens, which predict nothing."""
    return prompt + group * (completion - 1)


def layout(prompt_lengths: jax.Array, *, prompt: int, completion: int, group: int) -> tuple[jax.Array, Group]:
    """What a model must know of such rows: positions `[N, T]`, and the attention mask.

    Args:
      prompt_lengths: `[N]` real tokens of each prompt, which is padded on the left.
      prompt, completion: widths.
      group: completions of each prompt.
    """
    branch, width = completion - 1, row_width(prompt, completion, group)
    columns = jnp.arange(width, dtype=jnp.int32)[None]
    padding = (prompt - prompt_lengths)[:, None]
    below = (columns - prompt) // max(branch, 1)  # number of the branch; negative in the prompt
    inside = columns >= prompt
    positions = jnp.where(inside, columns - below * branch, columns) - padding
    end = jnp.where(inside, prompt + (below + 1) * branch, width)
    end = jnp.where(columns >= padding, end, columns + 1)  # padding sees itself alone: no row of attention is empty
    return jnp.maximum(positions, 0), Group(end, prompt, branch)


def group_log_probs(
    model: LanguageModel,
    params,
    rollout: Rollout,
    *,
    group: int,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`rollout.completion_log_probs`, with each prompt computed once for all completions of its group.

    A row holds the prompt and then its completions one after the other, `P + G (C - 1)` columns in place of
    `G (P + C - 1)`. Keys are seen as in a tree, `k <= q < end[k]`, and each completion's positions go on from the
    prompt's. Values and gradients are the same but for rounding. (Liu et al. 2025, Prefix Grouper, arXiv 2506.05433,
    with two calls of attention; here it is one mask.)

    The model must know of a token's place by its position and the mask alone. Windows are translated (see `Group`).
    Layers that carry a state from column to column, or count a distance in columns (ALiBi), would read the completion
    before; what cannot be seen from the mask is not refused. Its `max_length` must allow `row_width` columns.

    Args:
      model, params: the language model.
      rollout: `B = N * group` completions of width `C`; rows `[i * group, (i + 1) * group)` have the same prompt, as
        `rollout(samples=group)` gives them. That is not checked.
      group: completions of each prompt, `G`.
      temperature, chunk: as in `completion_log_probs`.

    Returns:
      `(log_probs [B, C], entropy [B, C])`, float32. Columns after the end hold values of padding: apply `rollout.mask`.

    Raises:
      ValueError: a group that does not divide `B`, or a mask that the model narrows by what counts columns.
    """
    rows, prompt = rollout.tokens.shape[0], rollout.prompt_width
    if group < 1 or rows % group:
        raise ValueError(f"group is {group} and the rollout has {rows} rows; expected whole groups of one prompt each")
    completions, number = rollout.completions, rows // group
    completion = completions.shape[1]
    positions, mask = layout(rollout.prompt_lengths[::group], prompt=prompt, completion=completion, group=group)
    branches = completions[:, :-1].reshape(number, -1)
    tokens = jnp.concatenate([rollout.tokens[::group, :prompt], branches], axis=1)
    hidden, _ = model.apply(params, tokens, positions=positions, mask=mask)
    size = hidden.shape[-1]
    root = jnp.broadcast_to(hidden[:, prompt - 1, None, None], (number, group, 1, size))
    hidden = jnp.concatenate([root, hidden[:, prompt:].reshape(number, group, completion - 1, size)], axis=2)
    log_probs, entropy = model.log_probs(
        hidden.reshape(rows, completion, size),
        model.unembedding(params),
        completions,
        temperature=temperature,
        chunk=chunk,
    )
    return log_probs, entropy
