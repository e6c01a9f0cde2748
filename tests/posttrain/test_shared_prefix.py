"""A group behind one copy of its prompt: the same values and gradients as one row for each completion."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import Chunked, Window
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain.rollout import completion_log_probs
from jaxrl.posttrain.shared_prefix import group_log_probs, layout, row_width
from jaxrl.types import Rollout

SMALL = TransformerConfig(vocab_size=13, width=16, layers=2, heads=4, kv_heads=2, ffn=32, max_length=64, remat="none")
CASES = {  # prompts, group, prompt width, completion width; the first prompt fills its width, the last is short
    "groups": (3, 4, 5, 6),
    "alone": (3, 1, 5, 6),
    "one": (1, 3, 1, 2),
    "first-token": (2, 3, 4, 1),
    "long": (2, 2, 17, 19),
}


def batch(name="groups", seed=0) -> Rollout:
    """Random tokens; padding is random too, so that whoever reads it is found out."""
    number, group, prompt, completion = CASES[name]
    rng = np.random.default_rng(seed)
    prompts = np.repeat(rng.integers(0, 13, (number, prompt)), group, axis=0)
    completions = rng.integers(0, 13, (number * group, completion))
    lengths = np.repeat(np.linspace(prompt, 1, number).astype(int), group)
    none = jnp.zeros(completions.shape)
    return Rollout(
        tokens=jnp.asarray(np.concatenate([prompts, completions], axis=1)),
        prompt_lengths=jnp.asarray(lengths),
        lengths=jnp.asarray(rng.integers(0, completion + 1, number * group)),
        finish=jnp.zeros(number * group, jnp.int32),
        log_probs=none,
        behaviour_log_probs=none,
        prompt_width=prompt,
    )


def strong(config):
    """Attention ten times as strong as at the start, so that it matters what it sees."""
    fresh = jax.jit(language_model(config).init)(jax.random.key(0))
    grow = lambda path, p: 10.0 * p if "attention" in jax.tree_util.keystr(path) and "norm" not in str(path) else p
    return jax.tree_util.tree_map_with_path(grow, fresh)


@functools.cache
def program(config, group, temperature=1.0):
    """Rollout -> log-probs and entropy, `[2, B, C]`, 0 where nothing was written; without a group by rows."""
    form = partial(group_log_probs, group=group) if group else completion_log_probs
    run, params = jax.jit(partial(form, language_model(config), temperature=temperature)), strong(config)
    return lambda rollout: np.asarray(jnp.stack(run(params, rollout)) * rollout.mask[None])


def both(config, rollout, group, *, temperature=1.0):
    """(values, gradient of a random mix of them) of the rows apart and of the groups, each as one compiled program."""
    model, params = language_model(config), strong(config)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, *rollout.completions.shape)), jnp.float32)

    def program(form):
        def loss(params, rollout):
            values = jnp.stack(form(model, params, rollout, temperature=temperature))
            return (weights * rollout.mask[None] * values).sum(), values

        (_, values), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, rollout)
        return np.asarray(values * rollout.mask[None]), jax.device_get(gradient)

    return program(completion_log_probs), program(partial(group_log_probs, group=group))


def agree(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_rows(name):
    apart, shared = both(SMALL, batch(name), CASES[name][1])
    agree(apart, shared, atol=2e-5)
    assert np.abs(apart[1]["layers"]["attention"]["v"]["kernel"]).max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "full"},
        {"remat": "dots", "attention": "xla"},
        {"kv_heads": 1, "qk_norm": True, "tie_embeddings": True},
        {"window": 3},
        {"window": 7, "window_layers": (1,), "attention": "xla"},
    ],
    ids=str,
)
def test_models(changes):
    """Every kind of layer; a window counts along the path from the prompt, not in columns of the row."""
    config = dataclasses.replace(SMALL, **changes)
    apart, shared = both(config, batch(), 4, temperature=0.7)
    agree(apart, shared, atol=2e-5)


def test_temperature_and_padding_matter():
    """What the comparison rests on: other temperatures and lengths of prompts give other values."""
    one, cold = (program(SMALL, 4, temperature)(batch()) for temperature in (1.0, 0.5))
    assert np.abs(one - cold).max() > 1e-3
    full = program(SMALL, 4)(batch().replace(prompt_lengths=jnp.full(12, 5)))
    np.testing.assert_allclose(full[:, :4], one[:, :4], atol=1e-6)
    assert np.abs(full[:, 8:] - one[:, 8:]).max() > 1e-3


def test_bfloat16_is_as_exact_as_rows():
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    exact = program(SMALL, None)(batch("long"))
    apart, shared = (program(half, group)(batch("long")) for group in (None, 2))
    assert 0 < np.abs(shared - exact).max() <= 2 * np.abs(apart - exact).max()


def test_completions_do_not_see_each_other():
    """Another token in one completion changes nothing in the rest of its group, nor in other groups."""
    rollout = batch().replace(lengths=jnp.full(12, 6))
    changed = rollout.replace(tokens=rollout.tokens.at[5, 5].add(1) % 13)
    before, after = (program(SMALL, 4)(r)[1] for r in (rollout, changed))
    np.testing.assert_array_equal(np.delete(before, 5, axis=0), np.delete(after, 5, axis=0))
    assert before[5, 0] == after[5, 0] and (before[5, 1:] != after[5, 1:]).all()


def test_the_prompt_is_computed_once():
    """The model sees one row a prompt, of `row_width` columns."""
    shapes = []
    model = language_model(SMALL)

    def spy(params, tokens, **options):
        shapes.append(tokens.shape)
        return model.apply(params, tokens, **options)

    params = jax.eval_shape(model.init, jax.random.key(0))
    jax.eval_shape(partial(group_log_probs, model._replace(apply=spy), group=4), params, batch())
    assert shapes == [(3, row_width(5, 6, 4))] == [(3, 25)]


@pytest.mark.parametrize("n", [1, 2, 4, 100])
def test_window_counts_along_the_path(n):
    """Pair by pair, against lists of the tokens on each path."""
    lengths, prompt, completion, group = [3, 1], 3, 4, 2
    positions, mask = layout(jnp.asarray(lengths), prompt=prompt, completion=completion, group=group)
    width = prompt + group * (completion - 1)
    seen = np.asarray((mask & Window(n)).allowed(_whole(width)))[:, 0]
    for row, length in enumerate(lengths):
        paths = [[*range(prompt - length, prompt), *range(prompt + 3 * g, prompt + 3 * g + 3)] for g in range(group)]
        for path in paths:
            np.testing.assert_array_equal(np.asarray(positions)[row, path], np.arange(len(path)))
            for at, q in enumerate(path):
                assert np.flatnonzero(seen[row, q]).tolist() == path[max(at - n + 1, 0) : at + 1]


def _whole(width):
    from jaxrl.kernels.attention.masks import Tile

    return Tile(0, width, 0, width, width)


def test_what_counts_columns_is_refused():
    model = language_model(SMALL)

    def chunked(params, tokens, *, mask, **options):
        return model.apply(params, tokens, mask=mask & Chunked(8), **options)

    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match="narrows the mask of a shared prompt by Chunked, which counts columns"):
        jax.eval_shape(partial(group_log_probs, model._replace(apply=chunked), group=4), params, batch())
    with pytest.raises(ValueError, match="group is 5 and the rollout has 12 rows; expected whole groups"):
        jax.eval_shape(partial(group_log_probs, model, group=5), params, batch())
