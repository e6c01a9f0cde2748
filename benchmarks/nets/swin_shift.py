"""Whether windows have to move: python benchmarks/nets/swin_shift.py writes swin_shift.json

Two symbols of eight stand side by side on an 8 x 8 map, one on either side of the line between two windows of 4; are
they the same? Without the shift no token ever sees both, and the mean over the map cannot compare them (Liu et al.
2021, arXiv:2103.14030, table 4: about a point on ImageNet). Four layers of width 32, 500 steps of 64 maps.
"""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from jaxrl.nets.vision.swin import Swin, SwinConfig

SEEDS = (0, 1, 2)
SYMBOLS, SIDE, STEPS, BATCH, TEST = 8, 8, 500, 64, 1000
PLAIN = SwinConfig(patch=1, width=32, depths=(4,), heads=(4,), window=4, mlp_ratio=2, classes=2, channels=SYMBOLS + 1)
SETTINGS = {
    "windows that stay": replace(PLAIN, shift=False),
    "windows that move": PLAIN,
    "windows that move, version 2": replace(PLAIN, version=2),
    "one window": replace(PLAIN, window=SIDE),
}


def maps(key: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Maps [number, 8, 8, symbols and the background] and labels [number], half of them 1: same symbol."""
    k_row, k_first, k_step, k_same, k_turn = jax.random.split(key, 5)
    row = jax.random.randint(k_row, (number,), 0, SIDE)
    first = jax.random.randint(k_first, (number,), 0, SYMBOLS)
    other = (first + jax.random.randint(k_step, (number,), 1, SYMBOLS)) % SYMBOLS
    same = jax.random.bernoulli(k_same, 0.5, (number,))
    second = jnp.where(same, first, other)
    each = jnp.arange(number)
    drawn = jnp.full((number, SIDE, SIDE), SYMBOLS)
    drawn = drawn.at[each, row, SIDE // 2 - 1].set(first).at[each, row, SIDE // 2].set(second)
    turned = jax.random.bernoulli(k_turn, 0.5, (number, 1, 1))
    drawn = jnp.where(turned, jnp.swapaxes(drawn, 1, 2), drawn)
    return jax.nn.one_hot(drawn, SYMBOLS + 1), same.astype(jnp.int32)


def accuracy(config: SwinConfig, seed: int) -> float:
    """Share of 1,000 new maps that are judged rightly after training."""
    model, optimizer = Swin(config), optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, STEPS))

    @jax.jit
    def run(key):
        k_init, k_train, k_test = jax.random.split(key, 3)
        params = model.init(k_init, maps(jax.random.key(0), 1)[0])

        def step(carry, key):
            params, state = carry
            images, labels = maps(key, BATCH)

            def loss(params):
                logits = model.apply(params, images)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(k_train, STEPS))
        images, labels = maps(k_test, TEST)
        return jnp.mean(jnp.argmax(model.apply(params, images), axis=-1) == labels)

    return float(run(jax.random.key(seed)))


def main():
    """Measures and writes."""
    found = {name: [] for name in SETTINGS}
    print("| seed | " + " | ".join(SETTINGS) + " |\n" + "|---" * (len(SETTINGS) + 1) + "|")
    for seed in SEEDS:
        for name, config in SETTINGS.items():
            found[name].append(round(accuracy(config, seed), 4))
        print(f"| {seed} | " + " | ".join(f"{values[-1]:.3f}" for values in found.values()) + " |", flush=True)
    about = {"accuracy": found, "seeds": SEEDS, "steps": STEPS, "batch": BATCH, "jax": jax.__version__}
    Path(__file__).with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
