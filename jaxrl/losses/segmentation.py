"""Losses of binary segmentation, a value for each mask: focal, dice, IoU, and Segment Anything's best of several.

Masks are logits [..., height, width]; targets are masks of the same shape, true (or 1) inside. Values are float32.
"""

import jax
import jax.numpy as jnp

from jaxrl.losses.checks import same_shape

Diagnostics = dict[str, jax.Array]
PIXELS = (-2, -1)


def _checked(logits, target) -> tuple[jax.Array, jax.Array]:
    same_shape("[..., height, width]", logits=logits, target=target)
    if jnp.ndim(logits) < 2:
        raise ValueError(f"logits have shape {jnp.shape(logits)}, expected [..., height, width]: masks of two axes")
    return jnp.asarray(logits, jnp.float32), jnp.asarray(target, jnp.float32)


def focal(logits: jax.Array, target: jax.Array, *, alpha: float | None = 0.25, gamma: float = 2.0) -> jax.Array:
    """Mean over pixels of -a_t (1 - p_t)^gamma log p_t: cross-entropy that easy pixels hardly enter.

    p_t is the probability of the pixel's own class, and a_t is alpha inside and 1 - alpha outside (Lin et al. 2017,
    arXiv 1708.02002).

    Args:
      logits, target: [..., height, width].
      alpha: weight of the inside, or None: every pixel counts 1.
      gamma: 0 gives cross-entropy.

    Returns:
      [...].

    Raises:
      ValueError: different shapes, or fewer than two axes.
    """
    logits, target = _checked(logits, target)
    signed = jnp.where(target > 0.5, logits, -logits)  # the logit of p_t
    values = -jax.nn.log_sigmoid(signed) * jnp.exp(gamma * jax.nn.log_sigmoid(-signed))
    if alpha is not None:
        values = values * jnp.where(target > 0.5, alpha, 1 - alpha)
    return jnp.mean(values, axis=PIXELS)


def dice(logits: jax.Array, target: jax.Array, *, smooth: float = 1.0) -> jax.Array:
    """1 - (2 sum p y + smooth) / (sum p + sum y + smooth), p = sigmoid(logits): overlap, however small the object.

    Milletari et al. 2016, arXiv 1606.04797, whose denominator has squares; this form, with 1 added to both sides of the
    fraction so that an empty mask of an empty target loses nothing, is DETR's and MaskFormer's, which Segment Anything
    follows.

    Args:
      logits, target: [..., height, width].
      smooth: see above.

    Returns:
      [...], in [0, 1).

    Raises:
      ValueError: as `focal`.
    """
    logits, target = _checked(logits, target)
    p = jax.nn.sigmoid(logits)
    both = 2 * jnp.sum(p * target, axis=PIXELS) + smooth
    return 1 - both / (jnp.sum(p, axis=PIXELS) + jnp.sum(target, axis=PIXELS) + smooth)


def iou(logits: jax.Array, target: jax.Array, *, threshold: float = 0.0) -> jax.Array:
    """|A and B| / |A or B| of A = (logits > threshold) and the target B; 1 where both are empty. No gradient.

    Args:
      logits, target: [..., height, width].
      threshold: on logits.

    Returns:
      [...], in [0, 1].

    Raises:
      ValueError: as `focal`.
    """
    logits, target = _checked(logits, target)
    inside, wanted = logits > threshold, target > 0.5
    either = jnp.sum(inside | wanted, axis=PIXELS, dtype=jnp.float32)
    both = jnp.sum(inside & wanted, axis=PIXELS, dtype=jnp.float32)
    return jnp.where(either > 0, both / jnp.maximum(either, 1.0), 1.0)


def soft_iou(logits: jax.Array, target: jax.Array, *, smooth: float = 1.0) -> jax.Array:
    """1 - (sum p y + smooth) / (sum (p + y - p y) + smooth), p = sigmoid(logits): a loss whose aim is the IoU.

    Rahman and Wang 2016, "Optimizing intersection-over-union in deep neural networks for image segmentation". It is
    2 d / (1 + d) of the dice loss d without smoothing, where p is 0 or 1.

    Args:
      logits, target: [..., height, width].
      smooth: added to both sides of the fraction.

    Returns:
      [...], in [0, 1).

    Raises:
      ValueError: as `focal`.
    """
    logits, target = _checked(logits, target)
    p = jax.nn.sigmoid(logits)
    both = jnp.sum(p * target, axis=PIXELS)
    either = jnp.sum(p, axis=PIXELS) + jnp.sum(target, axis=PIXELS) - both
    return 1 - (both + smooth) / (either + smooth)


def sam_loss(
    logits: jax.Array,
    ious: jax.Array,
    target: jax.Array,
    *,
    counted: jax.Array | None = None,
    focal_weight: float = 20.0,
    dice_weight: float = 1.0,
    iou_weight: float = 1.0,
) -> tuple[jax.Array, Diagnostics]:
    """min_m (20 focal_m + dice_m) + mean_m (predicted IoU_m - sg IoU_m)^2, for each item; m over the counted masks.

    The smallest is taken for each item, before any mean over a batch, and only the mask that has it gets a gradient: so
    the M answers may part over what an ambiguous prompt means. The IoU head learns from all counted masks; what it is
    to predict is a constant. (Kirillov et al. 2023, arXiv 2304.02643, section 3 and appendix A.)

    Args:
      logits: [..., M, height, width].
      ious: [..., M], predicted.
      target: [..., height, width].
      counted: bool [..., M] or None for all: masks that are asked for. At least one of each item.
      focal_weight, dice_weight, iou_weight: of the terms.

    Returns:
      (values [...], diagnostics, each [...]: "focal", "dice" and "iou" of the chosen mask, "predicted" IoU of the mask
      that is predicted to be best and its true IoU "iou_of_predicted", "iou_error" the MSE term, "chosen" its index).

    Raises:
      ValueError: shapes that do not fit.
    """
    logits = jnp.asarray(logits, jnp.float32)
    if logits.ndim < 3:
        raise ValueError(
            f"logits have shape {logits.shape}, expected [..., M, height, width]: one mask is logits[None]"
        )
    same_shape("[..., M]", logits=logits[..., 0, 0], ious=ious, counted=counted)
    same_shape("[..., height, width]", logits=logits[..., 0, :, :], target=target)
    ious = jnp.asarray(ious, jnp.float32)
    whole = jnp.broadcast_to(jnp.expand_dims(jnp.asarray(target, jnp.float32), -3), logits.shape)
    counted = jnp.ones(ious.shape, bool) if counted is None else jnp.asarray(counted, bool)
    by_mask = {"focal": focal(logits, whole), "dice": dice(logits, whole), "iou": iou(logits, whole)}
    mask_loss = focal_weight * by_mask["focal"] + dice_weight * by_mask["dice"]
    pick = lambda values, at: jnp.take_along_axis(values, at[..., None], axis=-1)[..., 0]
    chosen = jnp.argmin(jnp.where(counted, jax.lax.stop_gradient(mask_loss), jnp.inf), axis=-1)
    best = jnp.argmax(jnp.where(counted, ious, -jnp.inf), axis=-1)
    squares = jnp.square(ious - jax.lax.stop_gradient(by_mask["iou"]))
    error = jnp.sum(jnp.where(counted, squares, 0.0), axis=-1) / jnp.maximum(jnp.sum(counted, axis=-1), 1)
    values = pick(mask_loss, chosen) + iou_weight * error
    diagnostics = {name: pick(value, chosen) for name, value in by_mask.items()}
    diagnostics |= {"predicted": pick(ious, best), "iou_of_predicted": pick(by_mask["iou"], best)}
    return values, diagnostics | {"iou_error": error, "chosen": chosen}
