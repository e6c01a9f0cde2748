"""The DPO family as one table: score x pairing x link x length normalisation.

Every method scores both responses of a pair, takes the margin between the scores, and hands margin and scores
to a link function. A training step is three calls:

    chosen, chosen_lengths = sequence_log_probs(log_probs, mask)              # and so the other three
    values, diagnostics = loss(chosen, rejected, ref_chosen, ref_rejected, variant=PRESETS["dpo"])
    total, weight = reduce.elements(values)                                   # add up, divide once

KTO, whose examples come without partners, stands apart (`kto`). N pairs; `log_probs` of whole responses are
*sums* over their tokens, of the response only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import choice, same_shape
from jaxrl.losses.segments import sequence_sums

Diagnostics = dict[str, jax.Array]


@dataclass(frozen=True)
class Variant:
    """One row of the family.

    Attributes:
      score: of a response: log pi / ref ("log_ratio"), log pi ("log_prob", no reference) or log p / (1 - p)
        with p the geometric mean of its tokens' probabilities ("log_odds", no reference).
      per_token: whether a score is divided by the response's length ("log_odds" always is).
      pairing: how scores make margins, see `PAIRINGS`.
      link: see `LINKS`.
      beta: scale of the implicit reward, beta score. IPO's and SPPO's regulariser.
      label_smoothing: the share of pairs whose label is taken to be wrong; used by "sigmoid", "robust" and
        "exo".
      target_margin: by how much beta margin should be positive (SimPO's gamma).
      weight, nll_coef: the value is weight link + nll_coef (negative log-likelihood of the chosen response,
        per token).
    """

    score: Literal["log_ratio", "log_prob", "log_odds"] = "log_ratio"
    per_token: bool = False
    pairing: Literal["pairs", "sorted_margins", "sorted_scores"] = "pairs"
    link: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    target_margin: float = 0.0
    weight: float = 1.0
    nll_coef: float = 0.0


PRESETS: dict[str, Variant] = {
    # Rafailov et al. 2023, arXiv 2305.18290. With label_smoothing it is cDPO, as in its authors' code (TRL
    # ignores it).
    "dpo": Variant(),
    # Mitchell 2023, "A note on DPO with noisy preferences".
    "cdpo": Variant(label_smoothing=0.1),
    # Chowdhury et al. 2024, arXiv 2403.00409: unbiased under flipped labels.
    "robust": Variant(link="robust", label_smoothing=0.1),
    # Azar et al. 2023, arXiv 2310.12036: sums over tokens, as in the paper (TRL and EasyDeL: per_token=True).
    "ipo": Variant(link="ipo"),
    # Zhao et al. 2023, SLiC-HF, arXiv 2305.10425; on log-ratios in Liu et al. 2023, arXiv 2309.06657.
    "hinge": Variant(link="hinge"),
    # Meng et al. 2024, arXiv 2405.14734. target_margin is gamma itself, not gamma / beta.
    "simpo": Variant(score="log_prob", per_token=True, beta=2.0, target_margin=1.0),
    # Hong et al. 2024, arXiv 2403.07691: lambda is the weight. NLL over the response, as in the paper.
    "orpo": Variant(score="log_odds", per_token=True, beta=1.0, weight=0.1, nll_coef=1.0),
    # Jung et al. 2024, arXiv 2404.04656; its running mean of rewards is the argument reference_point.
    "bco": Variant(link="bco"),
    # Chen et al. 2024, arXiv 2402.05369, for pairs.
    "nca": Variant(link="nca"),
    # Wu et al. 2024, arXiv 2405.00675, with hard labels; beta is 1 / eta.
    "sppo": Variant(link="sppo", beta=0.001),
    # D'Oosterlinck et al. 2024, arXiv 2408.06266: for a policy worse, and better, than the chosen responses.
    "apo_zero": Variant(link="apo_zero"),
    "apo_down": Variant(link="apo_down"),
    # Ji et al. 2024, arXiv 2402.00856, for pairs; the labels must be smoothed a little.
    "exo": Variant(link="exo", label_smoothing=1e-3),
    # Melnyk et al. 2024, arXiv 2406.05882: compares distributions over the batch.
    "aot": Variant(pairing="sorted_margins"),
    "aot_unpaired": Variant(pairing="sorted_scores"),
}


def sequence_log_probs(
    log_probs: jax.Array, mask: jax.Array, *, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of whole responses, and their lengths.

    Args:
      log_probs: [B, T] of every token.
      mask: [B, T], true on response tokens.
      segment_ids: [B, T] or None: several sequences packed into a row, see `segments`.

    Returns:
      ([B] sums, [B] lengths), float32. With segment_ids [B, T] both: column j is the row's j-th run, and
      lengths are zero for padding and after the last run.
    """
    same_shape("[B, T]", log_probs=log_probs, mask=mask, segment_ids=segment_ids)
    sums = sequence_sums(log_probs, mask, segment_ids=segment_ids)
    lengths = sequence_sums(jnp.ones(jnp.shape(mask)), mask, segment_ids=segment_ids)
    return (sums[:, 0], lengths[:, 0]) if segment_ids is None else (sums, lengths)


def loss(
    chosen_log_probs: jax.Array,
    rejected_log_probs: jax.Array,
    ref_chosen_log_probs: jax.Array | None = None,
    ref_rejected_log_probs: jax.Array | None = None,
    *,
    variant: Variant,
    chosen_lengths: jax.Array | None = None,
    rejected_lengths: jax.Array | None = None,
    chosen_nll: jax.Array | None = None,
    reference_point: jax.Array | float = 0.0,
) -> tuple[jax.Array, Diagnostics]:
    """Loss of every pair of a row of the family.

    Args:
      chosen_log_probs, rejected_log_probs: [N] log pi of the responses, sums over their tokens.
      ref_chosen_log_probs, ref_rejected_log_probs: [N] the same under the reference, constants; not needed
        where the variant's score has no reference.
      variant: the row.
      chosen_lengths, rejected_lengths: [N] numbers of response tokens; needed with per_token, log_odds and
        nll_coef.
      chosen_nll: [N] overrides the negative log-likelihood per token of the chosen response, as for one over
        prompt and response (TRL's and Tunix's ORPO).
      reference_point: scalar taken from both rewards before the link: BCO's running mean of rewards, kept by
        the caller.

    Returns:
      ([N] float32, {"chosen_rewards", "rejected_rewards" (beta score), "margin" (their difference),
      "accuracy" (1.0 where the chosen one is ahead)}: [N] without gradient). With a sorted pairing values are
      in order of rank and depend on the whole batch: micro-batches and shards are batches of their own.

    Raises:
      ValueError: shapes that do not fit, a missing reference or missing lengths, an unknown name.
    """
    same_shape(
        "[N]",
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        chosen_nll=chosen_nll,
    )
    link = choice("link", variant.link, LINKS)
    pairing = choice("pairing", variant.pairing, PAIRINGS)
    (chosen, ref_chosen), (rejected, ref_rejected) = (
        _scores(chosen_log_probs, ref_chosen_log_probs, chosen_lengths, variant),
        _scores(rejected_log_probs, ref_rejected_log_probs, rejected_lengths, variant),
    )
    margin = pairing(chosen, rejected, ref_chosen, ref_rejected) - variant.target_margin / variant.beta
    chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
    shift = jax.lax.stop_gradient(jnp.asarray(reference_point, jnp.float32)) / variant.beta
    values = variant.weight * link(
        margin, chosen - shift, rejected - shift, beta=variant.beta, label_smoothing=variant.label_smoothing
    )
    if variant.nll_coef:
        if chosen_nll is None:
            chosen_nll = -_per_token(jnp.asarray(chosen_log_probs, jnp.float32), chosen_lengths)
        values = values + variant.nll_coef * chosen_nll
    diagnostics = {
        "chosen_rewards": variant.beta * chosen,
        "rejected_rewards": variant.beta * rejected,
        "margin": variant.beta * (chosen - rejected),
        "accuracy": (chosen > rejected).astype(jnp.float32),
    }
    return values, jax.tree.map(jax.lax.stop_gradient, diagnostics)


def _scores(log_probs, ref_log_probs, lengths, variant):
    """The policy's part of the score and the reference's; the score is their difference."""
    log_probs = jnp.asarray(log_probs, jnp.float32)
    if variant.score == "log_ratio":
        if ref_log_probs is None:
            raise ValueError("this variant scores log pi / ref: pass ref_chosen_log_probs and ref_rejected_log_probs")
        ref = jax.lax.stop_gradient(jnp.asarray(ref_log_probs, jnp.float32))
        if variant.per_token:
            return _per_token(log_probs, lengths), _per_token(ref, lengths)
        return log_probs, ref
    if variant.score == "log_prob":
        score = _per_token(log_probs, lengths) if variant.per_token else log_probs
    elif variant.score == "log_odds":
        mean = _per_token(log_probs, lengths)
        score = mean - jnp.log(-jnp.expm1(jnp.minimum(mean, -1e-7)))
    else:
        raise ValueError(f"score is {variant.score!r}, expected 'log_ratio', 'log_prob' or 'log_odds'")
    return score, jnp.zeros_like(score)


def _per_token(log_probs, lengths):
    if lengths is None:
        raise ValueError("this variant divides by the response's length: pass chosen_lengths and rejected_lengths")
    return log_probs / jnp.maximum(jnp.asarray(lengths, jnp.float32), 1.0)


PAIRINGS: dict[str, Callable[..., jax.Array]] = {
    # The pair's own margin.
    "pairs": lambda chosen, rejected, ref_chosen, ref_rejected: (chosen - ref_chosen) - (rejected - ref_rejected),
    # AOT, paired: the i-th smallest of the policy's margins against the i-th smallest of the reference's.
    "sorted_margins": lambda chosen, rejected, ref_chosen, ref_rejected: (
        jnp.sort(chosen - rejected) - jnp.sort(ref_chosen - ref_rejected)
    ),
    # AOT, unpaired: the i-th smallest score of all chosen against the i-th smallest of all rejected.
    "sorted_scores": lambda chosen, rejected, ref_chosen, ref_rejected: (
        jnp.sort(chosen - ref_chosen) - jnp.sort(rejected - ref_rejected)
    ),
}
"""Each is f(chosen, rejected, ref_chosen, ref_rejected) -> margins, all [N]. Sorted ones take no padding
pairs."""


def _sigmoid(margin, chosen, rejected, *, beta, label_smoothing):
    agree, disagree = jax.nn.log_sigmoid(beta * margin), jax.nn.log_sigmoid(-beta * margin)
    return -(1.0 - label_smoothing) * agree - label_smoothing * disagree


def _robust(margin, chosen, rejected, *, beta, label_smoothing):
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a share of flipped labels in [0, 0.5)")
    agree, disagree = jax.nn.log_sigmoid(beta * margin), jax.nn.log_sigmoid(-beta * margin)
    return (-(1.0 - label_smoothing) * agree + label_smoothing * disagree) / (1.0 - 2.0 * label_smoothing)


def _ipo(margin, chosen, rejected, *, beta, label_smoothing):
    return jnp.square(margin - 0.5 / beta)


def _hinge(margin, chosen, rejected, *, beta, label_smoothing):
    return jax.nn.relu(1.0 - beta * margin)


def _exo(margin, chosen, rejected, *, beta, label_smoothing):
    if not 0.0 < label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected in (0, 1): exo needs soft labels, as 1e-3")
    agree, disagree = jax.nn.log_sigmoid(beta * margin), jax.nn.log_sigmoid(-beta * margin)
    return jnp.exp(agree) * (agree - jnp.log1p(-label_smoothing)) + jnp.exp(disagree) * (
        disagree - jnp.log(label_smoothing)
    )


def _bco(margin, chosen, rejected, *, beta, label_smoothing):
    return -jax.nn.log_sigmoid(beta * chosen) - jax.nn.log_sigmoid(-beta * rejected)


def _nca(margin, chosen, rejected, *, beta, label_smoothing):
    down = -0.5 * (jax.nn.log_sigmoid(-beta * chosen) + jax.nn.log_sigmoid(-beta * rejected))
    return down - jax.nn.log_sigmoid(beta * chosen)


def _sppo(margin, chosen, rejected, *, beta, label_smoothing):
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


def _apo_zero(margin, chosen, rejected, *, beta, label_smoothing):
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def _apo_down(margin, chosen, rejected, *, beta, label_smoothing):
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * margin)


LINKS: dict[str, Callable[..., jax.Array]] = {
    "sigmoid": _sigmoid,  # -(1 - e) log s(b D) - e log s(-b D)
    "robust": _robust,  # (-(1 - e) log s(b D) + e log s(-b D)) / (1 - 2 e)
    "ipo": _ipo,  # (D - 1 / (2 b))^2
    "hinge": _hinge,  # max(0, 1 - b D)
    "exo": _exo,  # KL([s(b D), s(-b D)] || [1 - e, e])
    "bco": _bco,  # -log s(b c) - log s(-b r)
    "nca": _nca,  # -log s(b c) - 1/2 log s(-b c) - 1/2 log s(-b r)
    "sppo": _sppo,  # (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2
    "apo_zero": _apo_zero,  # 1 - s(b c) + s(b r)
    "apo_down": _apo_down,  # s(b c) + 1 - s(b D)
}
"""Each is f(margin D, chosen score c, rejected score r, *, beta b, label_smoothing e) -> [N]; s is the
sigmoid."""


def kto(
    log_ratios: jax.Array,
    desirable: jax.Array,
    *,
    reference_point: jax.Array | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[jax.Array, Diagnostics]:
    """KTO, from examples labelled one by one (Ethayarajh et al. 2024, arXiv 2402.01306).

        desirable:    desirable_weight   (1 - sigmoid(beta (x - z)))        x = log pi / ref of the response
        undesirable:  undesirable_weight (1 - sigmoid(beta (z - x)))        z = reference_point

    Args:
      log_ratios: [N] x, sums over response tokens.
      desirable: [N] true where the response is wanted.
      reference_point: scalar z, from `kto_reference_point`; a constant. Computed once for the whole batch, it
        makes micro-batches exact.
      beta: scale of the implicit reward.
      desirable_weight, undesirable_weight: the paper keeps their ratio times that of the counts in [1, 4/3].

    Returns:
      ([N] float32, {"rewards": [N] beta x, without gradient}).

    Raises:
      ValueError: different shapes.
    """
    same_shape("[N]", log_ratios=log_ratios, desirable=desirable)
    x, desirable = jnp.asarray(log_ratios, jnp.float32), jnp.asarray(desirable, bool)
    z = jax.lax.stop_gradient(jnp.asarray(reference_point, jnp.float32))
    sign = jnp.where(desirable, 1.0, -1.0)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(-sign * beta * (x - z)), {"rewards": jax.lax.stop_gradient(beta * x)}


def kto_reference_point(log_ratios: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """KTO's estimate of the KL: max(0, mean log pi / ref) over responses to prompts not their own.

    Args:
      log_ratios: [M] of the mismatched responses.
      mask: [M] true where one counts, or None for all.

    Returns:
      float32 scalar without gradient. On several devices take the mean over all of them.
    """
    same_shape("[M]", log_ratios=log_ratios, mask=mask)
    log_ratios = jnp.asarray(log_ratios, jnp.float32)
    counted = jnp.ones_like(log_ratios, bool) if mask is None else jnp.asarray(mask, bool)
    mean = jnp.where(counted, log_ratios, 0.0).sum() / jnp.maximum(counted.sum(), 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))
