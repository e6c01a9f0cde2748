"""Muon: which parameters it takes, what it does to each matrix of a stack, and a supervised step with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.nets.moe import MoEConfig
from jaxrl.posttrain import sft, update
from jaxrl.types import TokenBatch

EXPERTS = MoEConfig(3, 2, 8, score="sigmoid", bias=True)
CONFIG = presets.tiny(13, width=16, heads=2, kv_heads=1, ffn=32, experts=EXPERTS, tie_embeddings=False)


def newton_schulz(g):
    """Five steps in float64, as Jordan et al. have it."""
    x = np.asarray(g, np.float64)
    x = x.T if (turned := x.shape[0] > x.shape[1]) else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if turned else x


@pytest.mark.parametrize("shape", [(64, 256), (3, 64, 256), (2, 3, 96, 32)])
def test_each_matrix_of_a_stack_is_orthogonalised_by_itself(shape):
    gradient = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    gradient *= np.logspace(0, 3, int(np.prod(shape[:-2]))).reshape(*shape[:-2], 1, 1)  # would drown in one norm
    muon = update.scale_by_muon()
    tree = {"kernel": jnp.asarray(gradient)}
    found = jax.jit(lambda g: muon.update(g, muon.init(g)))(tree)[0]["kernel"]
    size = 0.2 * max(shape[-2:]) ** 0.5
    for index in np.ndindex(shape[:-2]):
        one = np.asarray(found[index], np.float64) / size
        values = np.linalg.svd(one, compute_uv=False)
        assert values.max() < 1.25 and 0.7 < np.median(values) < 1.2
        np.testing.assert_allclose(one, newton_schulz(gradient[index]), atol=2e-4)
        assert 0.7 * 0.2 < np.sqrt(np.square(one * size).mean()) < 1.2 * 0.2


def test_momentum_is_nesterov_s():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 8, 12))
    muon = update.scale_by_muon(momentum=0.9)
    tree = lambda g: {"kernel": jnp.asarray(g, jnp.float32)}
    state = muon.init(tree(first))
    _, state = muon.update(tree(first), state)
    found, _ = muon.update(tree(second), state)
    m = 0.1 * (0.9 * first + second)
    nesterov = 0.9 * m / (1 - 0.9**3) + 0.1 * second / (1 - 0.9**2)  # with optax's bias corrections
    np.testing.assert_allclose(found["kernel"], 0.2 * 12**0.5 * newton_schulz(nesterov), atol=1e-4)


def test_an_sft_step_with_muon():
    model = language_model(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(2)
    data = TokenBatch(jnp.asarray(rng.integers(0, 13, (4, 8))), jnp.ones((4, 8)))
    after = {}
    for kind in ("adamw", "muon"):
        config = update.OptimizerConfig(kind=kind, learning_rate=1e-2, state="bfloat16", weight_decay=0.1)
        run = sft.make(sft.SFTConfig(batch=4), model, update.make_optimizer(config))
        step = jax.jit(run.step)
        state, figures = step(run.init(jax.random.key(1), params), data)
        first = figures["train/loss"]
        after[kind] = state.params
        for _ in range(5 * (kind == "muon")):
            state, figures = step(state, data)
        assert np.isfinite(figures["train/loss"]) and (figures["train/loss"] < first or kind == "adamw")
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    flat = lambda tree: {name(path): x for path, x in jax.tree.leaves_with_path(tree)}
    adam, muon = flat(after["adamw"]), flat(after["muon"])
    same = {path for path in adam if np.array_equal(adam[path], muon[path])}
    assert same == {path for path in adam if path.endswith(("scale", "bias", "embedding")) or "unembed" in path}
    moved = muon["layers/moe/gate"] - (1 - 1e-3) * flat(params)["layers/moe/gate"]
    for expert in np.asarray(moved[0], np.float64):
        values = np.linalg.svd(expert / (1e-2 * 0.2 * 16**0.5), compute_uv=False)
        assert values.max() < 1.25 and (0.3 < values).all()


def test_optimizer_state_moves_as_parameters_do():
    params = jax.eval_shape(language_model(CONFIG).init, jax.random.key(0))
    optimizer = update.make_optimizer(update.OptimizerConfig(kind="muon", warmup_steps=3))
    state = jax.eval_shape(optimizer.init, params)
    _, after = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    fresh = jax.eval_shape(lambda state, params: update.reset_moments(state, params, optimizer), state, params)
    assert jax.tree.structure(fresh) == jax.tree.structure(state)
    numbers = sum(x.size for x in jax.tree.leaves(state))
    matrices = sum(x.size for p, x in jax.tree.leaves_with_path(params["layers"]) if x.ndim > 2)
    assert numbers < 2 * sum(x.size for x in jax.tree.leaves(params)) - matrices + 20  # one moment, not two


def test_refuses():
    with pytest.raises(ValueError, match="optimizer kind is 'lion'; expected adamw or muon"):
        update.make_optimizer(update.OptimizerConfig(kind="lion"))
