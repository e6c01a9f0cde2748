"""Whether random erasing helps where something stands before the image: python benchmarks/nets/erasing.py

Writes erasing.json. Needs the digits of scikit-learn (pip install scikit-learn): 1,797 of 8 x 8, 1,297 for training and
500 for the test. A small convolutional network, 800 steps of 64. Test images are whole, or a square of 3 or 4 pixels a
side somewhere in them is noise or black.
"""

import json
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl.data.augment import random_erasing

SEEDS = (0, 1, 2)
STEPS, BATCH, TRAIN = 800, 64, 1297
OCCLUSIONS = {
    "clean": (0, 0.0),
    "3x3 noise": (3, None),
    "4x4 noise": (4, None),
    "3x3 black": (3, 0.0),
    "4x4 black": (4, 0.0),
}


class Network(nn.Module):
    """images [B, 8, 8, 1] -> logits [B, 10]."""

    @nn.compact
    def __call__(self, x):
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


def occluded(key: jax.Array, image: jax.Array, size: int, fill: float | None) -> jax.Array:
    """A square somewhere inside the image is overwritten."""
    k_place, k_noise = jax.random.split(key)
    top, left = jax.random.randint(k_place, (2,), 0, 8 - size + 1)
    noise = jax.random.uniform(k_noise, (size, size, 1)) if fill is None else jnp.full((size, size, 1), fill)
    return jax.lax.dynamic_update_slice(image, noise, (top, left, 0))


MODEL, OPTIMIZER = Network(), optax.adam(1e-3)


@partial(jax.jit, static_argnames="erase")
def step(params, state, key, images, labels, *, erase: bool):
    """One step of training on a random batch."""
    k_rows, k_erase = jax.random.split(key)
    rows = jax.random.randint(k_rows, (BATCH,), 0, TRAIN)
    batch = images[rows]
    if erase:
        batch = jax.vmap(random_erasing)(jax.random.split(k_erase, BATCH), batch)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(MODEL.apply(params, batch), labels[rows]).mean()

    updates, state = OPTIMIZER.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state


def accuracies(key, images, labels, *, erase: bool) -> dict[str, float]:
    """Accuracy on each test, after training with or without erasing."""
    k_split, k_init, k_train, *k_tests = jax.random.split(key, 3 + len(OCCLUSIONS))
    order = jax.random.permutation(k_split, len(images))
    images, labels = images[order], labels[order]
    params = jax.jit(MODEL.init)(k_init, images[:1])
    state = OPTIMIZER.init(params)
    for k_step in jax.random.split(k_train, STEPS):  # XLA on CPU runs convolutions in a scan some 30 times slower
        params, state = step(params, state, k_step, images, labels, erase=erase)
    found = {}
    for (name, (size, fill)), k_test in zip(OCCLUSIONS.items(), k_tests, strict=True):
        seen, right = images[TRAIN:], labels[TRAIN:]
        if size:
            keys = jax.random.split(k_test, len(seen))
            seen = jax.jit(jax.vmap(partial(occluded, size=size, fill=fill)))(keys, seen)
        found[name] = float(jnp.mean(jnp.argmax(MODEL.apply(params, seen), axis=-1) == right))
    return found


def main():
    """Measures and writes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    images, labels = jnp.asarray(digits.images[..., None] / 16, jnp.float32), jnp.asarray(digits.target)
    rows = []
    print("| seed | erasing | " + " | ".join(OCCLUSIONS) + " |\n" + "|---" * (len(OCCLUSIONS) + 2) + "|")
    for seed in SEEDS:
        for erase in (False, True):
            found = accuracies(jax.random.key(seed), images, labels, erase=erase)
            rows.append({"seed": seed, "erasing": erase} | {k: round(v, 4) for k, v in found.items()})
            print(f"| {seed} | {erase} | " + " | ".join(f"{v:.3f}" for v in found.values()) + " |", flush=True)
    gains = {
        name: round(float(np.mean([(1 if row["erasing"] else -1) * row[name] for row in rows]) * 2), 4)
        for name in OCCLUSIONS
    }
    print("mean gain", gains)
    about = {"accuracy": rows, "mean_gain": gains, "steps": STEPS, "batch": BATCH, "jax": jax.__version__}
    Path(__file__).with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
