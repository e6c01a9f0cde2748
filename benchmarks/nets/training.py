"""What the experiments with language models share: n-grams beside them, and runs of masked and block diffusion."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import diffusion
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain import sft, update
from jaxrl.text import ngram
from jaxrl.types import TokenBatch


def optimizer(steps: int):
    """AdamW, 3e-3, cosine."""
    return update.make_optimizer(
        update.OptimizerConfig(
            learning_rate=3e-3, warmup_steps=50, decay="cosine", decay_steps=steps, final_fraction=0.05, b2=0.99
        )
    )


def rows_of(tokens) -> TokenBatch:
    """Rows in which every token is learnt, [..., N, T]."""
    return TokenBatch(jnp.asarray(tokens), jnp.ones(tokens.shape))


def ngram_nll(train, test, order: int, *, first: int = 0) -> float:
    """Nats a token of rows [N, T] under an n-gram model of others: the row under which no network should fall.

    Modified Kneser-Ney; first: columns that are left out, such as one that a network does not predict.
    """
    train, test = np.asarray(train), np.asarray(test)
    model = ngram.smooth(ngram.count(train, order, vocab_size=int(train.max()) + 1))
    known = np.concatenate([ngram.contexts(row, order) for row in test])
    return float(-np.log(ngram.probability(model, known, test.reshape(-1))).reshape(test.shape)[:, first:].mean())


def keys_of(seed):
    return jax.random.split(jax.random.key(seed))


def autoregressive(model: LanguageModel, data: TokenBatch, seeds, *, steps: int, batch: int):
    """(parameters, loss of every step) of next-token prediction, for all seeds and their data [S, N, T] at once."""
    recipe = sft.make(sft.SFTConfig(batch=batch), model, optimizer(steps))

    @jax.jit
    @jax.vmap
    def run(keys, data):
        state = recipe.init(keys[0], model.init(keys[1]))
        state, metrics = jax.lax.scan(lambda state, _: recipe.step(state, data), state, length=steps)
        return state.params, metrics["train/loss"]

    return run(jax.vmap(keys_of)(jnp.asarray(seeds)), data)


def diffused(
    model: LanguageModel,
    data: TokenBatch,
    seeds,
    *,
    steps: int,
    batch: int,
    mask_id: int,
    block: int | None = None,
    span=(1e-3, 1.0),
    **noise,
):
    """(parameters, loss of every step) of masked diffusion, or of block diffusion; seeds as above."""
    tx = optimizer(steps)
    value = partial(diffusion.loss, model, mask_id=mask_id, block=block)

    def step(data, state, _):
        rows = update.epoch_batch(state.key, state.step, batch=batch, examples=data.tokens.shape[0])
        key = jax.random.fold_in(jax.random.fold_in(state.key, (1 << 30) + 3), state.step)
        part = jax.tree.map(lambda x: x[rows], data)
        part = diffusion.noised(key, part, mask_id=mask_id, block=block, span=span, **noise)
        loss, _, gradient = update.value_and_grad(value, state.params, part)
        state, metrics = update.apply_gradients(state, gradient, loss, tx, max_grad_norm=1.0)
        return dataclasses.replace(state, step=state.step + 1), metrics["train/loss"]

    @jax.jit
    @jax.vmap
    def run(keys, data):
        state = update.init_state(model.init(keys[1]), tx, keys[0])
        state, losses = jax.lax.scan(partial(step, data), state, length=steps)
        return state.params, losses

    return run(jax.vmap(keys_of)(jnp.asarray(seeds)), data)
