"""The GRPO family as one table: baseline x scale x ratio level x surrogate x KL term x reduction.

A training step is four calls:

    variant = PRESETS["dapo"]
    advantage = advantages(rewards, mask, variant=variant)                              # once per batch
    values, diagnostics = loss(log_probs, old_log_probs, None, advantage, mask, variant=variant)
    total, weight = reduce.by_name(variant.reduction)(values, mask)                     # add up, divide once

`dataclasses.replace(PRESETS["grpo"], clip_high=0.28)` makes a row of one's own. B sequences, T tokens;
`log_probs` are those of the response tokens under the policy being trained, `old_log_probs` under the policy
that sampled them, both at the sampling temperature. Rows may hold several packed sequences, see `segments`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl import returns
from jaxrl.losses import kl as kl_estimators
from jaxrl.losses.checks import choice, same_shape
from jaxrl.losses.policy import clip_bounds, clipped_surrogate, importance_ratio
from jaxrl.losses.segments import sequence_sums, spread

Diagnostics = dict[str, jax.Array]


@dataclass(frozen=True)
class Variant:
    """One row of the family.

    Attributes:
      baseline: what a reward is compared with: the mean of its "group", the mean of the others in it
        ("leave_one_out"), or nothing ("none").
      scale: what divides the advantage, for baseline "group": see `returns.group_relative`.
      whiten: whether advantages are whitened over all tokens of the batch at the end.
      level: what the ratio belongs to, see `LEVELS`.
      form: what is done with ratio and advantage, see `FORMS`.
      clip_low, clip_high, dual_clip: see `policy.clipped_surrogate`; "cispo" clips its weight to the same
        interval.
      tau: weight of the squared log-ratio in "mirror".
      kl: estimator of the KL to the reference, see `kl.ESTIMATORS`.
      kl_coef: its weight; 0 needs no reference.
      kl_in_reward: whether the KL is taken from the reward, token by token, instead of added to the loss.
      reduction: see `reduce.REDUCTIONS`.
    """

    baseline: Literal["group", "leave_one_out", "none"] = "group"
    scale: Literal["std", "none", "batch"] = "std"
    whiten: bool = False
    level: Literal["token", "sequence", "sequence_token", "sequence_sum"] = "token"
    form: Literal["clip", "cispo", "reinforce", "mirror"] = "clip"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    tau: float = 0.1
    kl: str = "k3"
    kl_coef: float = 0.0
    kl_in_reward: bool = False
    reduction: Literal["tokens", "sequences", "constant"] = "sequences"


PRESETS: dict[str, Variant] = {
    # Shao et al. 2024, DeepSeekMath, arXiv 2402.03300. Its k3 term has the forward KL's gradient; "k3_ratio"
    # (DeepSeek-V3.2, TRL's default) has the reverse KL's.
    "grpo": Variant(kl_coef=0.04),
    # Liu et al. 2025, Understanding R1-Zero-like training, arXiv 2503.20783: no std, one divisor.
    "dr_grpo": Variant(scale="none", reduction="constant"),
    # Yu et al. 2025, DAPO, arXiv 2503.14476: clip-higher and the mean over tokens. Its dynamic
    # sampling and its overlong penalty are no part of the loss.
    "dapo": Variant(clip_high=0.28, reduction="tokens"),
    # Zheng et al. 2025, GSPO, arXiv 2507.18071: a ratio per sequence, so the clip is much closer.
    "gspo": Variant(level="sequence", clip_low=3e-4, clip_high=4e-4),
    # The same value, with the gradient of each token weighted by the token's own advantage.
    "gspo_token": Variant(level="sequence_token", clip_low=3e-4, clip_high=4e-4),
    # MiniMax 2025, MiniMax-M1, arXiv 2506.13585: the clip bounds a constant weight, so no token loses its
    # gradient. There is an upper bound only, which the paper does not print: weights up to 5, as in ScaleRL
    # (Khatri et al. 2025, arXiv 2510.13786). clip_high is a distance from 1, as in the paper and in verl; for
    # TRL it is the bound itself.
    "cispo": Variant(form="cispo", clip_low=None, clip_high=4.0, reduction="tokens"),
    # Ahmadian et al. 2024, Back to basics, arXiv 2402.14740: REINFORCE on whole sequences, KL in the reward.
    "rloo": Variant(
        baseline="leave_one_out",
        scale="none",
        level="sequence_sum",
        form="reinforce",
        kl="k1",
        kl_coef=0.05,
        kl_in_reward=True,
    ),
    # Hu et al. 2025, REINFORCE++, arXiv 2501.03262: no group; rewards-to-go with KL, whitened over the batch.
    "reinforce_pp": Variant(
        baseline="none",
        scale="none",
        whiten=True,
        kl="k1",
        kl_coef=0.01,
        kl_in_reward=True,
        reduction="tokens",
    ),
    # The same paper's version for groups: the group's mean is the baseline, the KL is a loss with k2.
    "reinforce_pp_baseline": Variant(scale="none", whiten=True, kl="k2", kl_coef=0.01, reduction="tokens"),
    # Kimi Team 2025, Kimi k1.5, arXiv 2501.12599, section 2.3. tau is not published. The reference is the
    # policy at the start of the iteration, given as old_log_probs. The paper resets the optimizer with it.
    "kimi": Variant(scale="none", level="sequence_sum", form="mirror"),
}


def advantages(
    rewards: jax.Array,
    mask: jax.Array,
    *,
    variant: Variant,
    log_probs: jax.Array | None = None,
    ref_log_probs: jax.Array | None = None,
    kl_coef: jax.Array | float | None = None,
    valid: jax.Array | None = None,
    eps: float = 1e-6,
    ddof: int = 1,
) -> jax.Array:
    """Advantage of every token, from one reward per answer.

    Args:
      rewards: [P, G], the G answers to each of P prompts.
      mask: [P * G, T], true on response tokens; the rows of a group follow each other.
      variant: the row of the family; uses baseline, scale, whiten and, with kl_in_reward, kl and kl_coef.
      log_probs, ref_log_probs: [P * G, T], needed for the KL in the reward only: of the sampling policy and
        of the reference.
      kl_coef: overrides variant.kl_coef; may be traced.
      valid: [P, G], false where there is no reward; NaN counts as none. Such answers get advantage zero.
      eps, ddof: see `returns.group_relative`.

    Returns:
      [P * G, T] float32 without gradient, zero where the mask is false. Statistics are over the whole batch
      given, so call it before the batch is split.

    Raises:
      ValueError: groups of one, rewards that do not fit the mask, or a KL in the reward without log-probs.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 2 or jnp.ndim(mask) != 2 or rewards.size != mask.shape[0]:
        raise ValueError(
            f"rewards has shape {rewards.shape} and mask {jnp.shape(mask)}, expected [P, G] and [P * G, T]: "
            "reshape flat rewards to (prompts, answers per prompt)"
        )
    kl_coef = variant.kl_coef if kl_coef is None else kl_coef
    has_reward = ~jnp.isnan(rewards) if valid is None else jnp.asarray(valid, bool) & ~jnp.isnan(rewards)
    scores = jnp.where(has_reward, rewards, 0.0).reshape(-1)
    if variant.kl_in_reward and not _is_zero(kl_coef):
        if log_probs is None or ref_log_probs is None:
            raise ValueError(
                "this variant takes the KL from the reward: pass log_probs and ref_log_probs, or kl_coef=0"
            )
        token_rewards = penalised_rewards(scores, log_probs, ref_log_probs, mask, kl_coef=kl_coef, estimator=variant.kl)
    else:
        token_rewards = score_at_last(scores, mask)
    mask = jnp.asarray(mask, bool)
    if variant.baseline == "none":
        to_go = jnp.cumsum(token_rewards[:, ::-1], axis=1)[:, ::-1]
    else:
        shaped = token_rewards.sum(axis=1).reshape(rewards.shape)
        shaped = jnp.where(mask.any(axis=1).reshape(rewards.shape), shaped, scores.reshape(rewards.shape))
        if variant.baseline == "group":
            relative = returns.group_relative(shaped, scale=variant.scale, valid=has_reward, ddof=ddof, eps=eps)
        else:
            relative = returns.leave_one_out(shaped, valid=has_reward)
        to_go = jnp.broadcast_to(relative.reshape(-1, 1), mask.shape)
    counted = mask & has_reward.reshape(-1, 1)
    result = returns.whiten(to_go, counted, ddof=ddof) if variant.whiten else jnp.where(counted, to_go, 0.0)
    return jax.lax.stop_gradient(result)


def score_at_last(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Rewards per token: the score on the last unmasked token, zero elsewhere.

    Args:
      scores: [B].
      mask: [B, T].

    Returns:
      [B, T] float32. A row without unmasked tokens has no place for its score, which is dropped.
    """
    same_shape("[B]", scores=scores, rows_of_mask=mask[:, 0])
    mask = jnp.asarray(mask, bool)
    last = mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    return jnp.where(last, jnp.asarray(scores, jnp.float32)[:, None], 0.0)


def penalised_rewards(
    scores: jax.Array,
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    mask: jax.Array,
    *,
    kl_coef: jax.Array | float,
    estimator: str = "k1",
) -> jax.Array:
    """Rewards per token with the KL taken off: r_t = -kl_coef k1_t, plus the score on the last token.

    PPO for language models (Ouyang et al. 2022, arXiv 2203.02155), RLOO, REINFORCE++.

    Args:
      scores: [B] one score per sequence.
      log_probs: [B, T] of the policy that sampled the tokens.
      ref_log_probs: [B, T] of the reference.
      mask: [B, T], true on response tokens.
      kl_coef: weight of the KL.
      estimator: a key of `kl.ESTIMATORS`; k1 is the one whose policy gradient is the KL's.

    Returns:
      [B, T] float32 without gradient, zero where the mask is false.
    """
    same_shape("[B, T]", mask=mask, log_probs=log_probs, ref_log_probs=ref_log_probs)
    penalty = choice("estimator", estimator, kl_estimators.ESTIMATORS)(log_probs, ref_log_probs)
    penalty = jax.lax.stop_gradient(jnp.where(jnp.asarray(mask, bool), penalty, 0.0))
    return score_at_last(scores, mask) - kl_coef * penalty


def surrogate(
    log_probs: jax.Array,
    old_log_probs: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    level: str = "token",
    form: str = "clip",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    tau: float = 0.1,
    log_ratio_clamp: float | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, Diagnostics]:
    """Policy loss of every token, before any KL term.

    With r = exp(level(log_probs - old_log_probs)) and A the advantage, `form` says:

        clip       -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)       PPO, GRPO, DAPO, GSPO
        cispo      -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A log_probs
        reinforce  -A level(log_probs)                                     no ratio: for on-policy samples
        mirror     -A level(log_probs) + tau / 2 level(log_probs - old_log_probs)^2     Kimi k1.5

    and `level`, over the unmasked tokens t of a sequence of n:

        token           x_t
        sequence        sum_t x_t / n, the same for all of its tokens (GSPO)
        sequence_token  the value of `sequence`, the gradient of x_t (GSPO-token)
        sequence_sum    sum_t x_t, the same for all of its tokens (RLOO, Kimi k1.5, the R1 report's ratio)

    Sequence levels put the sequence's loss on each of its tokens: reduce them with `reduce.sequences`.

    Args:
      log_probs: [B, T].
      old_log_probs: [B, T], constants. None: samples are on policy, and the ratio is 1 with its gradient.
      advantages: [B] one per sequence, or [B, T].
      mask: [B, T], true on response tokens. What stands elsewhere is never used.
      level, form: see above.
      clip_low, clip_high, dual_clip: see `policy.clipped_surrogate`.
      tau: see "mirror".
      log_ratio_clamp: bound on the token's log-ratio, beyond which its gradient is zero (verl, Tunix,
        OpenRLHF: 20). None, as in the papers and TRL: no bound.
      segment_ids: [B, T] or None: several sequences packed into a row; then advantages must be [B, T].

    Returns:
      ([B, T] float32, diagnostics). Diagnostics are [B, T] without gradient: "ratio", "clipped_low",
      "clipped_high", "clipped_dual" (1.0 where that bound is in force), "kl_old" (estimate of KL(old || new),
      k3).

    Raises:
      ValueError: shapes that do not fit, an unknown level or form, advantages [B] for packed rows.
    """
    same_shape("[B, T]", log_probs=log_probs, old_log_probs=old_log_probs, mask=mask, segment_ids=segment_ids)
    to_level, per_form = choice("level", level, LEVELS), choice("form", form, FORMS)
    if jnp.ndim(advantages) == 1:
        if segment_ids is not None:
            raise ValueError("advantages is [B] but rows hold several packed sequences: give one per token, [B, T]")
        same_shape("[B]", advantages=advantages, rows_of_log_probs=log_probs[:, 0])
        advantages = jnp.broadcast_to(advantages[:, None], log_probs.shape)
    same_shape("[B, T]", log_probs=log_probs, advantages=advantages)

    mask = jnp.asarray(mask, bool)
    new = jnp.where(mask, jnp.asarray(log_probs, jnp.float32), 0.0)
    old = new if old_log_probs is None else jnp.where(mask, jnp.asarray(old_log_probs, jnp.float32), 0.0)
    advantages = jax.lax.stop_gradient(jnp.where(mask, jnp.asarray(advantages, jnp.float32), 0.0))
    log_ratio = new - jax.lax.stop_gradient(old)
    if log_ratio_clamp is not None:
        log_ratio = jnp.clip(log_ratio, -log_ratio_clamp, log_ratio_clamp)

    values, diagnostics = per_form(
        new,
        log_ratio,
        advantages,
        to_level=lambda x: to_level(x, mask, segment_ids),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        tau=tau,
    )
    diagnostics["kl_old"] = kl_estimators.k3(old, new)
    return values, jax.tree.map(jax.lax.stop_gradient, diagnostics)


def truncated_weights(
    log_probs: jax.Array, behaviour_log_probs: jax.Array, mask: jax.Array, *, cap: float, level: str = "token"
) -> jax.Array:
    """Truncated importance weights between the program that sampled and the one that learns.

        token          min(pi_t / mu_t, cap)
        sequence       min(prod_t pi_t / mu_t, cap), the same for all tokens
        sequence_mask  prod_t pi_t / mu_t, and 0 for sequences where it is beyond the cap

    Two programs round differently, and filters (top-k, top-p) and old weights change mu further. (Yao et al. 2025,
    "Your efficient RL framework secretly brings you off-policy RL training"; the last is TRL's default with vLLM.)

    Args:
      log_probs: [B, T] log pi, of the policy as it was when it sampled, by the trainer.
      behaviour_log_probs: [B, T] log mu, by the sampler.
      mask: [B, T], true on response tokens.
      cap: bound on the weight.
      level: see above.

    Returns:
      [B, T] float32 constants, to be multiplied with the loss of each token.
    """
    same_shape("[B, T]", log_probs=log_probs, behaviour_log_probs=behaviour_log_probs, mask=mask)
    mask = jnp.asarray(mask, bool)
    gap = jnp.where(mask, jnp.asarray(log_probs, jnp.float32) - behaviour_log_probs, 0.0)
    if level not in ("token", "sequence", "sequence_mask"):
        raise ValueError(f"level is {level!r}, expected 'token', 'sequence' or 'sequence_mask'")
    weight = importance_ratio(gap if level == "token" else _sum(gap, mask, None))
    weight = jnp.where(weight > cap, 0.0 if level == "sequence_mask" else cap, weight)
    return jax.lax.stop_gradient(weight)


def _mean(x, mask, segment_ids):
    lengths = sequence_sums(jnp.ones_like(x), mask, segment_ids=segment_ids)
    means = sequence_sums(x, mask, segment_ids=segment_ids) / jnp.maximum(lengths, 1.0)
    return spread(means, length=x.shape[1], segment_ids=segment_ids)


def _sum(x, mask, segment_ids):
    return spread(sequence_sums(x, mask, segment_ids=segment_ids), length=x.shape[1], segment_ids=segment_ids)


def _mean_with_token_gradient(x, mask, segment_ids):
    return jax.lax.stop_gradient(_mean(x, mask, segment_ids)) + (x - jax.lax.stop_gradient(x))


LEVELS: dict[str, Callable[..., jax.Array]] = {
    "token": lambda x, mask, segment_ids: x,
    "sequence": _mean,
    "sequence_token": _mean_with_token_gradient,
    "sequence_sum": _sum,
}
"""Each is f(per-token values [B, T], mask, segment_ids or None) -> [B, T]; see `surrogate`."""


def _clip(log_probs, log_ratio, advantages, *, to_level, clip_low, clip_high, dual_clip, tau):
    ratio = importance_ratio(to_level(log_ratio))
    values, diagnostics = clipped_surrogate(
        ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    return values, {"ratio": ratio, **diagnostics}


def _cispo(log_probs, log_ratio, advantages, *, to_level, clip_low, clip_high, dual_clip, tau):
    ratio = importance_ratio(to_level(log_ratio))
    lowest, highest = clip_bounds(clip_low, clip_high)
    weight = jax.lax.stop_gradient(jnp.clip(ratio, lowest, highest))
    return -weight * advantages * log_probs, {
        **_unclipped(ratio),
        "clipped_low": _flag(ratio < lowest),
        "clipped_high": _flag(ratio > highest),
    }


def _reinforce(log_probs, log_ratio, advantages, *, to_level, clip_low, clip_high, dual_clip, tau):
    return -advantages * to_level(log_probs), _unclipped(importance_ratio(to_level(log_ratio)))


def _mirror(log_probs, log_ratio, advantages, *, to_level, clip_low, clip_high, dual_clip, tau):
    distance = to_level(log_ratio)
    return -advantages * to_level(log_probs) + 0.5 * tau * jnp.square(distance), _unclipped(importance_ratio(distance))


def _flag(condition):
    return condition.astype(jnp.float32)


def _unclipped(ratio):
    zero = jnp.zeros_like(ratio)
    return {"ratio": ratio, "clipped_low": zero, "clipped_high": zero, "clipped_dual": zero}


FORMS: dict[str, Callable[..., tuple[jax.Array, Diagnostics]]] = {
    "clip": _clip,
    "cispo": _cispo,
    "reinforce": _reinforce,
    "mirror": _mirror,
}
"""See `surrogate`."""


def loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array | None,
    ref_log_probs: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    variant: Variant,
    kl_coef: jax.Array | float | None = None,
    log_ratio_clamp: float | None = None,
    kl_clamp: float | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, Diagnostics]:
    """Loss of every token of a row of the family: surrogate + kl_coef KL (unless the KL sits in the reward).

    Args:
      log_probs, old_log_probs, advantages, mask, log_ratio_clamp, segment_ids: as in `surrogate`.
      ref_log_probs: [B, T] of the reference, or None without a KL term.
      variant: the row of the family.
      kl_coef: overrides variant.kl_coef; may be traced.
      kl_clamp: bound on the log-ratio inside the KL estimator, see `kl.k1`.

    Returns:
      ([B, T] float32, diagnostics): those of `surrogate`, and "kl_ref" where a reference was given (the k3
      estimate of KL(policy || reference), whatever estimator is trained on).

    Raises:
      ValueError: as `surrogate`, or a KL coefficient without a reference.
    """
    log_probs = jnp.asarray(log_probs, jnp.float32)  # once: both terms' gradients meet in float32
    values, diagnostics = surrogate(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        level=variant.level,
        form=variant.form,
        clip_low=variant.clip_low,
        clip_high=variant.clip_high,
        dual_clip=variant.dual_clip,
        tau=variant.tau,
        log_ratio_clamp=log_ratio_clamp,
        segment_ids=segment_ids,
    )
    kl_coef = variant.kl_coef if kl_coef is None else kl_coef
    wants_kl = not variant.kl_in_reward and not _is_zero(kl_coef)
    if ref_log_probs is None:
        if wants_kl:
            raise ValueError(
                f"kl_coef is {kl_coef} but ref_log_probs is None: pass the log-probs of the reference, or kl_coef=0"
            )
        return values, diagnostics
    same_shape("[B, T]", log_probs=log_probs, ref_log_probs=ref_log_probs)
    mask = jnp.asarray(mask, bool)
    new, ref = jnp.where(mask, log_probs, 0.0), jnp.where(mask, ref_log_probs, 0.0)
    diagnostics["kl_ref"] = jax.lax.stop_gradient(kl_estimators.k3(new, ref))
    if wants_kl:
        old = None if old_log_probs is None else jnp.where(mask, old_log_probs, 0.0)
        estimate = choice("kl", variant.kl, kl_estimators.ESTIMATORS)
        values = values + kl_coef * estimate(new, ref, old_log_probs=old, clamp=kl_clamp)
    return values, diagnostics


def _is_zero(kl_coef) -> bool:
    """Whether the coefficient is known to be zero while tracing."""
    return isinstance(kl_coef, int | float) and kl_coef == 0
