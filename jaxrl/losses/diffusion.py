"""Losses of discrete diffusion, per token: what a network that undoes noise is trained by.

Noise keeps a token with probability alpha(t) and otherwise draws it from the noise distribution: the mask token
("absorbing") or any token alike ("uniform"); alpha falls from 1 to 0 as t goes from 0 to 1. Each loss is the part of
one token in a bound on -log p(x), at one t; its mean over t ~ U(0, 1) and over noise is the bound. Reduce with
`losses.reduce`: `tokens` divides by all tokens (never by the masked ones alone), `sequences` by each row's own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import choice, same_shape

NOISES = ("absorbing", "uniform")


class Level(NamedTuple):
    """Noise at a time t: the share of tokens that it spares, and d alpha / dt <= 0; arrays of one shape."""

    alpha: jax.Array
    slope: jax.Array


SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 1.0 - jnp.cos(0.5 * jnp.pi * (1.0 - t)),
    "square": lambda t: 1.0 - jnp.square(t),
    "geometric": lambda t: jnp.exp(-(1e-5 ** (1.0 - t)) * 20.0**t),
}
"""alpha(t) by name: "linear" is that of LLaDA, and of MDLM as "log-linear"; "cosine" leaves few masks for most of the
time; "geometric" is SEDD's, whose alpha(0) and alpha(1) are only nearly 1 and 0."""


def level(schedule: str, t: jax.Array) -> Level:
    """alpha and its slope at times t, of any shape."""
    alpha, slope = jax.jvp(choice("schedule", schedule, SCHEDULES), (t,), (jnp.ones_like(t),))
    return Level(alpha, slope)


def masked_weight(at: Level) -> jax.Array:
    """-alpha' / (1 - alpha), what a masked token's cross-entropy weighs: 1 / t for the linear schedule."""
    return jnp.where(at.alpha < 1.0, -at.slope / jnp.where(at.alpha < 1.0, 1.0 - at.alpha, 1.0), 0.0)


def masked(log_probs: jax.Array, is_masked: jax.Array, weight: jax.Array) -> jax.Array:
    """Masked diffusion's bound on -log p, token by token: weight * (-log p(token | what is not masked)).

    (Sahoo et al. 2024, MDLM, arXiv 2406.07524, eq. 10; Nie et al. 2025, LLaDA, arXiv 2502.09992, eq. 3.) The weight
    decides the form: `masked_weight` at a random time; 1 / t with t ~ U(eps, 1), which is LLaDA's; or n / m for m of n
    tokens masked, m uniform in 1..n, which has the same mean and less variance.

    Args:
      log_probs: [B, T] of the clean tokens, the mask token ruled out (`diffusion.log_probs`).
      is_masked: [B, T], true where the network saw the mask. Others are copied, which costs nothing, and are not read.
      weight: [B, T].

    Returns:
      [B, T] float32.
    """
    same_shape("[B, T]", log_probs=log_probs, is_masked=is_masked, weight=weight)
    return jnp.where(is_masked, -jnp.asarray(weight, jnp.float32) * jnp.asarray(log_probs, jnp.float32), 0.0)


def posterior(
    x0: jax.Array, noisy: jax.Array, alpha_s: jax.Array, alpha_t: jax.Array, *, noise: str, mask_id: int | None = None
) -> jax.Array:
    """q(x_s | x_t, x_0) of the less noisy token at s < t, where x_0 is a distribution rather than a token.

        q(x_s | x_t, x_0) ~ (a 1[x_s = x_t] + (1 - a) noise(x_t)) (alpha_s x_0(x_s) + (1 - alpha_s) noise(x_s)),
        a = alpha_t / alpha_s

    (Austin et al. 2021, D3PM, arXiv 2107.03006, eqs. 3 and 4.)

    Args:
      x0: [B, T, V] probabilities: one-hot for the truth, or the network's.
      noisy: [B, T] tokens x_t.
      alpha_s, alpha_t: [B, T], 1 >= alpha_s > alpha_t >= 0.
      noise: "absorbing" or "uniform".
      mask_id: the absorbing token.

    Returns:
      [B, T, V] float32.
    """
    vocabulary = x0.shape[-1]
    pi = _noise(noise, vocabulary, mask_id)[None, None]
    here = jax.nn.one_hot(noisy, vocabulary)
    stay, alpha_s = (alpha_t / alpha_s)[..., None], alpha_s[..., None]
    came = stay * here + (1.0 - stay) * (here * pi).sum(-1, keepdims=True)
    both = came * (alpha_s * jnp.asarray(x0, jnp.float32) + (1.0 - alpha_s) * pi)
    return both / both.sum(-1, keepdims=True)


def d3pm(
    logits: jax.Array,
    tokens: jax.Array,
    noisy: jax.Array,
    alpha_s: jax.Array,
    alpha_t: jax.Array,
    *,
    noise: str,
    mask_id: int | None = None,
) -> jax.Array:
    """One step of D3PM's bound: KL(q(x_s | x_t, x_0) || p(x_s | x_t)), p the posterior under the network's x_0.

    With alpha_s = 1, the last step, this is -log p(x_0 | x_t). For n steps, multiply a random step's value by n. With
    absorbing noise and n -> infinity that is `masked`. (Austin et al. 2021, arXiv 2107.03006, eqs. 1 and 4. Their
    auxiliary loss is `tokens.cross_entropy` on the same logits, and the bound's constant KL at t = 1 is left out.)

    Args:
      logits: [B, T, V] of x_0. With absorbing noise the mask token's is taken to be -inf.
      tokens: [B, T] clean.
      noisy: [B, T], at time t.
      alpha_s, alpha_t: [B, T] at times s < t.
      noise, mask_id: see `posterior`.

    Returns:
      [B, T] float32, of O(B T V) memory: the sum over x_s needs every probability.
    """
    _check(logits, tokens, noisy, alpha_s=alpha_s, alpha_t=alpha_t)
    absorbing, vocabulary = noise == "absorbing", logits.shape[-1]
    logits = jnp.asarray(without(logits, mask_id) if absorbing else logits, jnp.float32)
    x0 = jax.nn.softmax(logits)
    if absorbing:  # what is not masked is copied
        x0 = jnp.where((noisy == mask_id)[..., None], x0, jax.nn.one_hot(noisy, vocabulary))
    at: dict = {"noise": noise, "mask_id": mask_id}
    q = posterior(jax.nn.one_hot(tokens, vocabulary), noisy, alpha_s, alpha_t, **at)
    p = posterior(x0, noisy, alpha_s, alpha_t, **at)
    held = q > 0
    log_ratio = jnp.log(jnp.where(held, q, 1.0)) - jnp.log(jnp.where(held, jnp.maximum(p, 1e-30), 1.0))
    return (q * log_ratio).sum(-1)


def score_entropy(
    log_scores: jax.Array, tokens: jax.Array, noisy: jax.Array, at: Level, *, noise: str, mask_id: int | None = None
) -> jax.Array:
    """SEDD's denoising score entropy, weighted into a bound on -log p.

        sigma' sum_{y != x_t} Q(y, x_t) (s_y - r_y log s_y + r_y (log r_y - 1)),
        r_y = q(y | x_0) / q(x_t | x_0),  sigma = -log alpha

    Q is 1 / V for uniform noise, and for absorbing noise 1 from every token into the mask: only masked tokens count.
    With scores alpha / (1 - alpha) p(y) the absorbing form is `masked`. (Lou et al. 2024, arXiv 2310.16834, theorem
    3.6 and section 3.3.)

    Args:
      log_scores: [B, T, V], log s_y: the network's estimate of log p_t(y) / p_t(x_t), y in place of x_t.
      tokens, noisy: [B, T], clean and at time t.
      at: alpha and slope, [B, T] each.
      noise, mask_id: see `posterior`.

    Returns:
      [B, T] float32.
    """
    _check(log_scores, tokens, noisy, alpha=at.alpha, slope=at.slope)
    vocabulary = log_scores.shape[-1]
    pi = _noise(noise, vocabulary, mask_id)[None, None]
    log_scores = jnp.asarray(log_scores, jnp.float32)
    clean, here = jax.nn.one_hot(tokens, vocabulary), jax.nn.one_hot(noisy, vocabulary)
    alpha = at.alpha[..., None]
    q = alpha * clean + (1.0 - alpha) * pi
    ratio = q / (q * here).sum(-1, keepdims=True)
    others = 1.0 - here if noise == "uniform" else (1.0 - pi) * here[..., mask_id, None]  # pyright: ignore
    rate = 1.0 / vocabulary if noise == "uniform" else 1.0
    held = (others > 0) & (ratio > 0)
    log_ratio = jnp.log(jnp.where(held, ratio, 1.0))
    excess = jnp.where(held, ratio * (log_ratio - jnp.where(held, log_scores, 0.0) - 1.0), 0.0)
    scores = jnp.where(others > 0, jnp.exp(jnp.where(others > 0, log_scores, 0.0)), 0.0)
    return -at.slope / at.alpha * rate * (scores + excess).sum(-1)


def without(logits: jax.Array, mask_id: int | None) -> jax.Array:
    """Logits [..., V] under which the mask token is never drawn: SUBS (arXiv 2406.07524, section 3.2.3)."""
    if mask_id is None:
        raise ValueError("mask_id is None, expected the id of the mask token: absorbing noise turns tokens into it")
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(columns == mask_id, -jnp.inf, logits)


def _noise(noise: str, vocabulary: int, mask_id: int | None) -> jax.Array:
    choice("noise", noise, dict.fromkeys(NOISES))
    if noise == "uniform":
        return jnp.full(vocabulary, 1.0 / vocabulary)
    if mask_id is None or not 0 <= mask_id < vocabulary:
        raise ValueError(f"mask_id is {mask_id} of {vocabulary} tokens, expected an id in [0, {vocabulary})")
    return jax.nn.one_hot(mask_id, vocabulary)


def _check(logits: jax.Array, tokens: jax.Array, noisy: jax.Array, **others: jax.Array) -> None:
    if jnp.ndim(logits) != 3:
        raise ValueError(f"logits have shape {jnp.shape(logits)}, expected [B, T, V]: add the missing axes")
    same_shape("[B, T]", tokens=tokens, noisy=noisy, logits_without_V=logits[..., 0], **others)
