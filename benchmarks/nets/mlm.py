"""Masked tokens of a Markov language: python benchmarks/nets/mlm.py prints a table and writes mlm.json

The language is a chain of order 1 over 32 symbols, so a masked symbol with both neighbours in sight has a known
distribution, p(x_t | x_(t-1), x_(t+1)) ~ P[x_(t-1), x_t] P[x_t, x_(t+1)]: how often its best guess is right, and its
entropy, are what no network can beat. One symbol of each held-out row is masked. Beside them stand the best guess from
the symbol before alone, which a network that sees one side cannot beat, and the network before training.

"probe" is a linear read-out, fitted by least squares on half of the held-out rows, of whether the masked symbol is odd,
from the last hidden state at its place: of the trained network, of the untrained one, and the exact posterior's guess.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

from jaxrl.data import markov
from jaxrl.nets.encoder import Encoder, EncoderConfig, masked_language_model, unembedding
from jaxrl.nets.encoder_presets import encoder
from jaxrl.nets.language_model import logits
from jaxrl.posttrain import masked


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 1500
    batch: int = 64
    rows: int = 8192
    length: int = 24
    symbols: int = 32
    width: int = 48
    layers: int = 2
    learning_rate: float = 2e-3
    held_out: int = 2048
    out: Path = Path(__file__).with_suffix(".json")


def posterior(table, before, after):
    """p(x | symbol before, symbol after), [N, V]."""
    both = table[before] * table[:, after].T
    return both / both.sum(-1, keepdims=True)


def probe(features, labels):
    """Accuracy on the second half of a ridge regression to -1 and 1 fitted on the first."""
    x = jnp.concatenate([features, jnp.ones_like(features[:, :1])], axis=1)
    half = len(x) // 2
    penalty = 1e-3 * half * jnp.eye(x.shape[1])
    weights = jnp.linalg.solve(x[:half].T @ x[:half] + penalty, x[:half].T @ (2.0 * labels[:half] - 1.0))
    return ((x[half:] @ weights > 0) == labels[half:]).mean()


def judge(config, options, params, table, tokens, columns):
    """What the network and the formulas say of the symbols at `columns` of held-out rows."""
    rows = jnp.arange(len(tokens))
    truth = tokens[rows, columns]
    found: Any = Encoder(config).apply({"params": params}, tokens.at[rows, columns].set(options.symbols))
    guess = jax.nn.softmax(logits(found.masked[rows, columns], unembedding(config, params))[:, : options.symbols])
    exact = posterior(table, tokens[rows, columns - 1], tokens[rows, columns + 1])
    right = lambda p: (p.argmax(-1) == truth).mean()
    odd = exact[:, 1::2].sum(-1) > 0.5
    return {
        "accuracy": right(guess),
        "exact": right(exact),
        "one_side": right(table[tokens[rows, columns - 1]]),
        "agreement": (guess.argmax(-1) == exact.argmax(-1)).mean(),
        "total_variation": 0.5 * jnp.abs(guess - exact).sum(-1).mean(),
        "kl": (exact * (jnp.log(exact) - jnp.log(guess))).sum(-1).mean(),
        "probe": probe(found.hidden[rows, columns], truth % 2),
        "probe_exact": (odd == truth % 2).mean(),
    }


def main():
    """Measures and writes."""
    options = tyro.cli(Options)
    sizes = {"vocab_size": options.symbols + 1, "max_length": options.length, "token_types": 0, "remat": "none"}
    config = EncoderConfig(encoder(options.width, options.layers, 4, **sizes))
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, options.steps // 10, options.steps)
    loss = functools.partial(masked.bert_loss, config)
    setting = masked.MaskedConfig(batch=options.batch)
    run = masked.make(setting, loss, optax.adam(schedule), mask_id=options.symbols, words=options.symbols)
    step = lambda texts: lambda state, _: (run.step(state, texts)[0], None)
    train = jax.jit(lambda state, texts: jax.lax.scan(step(texts), state, None, options.steps)[0])
    test = jax.jit(functools.partial(judge, config, options))
    names = ["accuracy", "untrained", "exact", "one_side", "agreement", "total_variation", "kl"]
    names += ["probe", "probe_untrained", "probe_exact"]
    print(f"| seed | {' | '.join(names)} | seconds, with compilation |\n{'|---' * (len(names) + 2)}|")
    rows = []
    for seed in options.seeds:
        keys = jax.random.split(jax.random.key(seed), 6)
        table = markov.chain(keys[0], symbols=options.symbols, order=1)
        tokens = markov.sample(keys[1], table, rows=options.rows + options.held_out, length=options.length)
        texts, held = tokens[: options.rows], tokens[options.rows :]
        texts = masked.Texts(texts, jnp.ones_like(texts), jnp.ones(texts.shape, bool))
        columns = jax.random.randint(keys[2], (options.held_out,), 1, options.length - 1)
        state = run.init(keys[3], masked_language_model(config).init(keys[4]))
        before = test(state.params, table, held, columns)
        began = time.perf_counter()
        state = jax.block_until_ready(train(state, texts))
        seconds = time.perf_counter() - began
        found = test(state.params, table, held, columns)
        found |= {"untrained": before["accuracy"], "probe_untrained": before["probe"]}
        row = {"seed": seed, **{name: float(found[name]) for name in names}, "seconds": seconds}
        rows.append(row)
        print(f"| {seed} | {' | '.join(f'{row[name]:.3f}' for name in names)} | {seconds:.0f} |", flush=True)
    setting = {name: value for name, value in vars(options).items() if name != "out"}
    options.out.write_text(json.dumps({"options": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
