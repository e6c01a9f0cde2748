"""What clicks are worth: python benchmarks/nets/sam_clicks.py writes sam_clicks.json

The pictures of sam_ambiguity, a disc inside a square. What is meant is the disc, the square, or the square without the
disc, so one click cannot tell. A tiny SAM learns from whole conversations (`jaxrl.segment.loss`: a point or a box,
eight clicks, two rounds without one). In the test a conversation begins with a click in what is meant, each further one
lies where the answer is wrong, and IoUs are means over 256 new pictures of the answer that a user sees: after one click
that of three masks which the network predicts to be best, later the single mask. Beside it the best of the three.
(Kirillov et al. 2023, arXiv 2304.02643, appendix A.)
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro
from sam_ambiguity import network, scenes

from jaxrl.losses.segmentation import iou
from jaxrl.nets.vision.sam import ABSENT, FOREGROUND, PADDING, SAM, Prompts, prompt
from jaxrl.segment import loss, next_click, sample_point, to_image

CONFIG = network(3)
SHOWN = (1, 2, 3, 5, 8)


@dataclass(frozen=True)
class Options:
    """What is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 1000
    batch: int = 16
    learning_rate: float = 2e-3
    clicks: int = 8  # of training, after the first prompt
    images: int = 256  # of the test


def meant(key: jax.Array, number: int):
    """(images [N, 24, 24, 3], targets bool [N, 24, 24]: a disc, a square, or the square without the disc)."""
    scene, which = jax.random.split(key)
    images, disc, square = scenes(scene, number)
    choices = jnp.stack([disc, square & ~disc, square | disc])
    return images, choices[jax.random.randint(which, (number,), 0, 3), jnp.arange(number)]


def talk(params, images: jax.Array, target: jax.Array, key: jax.Array):
    """IoUs after 1 ... 8 clicks: (of the answer shown [8], of the best of three after one click [])."""
    b, rounds = images.shape[0], SHOWN[-1]
    embeddings = SAM(CONFIG).apply({"params": params}, images, method="encode")
    first, rest = jax.random.split(key)
    point, _ = sample_point(first, target)
    several = jnp.arange(1 + CONFIG.masks) > 0
    points = jnp.zeros((b, 1 + rounds + 1, 2)).at[:, 1].set(to_image(CONFIG, point))
    labels = jnp.full(points.shape[:2], ABSENT).at[:, 0].set(PADDING).at[:, 1].set(FOREGROUND)

    def play(carry, x):
        points, labels, fed = carry
        i, key = x
        given = Prompts(points, labels, fed, jnp.broadcast_to(i > 0, (b,)))
        logits, predicted = SAM(CONFIG).apply({"params": params}, embeddings, given, method="decode")
        true = iou(logits, jnp.broadcast_to(target[:, None], logits.shape))
        asked = jnp.where(i == 0, several, ~several)[None]
        best = jnp.argmax(jnp.where(asked, predicted, -jnp.inf), axis=-1)[:, None]
        fed = jnp.take_along_axis(logits, best[..., None, None], axis=1)[:, 0]
        at, label = next_click(key, CONFIG, fed, target)
        points, labels = points.at[:, i + 2].set(at), labels.at[:, i + 2].set(label)
        shown = jnp.take_along_axis(true, best, axis=1).mean()
        return (points, labels, fed), (shown, jnp.where(asked, true, 0.0).max(axis=-1).mean())

    carry = (points, labels, jnp.zeros(target.shape))
    _, (shown, oracle) = jax.lax.scan(play, carry, (jnp.arange(rounds), jax.random.split(rest, rounds)))
    return shown, oracle[0]


@partial(jax.jit, static_argnums=0)
def run(options: Options, seed: jax.Array):
    """Train and measure: (IoUs of `talk`, the best of three, the loss of the last 50 steps)."""
    start, training, testing = jax.random.split(jax.random.key(seed), 3)
    schedule = optax.cosine_decay_schedule(options.learning_rate, options.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def step(state, key):
        params, moments = state
        scene, chat = jax.random.split(key)
        images, target = meant(scene, options.batch)
        mean = lambda params: loss(CONFIG, params, images, target, chat, clicks=options.clicks)[0].mean()
        value, gradient = jax.value_and_grad(mean)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    scene, chat = jax.random.split(testing)
    images, target = meant(scene, options.images)
    params = SAM(CONFIG).init(start, images[:1], prompt(jnp.zeros((1, 1, 2))))["params"]
    keys = jax.random.split(training, options.steps)
    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return *talk(params, images, target, chat), losses[-50:].mean()


def main(options: Options):
    """Measure and write."""
    rows = []
    columns = ("seed", *(f"IoU, clicks: {n}" for n in SHOWN), "best of three, 1 click", "loss")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for seed in options.seeds:
        shown, oracle, value = jax.device_get(run(options, seed))
        figures = {"iou": {n: round(float(shown[n - 1]), 4) for n in SHOWN}, "oracle": round(float(oracle), 4)}
        rows.append({"seed": seed} | figures | {"loss": round(float(value), 4)})
        cells = [f"{x:.3f}" for x in (*figures["iou"].values(), oracle, value)]
        print(f"| {seed} | " + " | ".join(cells) + " |", flush=True)
    text = json.dumps({"options": asdict(options), "rows": rows}, indent=1) + "\n"
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
