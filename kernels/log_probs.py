"""Log-probabilities of chosen tokens, and the entropy of the distribution they were drawn from."""

import jax
import jax.numpy as jnp
from jax import lax

LOGITS_PER_CHUNK = 2 * 2**20  # on CPU chunks of this size also take less time than all tokens at once
LEAST_CHUNK = 128  # tokens, however large the vocabulary: smaller matrix products are slow


@jax.custom_jvp
def _log_prob_and_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_prob, entropy, _ = _statistics(logits, targets)
    return log_prob, entropy


def _statistics(logits, targets):
    """log_prob, entropy, and log p of the whole vocabulary (to be fused into what uses it)."""
    x = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    top = jnp.max(x, axis=-1, keepdims=True)
    z = x - top
    e = jnp.exp(z)
    total = jnp.sum(e, axis=-1)
    log_total = jnp.log(total)
    mean_z = jnp.sum(jnp.where(e > 0, e * z, 0.0), axis=-1) / total
    chosen = (jnp.take_along_axis(x, targets[..., None], axis=-1) - top)[..., 0]
    return chosen - log_total, log_total - mean_z, z - log_total[..., None]


@_log_prob_and_entropy.defjvp
def _log_prob_and_entropy_jvp(primals, tangents):
    """d log p_y = sum_v (1[v = y] - p_v) dx_v;  dH = -sum_v p_v (log p_v + H) dx_v."""
    logits, targets = primals
    log_prob, entropy, log_p = _statistics(logits, targets)
    dx = tangents[0].astype(log_p.dtype)
    p = jnp.exp(log_p)
    hit = lax.broadcasted_iota(targets.dtype, log_p.shape, log_p.ndim - 1) == targets[..., None]
    d_log_prob = jnp.sum((hit - p) * dx, axis=-1)
    d_entropy = -jnp.sum(jnp.where(p > 0, p * (log_p + entropy[..., None]), 0.0) * dx, axis=-1)
    return (log_prob, entropy), (d_log_prob, d_entropy)


def select_log_probs(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target under softmax(logits), and the entropy of that distribution.

        log p(y) = x_y - lse(x);   H = lse(x) - sum_v softmax(x)_v x_v

    Computed in float32. Logits of -inf (tokens that a sampler has ruled out) have probability 0 and add
    nothing to the entropy. Differentiable in both modes.

    Args:
      logits: [..., V], any float dtype.
      targets: int [...], token ids in [0, V). This cannot be checked under jit: a negative id counts from the
        end and an id of V or more gives NaN.

    Returns:
      log_probs [...] and entropy [...], both in nats, float32.

    Raises:
      ValueError: targets that are not integers or do not have the shape of logits without its last axis.
    """
    if not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise ValueError(f"select_log_probs: targets are {jnp.result_type(targets)}, expected integers.")
    if jnp.ndim(logits) < 1 or jnp.shape(targets) != jnp.shape(logits)[:-1]:
        raise ValueError(
            f"select_log_probs: targets have shape {jnp.shape(targets)}, expected that of logits "
            f"{jnp.shape(logits)} without its last axis V."
        )
    return _log_prob_and_entropy(logits, targets)


def token_log_probs(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    soft_cap: float | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of tokens from hidden states, without ever holding the logits of all of them.

        x = hidden @ unembedding;  x = soft_cap * tanh(x / soft_cap);  x = x / temperature
        then log-probabilities and entropy as in `select_log_probs`

    More than `chunk` tokens are worked on chunk by chunk; the backward pass computes each chunk's logits
    anew, so that neither pass holds a [B, T, V] array.

    Args:
      hidden: [B, T, D], the last hidden states (after the final norm).
      unembedding: [D, V].
      targets: int [B, T] in [0, V) (see `select_log_probs`): the token that hidden[:, t] predicts.
      temperature: the sampling temperature, a positive number or a traced scalar.
      soft_cap: bound on the logits before the temperature (Gemma 2), or None.
      chunk: tokens per chunk; default about two million logits' worth, at least 128 tokens.

    Returns:
      log_probs [B, T] and entropy [B, T] of the tempered distribution, in nats, float32.

    Raises:
      ValueError: shapes that do not fit; a temperature, soft_cap or chunk that is not positive.
    """
    _check(hidden, unembedding, targets, temperature, soft_cap, chunk)
    b, t, d = hidden.shape
    vocabulary = unembedding.shape[1]
    if chunk is None:
        chunk = max(LEAST_CHUNK, LOGITS_PER_CHUNK // vocabulary)
    acc = jnp.promote_types(hidden.dtype, jnp.float32)

    def tokens(hidden, unembedding, targets):
        x = jnp.matmul(hidden, unembedding, preferred_element_type=acc)
        if soft_cap is not None:
            x = soft_cap * jnp.tanh(x / soft_cap)
        return select_log_probs(x / temperature, targets)

    hidden, targets = hidden.reshape(b * t, d), targets.reshape(b * t)
    if b * t <= chunk:
        log_probs, entropy = tokens(hidden, unembedding, targets)
        return log_probs.reshape(b, t), entropy.reshape(b, t)
    n = -(-b * t // chunk)
    pad = n * chunk - b * t
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(n, chunk, d)
    targets = jnp.pad(targets, (0, pad)).reshape(n, chunk)
    weight = unembedding.astype(acc)  # so that the gradients of the chunks are summed in float32
    one = jax.checkpoint(lambda h, w, y: tokens(h, w.astype(unembedding.dtype), y))
    log_probs, entropy = lax.map(lambda hy: one(hy[0], weight, hy[1]), (hidden, targets))
    return log_probs.reshape(-1)[: b * t].reshape(b, t), entropy.reshape(-1)[: b * t].reshape(b, t)


def _check(hidden, unembedding, targets, temperature, soft_cap, chunk):
    if jnp.ndim(hidden) != 3 or jnp.ndim(unembedding) != 2 or hidden.shape[-1] != unembedding.shape[0]:
        raise ValueError(
            f"token_log_probs: hidden {jnp.shape(hidden)} and unembedding {jnp.shape(unembedding)}, "
            "expected [B, T, D] and [D, V] with the same D (transpose an embedding table [V, D])."
        )
    if jnp.shape(targets) != hidden.shape[:2]:
        raise ValueError(
            f"token_log_probs: targets have shape {jnp.shape(targets)}, expected [B, T] = {hidden.shape[:2]}."
        )
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(
            f"token_log_probs: temperature = {temperature}, expected a positive number; for greedy sampling, "
            "score with the untempered distribution (temperature=1)."
        )
    if isinstance(soft_cap, int | float) and soft_cap <= 0:
        raise ValueError(f"token_log_probs: soft_cap = {soft_cap}, expected a positive number or None.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"token_log_probs: chunk = {chunk} tokens, expected at least 1.")
