"""Three masks against one where a click may mean two things: python benchmarks/nets/sam_ambiguity.py writes the .json

Images of 24 x 24 hold a disc inside a square, and every click lies in the disc; whether the disc or the square is meant
is a coin's toss. A tiny SAM, trained with as many masks as it answers with. IoUs are means over 256 new images and both
meanings: of the best of the masks (oracle), and of the one that the network itself predicts to be best.
(Kirillov et al. 2023, arXiv 2304.02643, section 3: the loss of the best mask resolves ambiguity.)
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro

from jaxrl.losses.segmentation import iou, sam_loss
from jaxrl.nets.vision.sam import SAM, SAMConfig, prompt
from jaxrl.segment import sample_point

SIDE = 24


@dataclass(frozen=True)
class Options:
    """What is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 500
    batch: int = 16
    learning_rate: float = 2e-3
    images: int = 256  # of the test


def network(masks: int) -> SAMConfig:
    """A SAM that fits a CPU: patches of 4 pixels, one windowed and one global block."""
    sizes = {"width": 32, "layers": 2, "heads": 4, "global_every": 2, "ffn": 64, "window": 3, "image": SIDE, "patch": 4}
    decoder = {"channels": 32, "decoder_heads": 4, "decoder_ffn": 64, "iou_hidden": 32}
    return SAMConfig(**sizes, **decoder, masks=masks)


def scenes(key: jax.Array, number: int):
    """(images [N, 24, 24, 3], discs and squares, bool [N, 24, 24])."""
    at, inner, outer, shift, colours, noise = jax.random.split(key, 6)
    pixel = jnp.stack(jnp.meshgrid(jnp.arange(SIDE), jnp.arange(SIDE)), axis=-1)[None].astype(jnp.float32)
    half = jax.random.uniform(outer, (number, 1, 1), minval=6.0, maxval=9.0)
    radius = jax.random.uniform(inner, (number, 1, 1), minval=2.5, maxval=4.5)
    centre = SIDE / 2 + jax.random.uniform(at, (number, 1, 1, 2), minval=-3.0, maxval=3.0)
    off = jax.random.uniform(shift, (number, 1, 1, 2), minval=-1.0, maxval=1.0)
    square = jnp.max(jnp.abs(pixel - centre), axis=-1) < half
    disc = jnp.sum(jnp.square(pixel - centre - off), axis=-1) < jnp.square(radius)
    colour = 0.3 * jax.random.normal(colours, (number, 3, 1, 1, 3)) + jnp.array([0.0, 1.0, 2.0]).reshape(1, 3, 1, 1, 1)
    images = jnp.where(disc[..., None], colour[:, 2], jnp.where(square[..., None], colour[:, 1], colour[:, 0]))
    return images - 1 + 0.1 * jax.random.normal(noise, images.shape), disc, square


@partial(jax.jit, static_argnums=(0, 1))
def run(masks: int, options: Options, seed: jax.Array):
    """Train and measure: a dict of figures."""
    config = network(masks)
    start, training, testing = jax.random.split(jax.random.key(seed), 3)
    schedule = optax.cosine_decay_schedule(options.learning_rate, options.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def answer(params, images, points):
        logits, ious = SAM(config).apply({"params": params}, images, prompt(points[:, None]))
        return logits[:, 1:], ious[:, 1:]

    def step(state, key):
        params, moments = state
        scene, click, toss = jax.random.split(key, 3)
        images, disc, square = scenes(scene, options.batch)
        points, _ = sample_point(click, disc)
        target = jnp.where(jax.random.bernoulli(toss, 0.5, (options.batch, 1, 1)), disc, square)

        def loss(params):
            return sam_loss(*answer(params, images, points), target)[0].mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    images, disc, square = scenes(testing, options.images)
    points, _ = sample_point(jax.random.fold_in(testing, 1), disc)
    params = SAM(config).init(start, images[:1], prompt(points[:1, None]))["params"]
    (params, _), losses = jax.lax.scan(
        step, (params, optimizer.init(params)), jax.random.split(training, options.steps)
    )
    logits, predicted = answer(params, images, points)
    true = jnp.stack([iou(logits, jnp.broadcast_to(x[:, None], logits.shape)) for x in (disc, square)], axis=1)
    chosen = jnp.take_along_axis(true, jnp.argmax(predicted, axis=-1)[:, None, None], axis=-1)
    figures = {"oracle": true.max(-1).mean(), "disc": true[:, 0].max(-1).mean(), "square": true[:, 1].max(-1).mean()}
    # of a mask whatever is meant: what the head is trained on
    expected = true.mean(axis=1)
    correlation = jnp.corrcoef(jnp.stack([predicted.ravel(), expected.ravel()]))[0, 1]
    return figures | {"predicted": chosen.mean(), "correlation": correlation, "loss": losses[-50:].mean()}


def main(options: Options):
    """Measure and write."""
    rows = []
    columns = "| seed | masks | best of the masks, IoU | disc | square | mask predicted to be best | "
    print(columns + "correlation of predicted and mean true IoU | loss |\n" + "|---" * 8 + "|")
    for seed in options.seeds:
        for masks in (1, 3):
            figures = {name: float(value) for name, value in run(masks, options, seed).items()}
            rows.append({"seed": seed, "masks": masks} | figures)
            names = ("oracle", "disc", "square", "predicted", "correlation", "loss")
            cells = [f"{figures[name]:.3f}" for name in names]
            print(f"| {seed} | {masks} | " + " | ".join(cells) + " |", flush=True)
    text = json.dumps({"options": asdict(options), "rows": rows}, indent=1) + "\n"
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
