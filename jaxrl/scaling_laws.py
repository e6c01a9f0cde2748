"""How large a model for how much compute: DeepSeek LLM's laws, and the fits that find such laws.

(DeepSeek-AI 2024, arXiv 2401.02954, section 3; fits of isoFLOP profiles: Hoffmann et al. 2022, arXiv 2203.15556,
approach 2.) The scale of a model is M, its FLOPs per token without embeddings, and compute is C = M D for D tokens. All
in numpy float64, on the host.
"""

from typing import NamedTuple

import numpy as np


def flops_per_token(layers: int, width: int, length: int) -> float:
    """M = 72 layers width^2 + 12 layers width length: forward and backward, without embedding and head.

    6 for each of a layer's 12 width^2 weights (4 of attention, 8 of the feed-forward layer), and attention over a row
    of `length` tokens, counted in full though half of it is masked.
    """
    return 72.0 * layers * width**2 + 12.0 * layers * width * length


def compute(layers: int, width: int, length: int, tokens: float) -> float:
    """C = M D, FLOPs of training on so many tokens."""
    return flops_per_token(layers, width, length) * tokens


def learning_rate(flops: float) -> float:
    """Peak learning rate 0.3118 C^-0.1250 of the multi-step schedule (`posttrain.update.multi_step`)."""
    return 0.3118 * flops**-0.1250


def batch_tokens(flops: float) -> float:
    """Tokens a step, 0.2920 C^0.3271."""
    return 0.2920 * flops**0.3271


class Split(NamedTuple):
    """How compute is spent. flops_per_token: M of the model. tokens: D that it sees."""

    flops_per_token: float
    tokens: float


def best_split(flops: float) -> Split:
    """M = 0.1715 C^0.5243 and D = 5.8316 C^0.4757, of their data: better data shift the split to the model."""
    return Split(0.1715 * flops**0.5243, 5.8316 * flops**0.4757)


class PowerLaw(NamedTuple):
    """y = factor x^exponent.

    r_squared: share of the variance of log y that is explained. low, high: interval of the exponent by bootstrap over
    points.
    """

    factor: float
    exponent: float
    r_squared: float
    low: float
    high: float

    def __call__(self, x):
        """y at x."""
        return self.factor * np.asarray(x, np.float64) ** self.exponent


def fit_power_law(x, y, *, delta: float = 1e-3, level: float = 0.95, resamples: int = 500, seed: int = 0) -> PowerLaw:
    """The line through (log x, log y) with the least sum of Huber losses.

    Args:
      x, y: `[n]`, positive, n >= 2 and not all x alike.
      delta: |error of log y| from which on a point counts linearly; 1e-3 as Hoffmann et al.
      level, resamples, seed: of the interval; points are drawn with replacement, draws of one x alone left out.

    Raises:
      ValueError: anything else.
    """
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2 or not (x > 0).all() or not (y > 0).all() or np.ptp(x) == 0:
        raise ValueError(
            f"fit_power_law: x {x.shape} and y {y.shape}, expected two or more positive, finite points [n] each, at "
            "different x"
        )
    lx, ly = np.log(x), np.log(y)
    exponent, intercept = _huber_line(lx, ly, delta)
    rest = ly - exponent * lx - intercept
    spread = np.square(ly - ly.mean()).sum()
    r_squared = 1.0 - np.square(rest).sum() / spread if spread > 1e-24 else 1.0
    draws = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    found = [_huber_line(lx[rows], ly[rows], delta)[0] for rows in draws if np.ptp(lx[rows]) > 0]
    low, high = np.quantile(found or [exponent], [(1 - level) / 2, (1 + level) / 2])
    return PowerLaw(float(np.exp(intercept)), float(exponent), float(r_squared), float(low), float(high))


def _huber_line(x, y, delta: float, iterations: int = 50) -> tuple[float, float]:
    """Slope and intercept, by iteratively reweighted least squares from the plain fit (Huber 1964)."""
    weight = np.ones_like(x)
    slope = intercept = 0.0
    for _ in range(iterations):
        centre, height = np.average(x, weights=weight), np.average(y, weights=weight)
        moved = np.sum(weight * (x - centre) * (y - height)) / np.sum(weight * np.square(x - centre))
        done = abs(moved - slope) < 1e-12
        slope, intercept = moved, height - moved * centre
        if done:
            break
        weight = np.minimum(1.0, delta / np.maximum(np.abs(y - slope * x - intercept), 1e-300))
    return float(slope), float(intercept)


class Minimum(NamedTuple):
    """The lowest point of a parabola. inside: whether it lies between the points it was fitted to."""

    size: float
    loss: float
    inside: bool


def parabola_minimum(sizes, losses) -> Minimum:
    """The best size for one compute budget: the minimum of loss = a (log size)^2 + b log size + c.

    Args:
      sizes: `[n]` positive, three different ones or more.
      losses: `[n]`.

    Raises:
      ValueError: too few sizes, or losses without a minimum (a <= 0).
    """
    sizes, losses = (np.asarray(a, np.float64) for a in (sizes, losses))
    if sizes.ndim != 1 or sizes.shape != losses.shape or len(np.unique(sizes)) < 3 or not (sizes > 0).all():
        raise ValueError(
            f"parabola_minimum: sizes {sizes.shape} and losses {losses.shape}, expected [n] each, with three different "
            "positive sizes or more"
        )
    x = np.log(sizes)
    centre = x.mean()  # a fit about 0 would lose digits
    a, b, c = np.polyfit(x - centre, losses, 2)
    if not a > 0:
        raise ValueError(
            f"parabola_minimum: the losses {losses.tolist()} have no minimum over sizes {sizes.tolist()}; train "
            "smaller and larger models with the same compute"
        )
    best = -b / (2 * a)
    return Minimum(float(np.exp(best + centre)), float(c - b * b / (4 * a)), bool(x.min() <= best + centre <= x.max()))


class IsoFlop(NamedTuple):
    """What an isoFLOP fit gives. minima: one a budget. model, tokens: `PowerLaw`s of the best M and D over C."""

    minima: list[Minimum]
    model: PowerLaw
    tokens: PowerLaw


def fit_isoflop(budgets, sizes, losses, **options) -> IsoFlop:
    """Laws of the best model and data for a compute budget.

    Args:
      budgets: `[n]`, C of each run; runs of one budget have the same C.
      sizes: `[n]`, M of each run (or any other measure s of size, with D = C / s).
      losses: `[n]`, final losses.
      options: of `fit_power_law`.

    Returns:
      `IsoFlop`; its exponents add up to 1, since D = C / M.

    Raises:
      ValueError: fewer than two budgets, or a budget that `parabola_minimum` refuses.
    """
    budgets, sizes, losses = (np.asarray(a, np.float64) for a in (budgets, sizes, losses))
    each = np.unique(budgets)
    if len(each) < 2:
        raise ValueError(f"fit_isoflop: budgets {each.tolist()}, expected two different ones or more")
    minima = [parabola_minimum(sizes[budgets == c], losses[budgets == c]) for c in each]
    best = np.array([minimum.size for minimum in minima])
    return IsoFlop(minima, fit_power_law(each, best, **options), fit_power_law(each, each / best, **options))
