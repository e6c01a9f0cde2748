"""Norms of queries and keys bound the logits of attention, a z-loss the normaliser of the vocabulary.

    python benchmarks/nets/qk_norm.py     # three seeds, prints a table and writes qk_norm.json

Four layers of width 64 learn an order-1 Markov language of 64 symbols for 400 steps of 32 rows: without norms of
queries and keys, with the LayerNorms of Chameleon (2024, arXiv:2405.09818), and with their gains fixed at 1. "logit":
the largest |q k| / sqrt(Dh) in the network on held-out rows; with fixed gains it is at most sqrt(Dh) = 4. "log Z":
the root mean square on held-out rows, by the weight of the z-loss.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from jaxrl.data import markov
from jaxrl.losses import reduce
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.nets.rope import rotate
from jaxrl.nets.transformer import Transformer, rotations
from jaxrl.posttrain import sft, update
from jaxrl.types import TokenBatch

sys.path.insert(0, str(Path(__file__).parent))
from training import ngram_nll

SIZES = {"width": 64, "layers": 4, "heads": 4, "kv_heads": 4, "ffn": 128, "max_length": 64}
STEPS, LENGTH = 400, 32
NORMS = ("none", "learnt", "fixed")
WEIGHTS = (0.0, 1e-3, 1e-2)
"""Of the z-loss."""


def largest_logit(config, params, tokens):
    """Over all layers, heads and pairs."""
    wanted = lambda module, _: module.name in (("q_norm", "k_norm") if config.qk_norm else ("q", "k"))
    _, found = Transformer(config).apply({"params": params}, tokens, capture_intermediates=wanted)
    q, k = (
        found["intermediates"]["layers"]["attention"][n + "_norm" * bool(config.qk_norm)]["__call__"][0] for n in "qk"
    )
    cos, sin = rotations(config, jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape))
    turned = lambda x: jax.vmap(lambda y: rotate(y.reshape(*tokens.shape, config.heads, -1), cos, sin))(x)
    scores = jnp.einsum("lbthd,lbshd->lbhts", turned(q), turned(k)) * config.head_size**-0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.max(jnp.where(causal[None, None, None], jnp.abs(scores), 0.0))


def text(keys):
    """Rows to learn from, and held-out ones."""
    chain = markov.chain(keys[0], symbols=64, order=1)
    return markov.sample(keys[1], chain, rows=2048, length=LENGTH), markov.sample(
        keys[2], chain, rows=64, length=LENGTH
    )


def pairs(seed: int) -> float:
    """The loss of counted pairs, the baseline."""
    return ngram_nll(*text(jax.random.split(jax.random.key(seed), 5)), 2, first=1)


def run(seed: int, *, rate: float, norms: str, z_loss: float = 0.0) -> dict:
    """One training run."""
    keys = jax.random.split(jax.random.key(seed), 5)
    data, held_out = text(keys)
    config = presets.tiny(64, **SIZES, qk_norm=False if norms == "none" else "heads")
    model = language_model(config)
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=rate))
    if norms == "fixed":
        named = lambda path, _: any(name in jax.tree_util.keystr(path) for name in ("q_norm", "k_norm"))
        of_norms = lambda params: jax.tree.map_with_path(named, params)
        optimizer = optax.chain(optimizer, optax.masked(optax.set_to_zero(), of_norms))
    recipe = sft.make(sft.SFTConfig(batch=32, z_loss=z_loss), model, optimizer)
    rows = lambda tokens: TokenBatch(jnp.asarray(tokens), jnp.ones(tokens.shape))

    @jax.jit
    def train(keys, data, held_out):
        state = recipe.init(keys[0], model.init(keys[1]))
        state, _ = jax.lax.scan(lambda state, _: recipe.step(state, data), state, length=STEPS)
        loss: reduce.Weighted = sft.loss(model, state.params, held_out)[0]
        squared: reduce.Weighted = sft.loss(model, state.params, held_out, z_loss=1.0)[1]["train/log_z_squared"]
        logit = largest_logit(config, state.params, held_out.tokens)
        return {"loss": loss.mean, "logit": logit, "log_z": jnp.sqrt(squared.mean)}

    found = jax.tree.map(float, train(keys[3:], rows(data), rows(held_out)))
    return {"seed": seed, "rate": rate, "norms": norms, "z_loss": z_loss, **found}


def main() -> None:
    """Prints a row for each rate and seed, then for each seed the weights of the z-loss."""
    heading = " | ".join(f"{what}, {norms}" for what in ("logit", "loss") for norms in NORMS)
    print(f"| learning rate | seed | {heading} | of pairs |\n{'|---' * 9}|")
    found = []
    for rate in (3e-3, 3e-2):
        for seed in (0, 1, 2):
            each = [run(seed, rate=rate, norms=norms) | {"pairs": pairs(seed)} for norms in NORMS]
            found += each
            cells = [f"{one[what]:.{digits}f}" for what, digits in (("logit", 1), ("loss", 3)) for one in each]
            cells.append(f"{each[0]['pairs']:.3f}")
            print(f"| {rate} | {seed} | {' | '.join(cells)} |", flush=True)
    heading = " | ".join(f"{what}, {weight}" for what in ("log Z", "loss") for weight in WEIGHTS)
    print(f"\n| seed | {heading} |\n|{'---|' * 7}")
    for seed in (0, 1, 2):
        each = [run(seed, rate=3e-3, norms="learnt", z_loss=weight) for weight in WEIGHTS]
        found += each
        cells = (f"{one[what]:.{digits}f}" for what, digits in (("log_z", 2), ("loss", 3)) for one in each)
        print(f"| {seed} | {' | '.join(cells)} |", flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
