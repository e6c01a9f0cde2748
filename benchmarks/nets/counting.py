"""How many squares are there? python benchmarks/nets/counting.py writes counting.json

Images of 16, 24 or 32 pixels a side, in all nine shapes, with 0 to 4 squares of 3 to 5 pixels, their colours and the
noise random, go through a packed ViT into a decoder's tokens, and the answer is one token. Chance is 0.2. Once 2 x 2
patches are merged into one feature (Kimi-VL, arXiv:2504.07491: four times fewer tokens for the decoder), once they are
not. The run is `posttrain.sft` as it stands: 600 steps of 64 out of 4,608 images; 900 others are counted after.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.nets import presets
from jaxrl.nets.language_model import logits
from jaxrl.nets.vision.packed import PackedViTConfig, Patches, pack
from jaxrl.nets.vision_language import VisionLanguageConfig, image_ids, with_images
from jaxrl.posttrain import sft, update
from jaxrl.types import TokenBatch

SEEDS = (0, 1, 2)
STEPS, BATCH, TRAIN, TEST = 600, 64, 512, 100  # images of each shape
SIDES, CELL, MOST = (16, 24, 32), 8, 4
ASK, ZERO = 1, 2  # tokens; counts follow
TOWER = PackedViTConfig(width=64, layers=2, heads=4, ffn=128, out=64, patch=4)
TEXT = presets.tiny(vocab_size=16, width=64, kv_heads=4, rope_sections=(2, 3, 3))
PLAIN = VisionLanguageConfig(TEXT, TOWER)
SETTINGS = {"2 x 2 merged": PLAIN, "not merged": replace(PLAIN, vision=replace(TOWER, merge=1))}


def drawn(draw: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """An image [H, W, 3] with so many squares, each in a cell of 8 x 8 of its own."""
    image = draw.normal(0.0, 0.1, (height, width, 3)).astype(np.float32)
    columns = width // CELL
    for cell in draw.permutation(height // CELL * columns)[:count]:
        side = draw.integers(3, 6)
        y, x = np.array([cell // columns, cell % columns]) * CELL + draw.integers(0, CELL - side + 1, 2)
        image[y : y + side, x : x + side] = draw.uniform(0.5, 1.0, 3)
    return image


def data(config: VisionLanguageConfig, draw: np.random.Generator, number: int) -> tuple[Patches, TokenBatch]:
    """A bank with `number` images of each shape, and the rows that ask about them."""
    length = (SIDES[-1] // config.vision.patch) ** 2
    packed = jax.jit(jax.vmap(lambda image: pack(config.vision, [image], length)))
    banks, counts = [], draw.integers(0, MOST + 1, (len(SIDES) ** 2, number))
    for some, shape in zip(counts, itertools.product(SIDES, SIDES), strict=True):
        bank = packed(np.stack([drawn(draw, count, *shape) for count in some]))
        banks.append(jax.tree.map(lambda x: x[:, 0], bank))
    bank = jax.tree.map(lambda *parts: jnp.concatenate(parts), *banks)
    answers = ZERO + counts.reshape(-1)
    rows = [[*ids, ASK, answer] for (ids,), answer in zip(image_ids(config, bank), answers, strict=True)]
    width = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, len(row) - 1] = 1
    return bank, TokenBatch(jnp.asarray(tokens), jnp.asarray(mask))


def accuracy(config: VisionLanguageConfig, seed: int) -> tuple[float, int]:
    """Share of new images that are counted rightly after training, and tokens of the longest row."""
    draw, (k_init, k_run) = np.random.default_rng(seed), jax.random.split(jax.random.key(seed))
    bank, rows = data(config, draw, TRAIN)
    model = with_images(config, bank)
    optimizer = update.make_optimizer(
        update.OptimizerConfig(learning_rate=2e-3, warmup_steps=STEPS // 12, decay="cosine", decay_steps=STEPS)
    )
    recipe = sft.make(sft.SFTConfig(batch=BATCH), model, optimizer)

    @jax.jit
    def train(rows):
        state = recipe.init(k_run, model.init(k_init))
        return jax.lax.scan(lambda state, _: (recipe.step(state, rows)[0], None), state, length=STEPS)[0].params

    params = train(rows)
    bank, rows = data(config, draw, TEST)
    model = with_images(config, bank)

    @jax.jit
    def right(params, tokens, mask):
        hidden, _ = model.apply(params, tokens[:, :-1])
        guess = jnp.argmax(logits(hidden, model.unembedding(params)), axis=-1)
        return jnp.sum((guess == tokens[:, 1:]) * mask[:, 1:])

    parts = zip(jnp.split(rows.tokens, 9), jnp.split(rows.loss_mask, 9), strict=True)
    return float(sum(right(params, *part) for part in parts) / len(rows.tokens)), rows.tokens.shape[1]


def main():
    """Measures and writes."""
    found = {name: [] for name in SETTINGS}
    print("| seed | " + " | ".join(SETTINGS) + " |\n" + "|---" * (len(SETTINGS) + 1) + "|")
    for seed in SEEDS:
        for name, config in SETTINGS.items():
            share, width = accuracy(config, seed)
            found[name].append({"accuracy": round(share, 4), "tokens": width})
        print(f"| {seed} | " + " | ".join(f"{rows[-1]['accuracy']:.3f}" for rows in found.values()) + " |", flush=True)
    about = {"settings": found, "seeds": SEEDS, "steps": STEPS, "batch": BATCH, "jax": jax.__version__}
    Path(__file__).with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
