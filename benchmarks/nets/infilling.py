"""What masked diffusion can fill in: python benchmarks/nets/infilling.py [seeds]

150 pairs of a name A and a description B, three tokens each, are learnt as rows "A R B"; every second pair is also
shown as "B S A". The same network learns them by next-token prediction and by masked diffusion. Accuracy is the share
of pairs with all three tokens right, greedy, over the pairs that were never shown reversed:

  forward    B from "A R"
  infill     A from "_ R B": the layout of training. Left to right, only "" is there to go by.
  reversed   A from "B S", a layout these pairs were not shown in
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import diffusion
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.types import Prompts

sys.path.insert(0, str(Path(__file__).parent))
from training import autoregressive, diffused, rows_of

PAIRS, PART, SYMBOLS = 150, 3, 30
FORWARD, REVERSED, BEGIN, MASK, NONE = range(SYMBOLS, SYMBOLS + 5)  # NONE never comes: rows have one length
MODEL = language_model(
    TransformerConfig(vocab_size=SYMBOLS + 5, width=64, layers=2, heads=4, kv_heads=4, ffn=128, max_length=16)
)
STEPS, BATCH = 2500, 225  # a batch is an epoch
GREEDY = Sampling(temperature=0.0, max_tokens=PART)


def pairs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Names and descriptions [150, 3], each of them once."""
    random = np.random.default_rng(seed)
    codes = random.choice(SYMBOLS**PART, size=2 * PAIRS, replace=False)
    parts = np.stack(np.unravel_index(codes, (SYMBOLS,) * PART), axis=1)
    return parts[:PAIRS], parts[PAIRS:]


def joined(*parts) -> np.ndarray:
    """Rows of parts [n, ...] and of tokens that are the same for all."""
    number = max(len(part) for part in parts if not np.isscalar(part))
    wide = [np.full((number, 1), part) if np.isscalar(part) else part for part in parts]
    return np.concatenate(wide, axis=1).astype(np.int32)


def measure(seeds: list[int]) -> dict[str, list[float]]:
    """Each accuracy for all seeds, which run in one program."""
    stack = lambda of: np.stack([of(*pairs(seed)) for seed in seeds])
    train = stack(
        lambda a, b: np.concatenate([joined(a, FORWARD, b), joined(b[::2], REVERSED, a[::2])])  # every second pair
    )
    names, descriptions = stack(lambda a, b: a[1::2]), stack(lambda a, b: b[1::2])
    forward = stack(lambda a, b: joined(a[1::2], FORWARD))
    reverse = stack(lambda a, b: joined(b[1::2], REVERSED))
    gaps = stack(lambda a, b: joined(np.full((len(a[1::2]), PART), MASK), FORWARD, b[1::2]))
    right = lambda found, wanted: (np.asarray(found) == wanted).all(2).mean(1).round(4).tolist()
    behind = lambda x: np.pad(x, ((0, 0), (0, 0), (1, 0)), constant_values=BEGIN)

    def answers(sampler, params, prompts):
        def one(params, prompts):
            prompts = Prompts(prompts, jnp.full(len(prompts), prompts.shape[1], jnp.int32))
            options = {"eos_id": NONE, "pad_id": NONE, "sampling": GREEDY}
            return sampler(MODEL, params, prompts, jax.random.key(0), **options).completions

        return jax.jit(jax.vmap(one))(params, jnp.asarray(prompts))

    params, _ = autoregressive(MODEL, rows_of(behind(train)), seeds, steps=STEPS, batch=BATCH)
    found = {
        "AR forward": right(answers(rollout, params, behind(forward)), descriptions),
        "AR infill": right(answers(rollout, params, behind(names[..., :0])), names),
        "AR reversed": right(answers(rollout, params, behind(reverse)), names),
    }
    params, losses = diffused(MODEL, rows_of(train), seeds, mask_id=MASK, steps=STEPS, batch=BATCH)
    print(f"loss, by quarters: {losses.reshape(len(seeds), 4, -1).mean(2).round(3).tolist()}", flush=True)
    sampler = partial(diffusion.generate, mask_id=MASK)
    fill = lambda params, rows: diffusion.infill(
        MODEL, params, rows, rows == MASK, jax.random.key(0), sampling=GREEDY, mask_id=MASK
    )
    filled = jax.jit(jax.vmap(fill))(params, jnp.asarray(gaps))
    return found | {
        "diffusion forward": right(answers(sampler, params, forward), descriptions),
        "diffusion infill": right(filled.tokens[..., :PART], names),
        "diffusion reversed": right(answers(sampler, params, reverse), names),
    }


def main():
    seeds = [int(x) for x in sys.argv[1:]] or [0, 1, 2]
    begun = time.time()
    found = measure(seeds)
    Path(__file__).with_suffix(".json").write_text(json.dumps({"seed": seeds, **found}, indent=1) + "\n")
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{x:.2f}' for x in values)} |")
    print(f"({time.time() - begun:.0f} s)")


if __name__ == "__main__":
    main()
