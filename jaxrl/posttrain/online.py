"""Online DPO: sample completions, let a judge say which is best and which is worst, and learn from the two.

`sample`, a judge and `learn` make an iteration, as in `grpo`. With a reward in JAX (a reward model, say) the three are
one program (`fused`); a judge in Python runs between two (`hosted`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl.data.tokenizer import Tokenizer
from jaxrl.losses import preference as family
from jaxrl.losses import reduce
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain import update
from jaxrl.posttrain.grpo import Problems, summary
from jaxrl.posttrain.preference import check_batches, in_parts, pair_metrics
from jaxrl.posttrain.rewards.host import host_rewards
from jaxrl.posttrain.rollout import Sampling, check_routers, completion_log_probs, rollout
from jaxrl.posttrain.task import text_of
from jaxrl.types import Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
    """One iteration of online DPO."""

    variant: str = "dpo"
    """Row of losses.preference.PRESETS."""
    beta: float | None = None
    """Scale of the implicit reward; None is the row's own."""
    prompts: int = 16
    """Prompts per iteration, and so pairs."""
    group: int = 2
    """Completions for each prompt, of which the best and the worst are learnt from."""
    epochs: int = 1
    """Updates on each iteration's pairs."""
    micro_batches: int = 1
    """Parts in which each update's gradient is computed; it is the same gradient in less memory."""
    reference_every: int = 0
    """Iterations after which the reference becomes the policy: 1 is iterative DPO, 0 keeps the first reference."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """How completions are drawn."""

    def __post_init__(self):
        if self.variant not in family.PRESETS:
            raise ValueError(f"variant is {self.variant!r}; expected one of {', '.join(family.PRESETS)}")
        if self.row.pairing != "pairs":
            raise ValueError(f"variant {self.variant} sorts the pairs of a batch, which undecided ones would disturb")
        if self.group < 2:
            raise ValueError(f"group is {self.group}; a best and a worst completion need at least 2")
        if self.sampling.temperature == 0:
            raise ValueError("sampling temperature is 0; greedy completions of a prompt are all equal")
        if self.epochs < 1 or self.reference_every < 0 or (self.beta is not None and self.beta <= 0):
            raise ValueError(
                f"epochs is {self.epochs}, reference_every {self.reference_every} and beta {self.beta}; "
                "expected at least 1, at least 0, and a positive number or None"
            )
        check_batches(self.prompts, self.micro_batches)

    @property
    def row(self) -> family.Variant:
        """The variant with this config's beta put in."""
        row = family.PRESETS[self.variant]
        return row if self.beta is None else dataclasses.replace(row, beta=self.beta)


class Online(NamedTuple):
    """The pure functions of a run.

    init: `(key, params) -> TrainState`; the reference is a copy of `params` where one is needed later.
    sample: `(state, prompts [N]) -> (Rollout of prompts * group rows, rows [prompts] drawn from the N)`.
    learn: `(state, rollout, scores [prompts * group]) -> (state, metrics)`; advances `state.step`.
    """

    init: Callable
    sample: Callable
    learn: Callable


def extremes(scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Best and worst of each group.

    Args:
      scores: `[P, G]`, NaN where there is none.

    Returns:
      `(best [P], worst [P])` int32, the first of equals, and `decided [P]` bool: false where all known scores are
      equal.
    """
    known = ~jnp.isnan(scores)
    high, low = jnp.where(known, scores, -jnp.inf), jnp.where(known, scores, jnp.inf)
    return high.argmax(1).astype(jnp.int32), low.argmin(1).astype(jnp.int32), high.max(1) > low.min(1)


def make(
    config: OnlineConfig,
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    *,
    eos_id: int,
    pad_id: int,
    stop: tuple[tuple[int, ...], ...] = (),
    max_grad_norm: float = 1.0,
    constrain: Callable = lambda batch: batch,
) -> Online:
    """The functions of a run (Guo et al. 2024, arXiv 2402.04792; iterative: Xiong et al. 2023, arXiv 2312.11456).

    Completions are drawn from the current policy, so the reference's log-probs are computed anew in each iteration;
    with `reference_every = 1` they are the policy's own before the update, and no second copy of the parameters is
    kept. BCO's reference point is 0. Both sides' log-probs are of the sampler's temperature.

    Args:
      config: sizes and the variant.
      model: four functions; see `LanguageModel`.
      optimizer: from `update.make_optimizer`, or any optax transformation.
      eos_id, pad_id, stop: see `rollout`.
      max_grad_norm: global norm above which the gradient is scaled down; 0 leaves it.
      constrain: puts a batch pytree onto the mesh (`parallel.shard_batch`); the identity on one device.

    Raises:
      ValueError: a model whose experts drop choices.
    """
    check_routers(model)
    descend = partial(update.descend, micro_batches=config.micro_batches, max_grad_norm=max_grad_norm)
    row = config.row
    referenced = row.score == "log_ratio"
    copies = referenced and config.reference_every != 1

    def sums_of(model, params, completions: Rollout):
        log_probs, entropy = completion_log_probs(model, params, completions, temperature=config.sampling.temperature)
        sums, lengths = family.sequence_log_probs(log_probs, completions.mask)
        return sums, lengths, entropy

    def init(key, params):
        reference = jax.tree.map(jnp.copy, params) if copies else None
        return update.init_state(params, optimizer, key, reference=reference)

    def sample(state, prompts: Prompts):
        rows = update.epoch_batch(state.key, state.step, batch=config.prompts, examples=prompts.tokens.shape[0])
        completions = rollout(
            model,
            state.params,
            constrain(jax.tree.map(lambda x: x[rows], prompts)),
            jax.random.fold_in(jax.random.fold_in(state.key, 1 << 30), state.step),
            sampling=config.sampling,
            eos_id=eos_id,
            pad_id=pad_id,
            samples=config.group,
            stop=stop,
        )
        return constrain(completions), rows

    def loss(model, params, part):
        """Mean over the decided pairs; `part["pairs"]` has leaves `[N, 2, ...]`, best and worst."""
        both = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), part["pairs"])
        sums, lengths, entropy = sums_of(model, params, both)
        (chosen, rejected), (chosen_lengths, rejected_lengths) = sums.reshape(-1, 2).T, lengths.reshape(-1, 2).T
        reference = part["reference"]
        values, diagnostics = family.loss(
            chosen,
            rejected,
            None if reference is None else reference[:, 0],
            None if reference is None else reference[:, 1],
            variant=row,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )
        metrics = pair_metrics(diagnostics, chosen, rejected, part["decided"])
        metrics["policy/entropy"] = reduce.tokens(jax.lax.stop_gradient(entropy), both.mask)
        return reduce.elements(values, part["decided"]), metrics

    def learn(state, completions: Rollout, scores):
        scores = scores.reshape(config.prompts, config.group)
        best, worst, decided = extremes(scores)
        rows = jnp.arange(config.prompts)[:, None] * config.group + jnp.stack([best, worst], axis=1)
        pairs = constrain(jax.tree.map(lambda x: x[rows], completions))
        batch = {"pairs": pairs, "decided": decided, "reference": None}
        if referenced:
            frozen = state.reference if copies else state.params
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs)
            size = 2 * config.prompts // config.micro_batches
            batch["reference"] = in_parts(lambda part: sums_of(model, frozen, part)[0], flat, rows=size).reshape(-1, 2)

        def one(state, epoch):
            return descend(state, model, loss, batch, optimizer, number=state.step * config.epochs + epoch)

        state, stacked = jax.lax.scan(one, state, jnp.arange(config.epochs))
        metrics = {name: values[-1] for name, values in stacked.items()}
        metrics |= summary(completions, scores) | {"judge/decided": decided.mean()}
        changes: dict[str, Any] = {"step": state.step + 1}
        if copies and config.reference_every:
            due = changes["step"] % config.reference_every == 0
            take = lambda new, old: jnp.where(due, new, old)
            changes["reference"] = jax.tree.map(take, state.params, state.reference)
        return dataclasses.replace(state, **changes), metrics

    return Online(init, sample, learn)


def fused(online: Online, reward: Callable[[Rollout, Any], jax.Array], config: OnlineConfig) -> Callable:
    """One iteration as one pure function `(state, Problems) -> (state, metrics)`.

    Args:
      online: from `make`.
      reward: `(rollout of B rows, answers of B rows) -> [B]`, traceable: `reward_model.score_rollout`, for one.
      config: that of `make`.
    """

    def step(state, problems: Problems):
        completions, rows = online.sample(state, problems.prompts)
        answers = jax.tree.map(lambda x: jnp.repeat(x[rows], config.group, axis=0), problems.answers)
        return online.learn(state, completions, reward(completions, answers))

    return step


def hosted(online: Online, scores: Callable[[Rollout, Any], Any]) -> Callable:
    """The same iteration with Python between two programs; for `loop.run(..., jit=False)`.

    Args:
      online: from `make`.
      scores: `(rollout on the host, rows [prompts] of the problems) -> [B]` numbers, NaN where there is none: from
        `judged`, for one.
    """
    sample, learn = jax.jit(online.sample), jax.jit(online.learn, donate_argnums=0)

    def step(state, problems: Problems):
        completions, rows = sample(state, problems.prompts)
        given = host_rewards(scores, completions, rows).values
        return learn(state, completions, jnp.asarray(given))

    return step


def judged(judge: Callable, tokenizer: Tokenizer, prompts: Sequence[Any], *, group: int) -> Callable:
    """A judge of texts as the scores that `hosted` takes.

    Args:
      judge: `(prompts [P], completions [P] lists of group texts) -> [P]` verdicts. Each is a list of `group` scores,
        or the number of the better of two, or None: no verdict.
      tokenizer: reads the completions.
      prompts: of all problems, in the form the judge takes.
      group: completions of each prompt.

    Raises:
      ValueError: from the returned function, on a verdict that is none of these.
    """

    def scores(completions: Rollout, rows) -> np.ndarray:
        texts = text_of(completions, tokenizer)
        texts = [texts[start : start + group] for start in range(0, len(texts), group)]
        verdicts = list(judge([prompts[row] for row in rows], texts))
        if len(verdicts) != len(texts):
            raise ValueError(f"the judge gave {len(verdicts)} verdicts for {len(texts)} prompts; expected one for each")
        return np.concatenate([_scores(verdict, group) for verdict in verdicts]).astype(np.float32)

    return scores


def _scores(verdict: Any, group: int) -> np.ndarray:
    if verdict is None:
        return np.full(group, np.nan)
    given = np.asarray(verdict, np.float64)
    if given.shape == (group,):
        return given
    if given.shape == () and group == 2 and given in (0, 1):
        return np.where(np.arange(2) == given, 1.0, 0.0)
    raise ValueError(
        f"the judge's verdict is {verdict!r}; expected {group} scores"
        f"{', 0 or 1 for the better of two' if group == 2 else ''}, or None"
    )
