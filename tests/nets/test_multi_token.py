"""Multi-token prediction: the modules, their loss, packing, names on disk, and a sequence that they learn."""

import dataclasses
import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import Causal
from jaxrl.losses import multi_token as losses
from jaxrl.nets import presets
from jaxrl.nets.latent_attention import LatentConfig
from jaxrl.nets.moe import MoEConfig
from jaxrl.nets.multi_token import multi_token_model
from jaxrl.nets.transformer import Block, rotations
from jaxrl.nets.weights import deepseek
from jaxrl.posttrain import sft, update
from jaxrl.types import TokenBatch

path = pathlib.Path(__file__).parents[1] / "oracles" / "multi_token.py"
spec = importlib.util.spec_from_file_location("multi_token_oracle", path)
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

CONFIG = presets.tiny(11, width=16, heads=2, kv_heads=1, ffn=24, max_length=32, tie_embeddings=False, layers=1)
LATENT = LatentConfig(kv_rank=12, nope=6, rope=4, value=5, q_rank=10)
EXPERTS = MoEConfig(
    *(4, 2, 8), shared=8, first_dense=1, score="sigmoid", normalise=True, scale=2.5, groups=2, group_score=2, bias=True
)
DEEPSEEK = dataclasses.replace(CONFIG, layers=3, kv_heads=2, latent=LATENT, experts=EXPERTS)


@functools.cache
def network(depth=2):
    mtp = multi_token_model(CONFIG, depth)
    params = jax.jit(mtp.model.init)(jax.random.key(0))
    return mtp, jax.tree.map(lambda x: 8.0 * x if x.ndim > 1 else x, params)


def rows(segments=None, seed=0):
    rng = np.random.default_rng(seed)
    tokens, mask = rng.integers(0, 11, (3, 9)), (rng.random((3, 9)) < 0.8).astype(np.float32)
    return jax.tree.map(jnp.asarray, TokenBatch(tokens, mask, segments))


SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3], [1] * 9, [1, 1, 2, 2, 2, 2, 0, 0, 0]])


def ahead(mtp, params, tokens):
    hidden, _ = mtp.model.apply(params, tokens)
    return hidden, mtp.ahead(params, hidden, tokens)


def further_loss(mtp, params, batch, **options):
    return sft.multi_token_loss(mtp.model, params, batch, ahead=mtp.ahead, **options)


def test_modules_are_the_paper_s_chain():
    mtp, params = network()
    tokens = rows().tokens
    hidden, found = jax.jit(functools.partial(ahead, mtp))(params, tokens)
    own = jax.tree.map(np.asarray, params["multi_token"])
    table, before = np.asarray(params["embed"]["embedding"], np.float64), np.asarray(hidden, np.float64)
    cos, sin = rotations(CONFIG, jnp.arange(9)[None])
    for k in range(2):
        x = np.zeros((3, 9, 16))
        for b in range(3):
            following = [table[tokens[b, min(i + k + 1, 8)]] for i in range(9)]
            x[b] = oracle.entry(own, k, before[b], following, CONFIG.norm_eps)
        block = {"params": jax.tree.map(lambda w, k=k: w[k], params["multi_token"]["layers"])}
        run = jax.jit(lambda v, x: Block(CONFIG).apply(v, (x, None, None), 0, None, cos, sin, Causal(), 0)[0][0])
        before = np.asarray(run(block, jnp.asarray(x, jnp.float32)), np.float64)
        want = oracle.rms(before, own["norm"]["scale"][k], CONFIG.norm_eps)
        real = slice(0, 8 - k)
        np.testing.assert_allclose(found[k][:, real], want[:, real], atol=2e-5)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["rows", "packed"])
def test_targets_and_loss_are_the_oracle_s(segments):
    batch, rng = rows(segments), np.random.default_rng(1)
    log_probs = -rng.random((4, 3, 8))
    targets, mask = losses.targets(batch.tokens, batch.loss_mask, depth=3, segments=batch.segments)
    for k, b, i in np.argwhere(np.asarray(mask) > 0):
        assert targets[k, b, i] == batch.tokens[b, i + k + 1]
    got, others = losses.multi_token(jnp.where(mask > 0, -log_probs, jnp.nan), mask, weight=0.3)
    want = oracle.loss(log_probs, np.asarray(batch.tokens), np.asarray(batch.loss_mask), segments, 0.3)
    np.testing.assert_allclose([got.total, got.weight], want, rtol=1e-6)
    np.testing.assert_allclose(others.weight, np.asarray(mask)[1:].sum())


def test_rows_shorter_than_the_depth():
    targets, mask = losses.targets(jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2)), depth=3)
    assert targets.shape == mask.shape == (4, 1, 1) and mask.sum() == 1
    value, others = losses.multi_token(jnp.ones((4, 1, 1)), mask)
    assert value.mean == 1 and others.weight == 0 and others.mean == 0


def test_packed_rows_give_the_gradient_of_rows_of_their_own():
    mtp, params = network()
    tokens = np.asarray(rows().tokens)
    packed = TokenBatch(jnp.asarray(tokens[:1]), jnp.ones((1, 9)), jnp.asarray(SEGMENTS[:1]))
    alone, mask = np.zeros((3, 9), np.int32), np.zeros((3, 9), np.float32)
    for row, part in enumerate((slice(0, 4), slice(4, 7), slice(7, 9))):
        n = part.stop - part.start
        alone[row, :n], mask[row, :n] = tokens[0, part], 1
    of = jax.jit(lambda p, b: update.value_and_grad(lambda p, b: further_loss(mtp, p, b), p, b))
    one, three = of(params, packed), of(params, TokenBatch(jnp.asarray(alone), jnp.asarray(mask)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4), one, three)
    parts = jax.jit(lambda p, b: update.value_and_grad(lambda p, b: further_loss(mtp, p, b), p, b, micro_batches=3))(
        params, TokenBatch(jnp.asarray(alone), jnp.asarray(mask))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4), parts, three)


def test_weight_zero_is_plain_training_and_modules_see_no_later_token():
    mtp, params = network()
    batch = rows()
    of = jax.jit(jax.value_and_grad(lambda p: further_loss(mtp, p, batch, weight=0.0)[0].total))
    value, gradient = of(params)
    plain, want = jax.jit(jax.value_and_grad(lambda p: sft.loss(mtp.model, p, batch)[0].total))(params)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, want)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["multi_token"]))
    # column i of module k sees tokens up to i + k, and its own target is no part of them
    other = batch.tokens.at[:, 5].set((batch.tokens[:, 5] + 1) % 11)
    run = jax.jit(functools.partial(ahead, mtp))
    one, two = run(params, batch.tokens)[1], run(params, other)[1]
    for k in (1, 2):
        same = np.isclose(one[k - 1], two[k - 1], atol=1e-6).all(axis=(0, 2))
        assert same[: 5 - k].all() and not same[5 - k]


@pytest.mark.parametrize(
    "changes", [{"positions": "learned"}, {"embed_norm": True}, {"norm_place": "post"}, {"causal": False}]
)
def test_refuses(changes):
    with pytest.raises(ValueError, match="expected depth >= 1 and a causal decoder"):
        multi_token_model(dataclasses.replace(CONFIG, **changes))
    with pytest.raises(ValueError, match="depth 0"):
        multi_token_model(CONFIG, 0)


def test_names_on_disk_are_deepseek_s():
    mtp = multi_token_model(DEEPSEEK, 2)
    params = jax.device_get(jax.jit(mtp.model.init)(jax.random.key(0)))
    tensors = deepseek.to_checkpoint(DEEPSEEK, params)
    first = "model.layers.3."
    for name, shape in {
        "eh_proj.weight": (16, 32),
        "enorm.weight": (16,),
        "hnorm.weight": (16,),
        "shared_head.norm.weight": (16,),
        "shared_head.head.weight": (11, 16),
        "embed_tokens.weight": (11, 16),
        "self_attn.kv_a_proj_with_mqa.weight": (16, 16),
        "mlp.experts.3.down_proj.weight": (16, 8),
        "mlp.gate.e_score_correction_bias": (4,),
    }.items():
        assert tensors[first + name].shape == shape, name
    assert f"{first}enorm.weight" not in deepseek.to_checkpoint(DEEPSEEK, params, depth=0)
    np.testing.assert_array_equal(tensors[f"{first}embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        tensors["model.layers.4.eh_proj.weight"], params["multi_token"]["eh_proj"]["kernel"][1].T
    )
    back = deepseek.from_checkpoint(DEEPSEEK, tensors, depth=2)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(ValueError, match="missing model.layers.4.hnorm.weight"):
        deepseek.from_checkpoint(DEEPSEEK, {n: t for n, t in tensors.items() if "4.hnorm" not in n}, depth=2)
    with pytest.raises(ValueError, match="unused model.layers.4.enorm.weight"):
        deepseek.from_checkpoint(DEEPSEEK, tensors, depth=1)


def test_sft_steps_train_the_modules():
    mtp, params = network(1)
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-2))
    run = sft.make(
        sft.SFTConfig(batch=3), mtp.model, optimizer, objective=functools.partial(sft.multi_token_loss, ahead=mtp.ahead)
    )
    state, step = run.init(jax.random.key(0), params), jax.jit(run.step)
    figures = []
    for _ in range(6):
        state, found = step(state, rows())
        figures.append(float(found["train/multi_token_loss"]))
    assert figures[-1] < 0.8 * figures[0]
