"""Sampling and training on different meshes: without a lag the run of one device, with one as old as it says."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl import checkpoint, loop, metrics, parallel
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.nets.moe import MoEConfig
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import apart, grpo, recipes
from jaxrl.posttrain.rollout import Sampling
from jaxrl.types import Prompts

CONFIG = TransformerConfig(vocab_size=16, width=16, layers=2, heads=2, kv_heads=2, ffn=32, max_length=16)
GRPO = grpo.GRPOConfig(prompts=4, group=4, kl_coef=0.0, importance_cap=2.0, sampling=Sampling(max_tokens=6))
PROBLEMS = grpo.Problems(
    Prompts(jnp.array([[0, 0, 0, 5], [0, 0, 6, 7], [2, 3, 4, 5], [9, 8, 7, 6]]), jnp.array([1, 2, 4, 4])), jnp.zeros(4)
)


def even(completions, rows=None):
    return ((completions.completions % 2 == 0) * completions.mask).sum(1) / completions.lengths


def recipe_of(model, **options):
    return grpo.make(GRPO, model, optax.sgd(0.5), eos_id=1, pad_id=0, max_grad_norm=0.0, **options)


def start(recipe):
    params = jax.jit(language_model(CONFIG).init)(jax.random.key(0))
    return recipe.init(jax.random.key(4), params)


@functools.cache
def alone():
    """Every state of four steps on one device."""
    recipe = recipe_of(language_model(CONFIG))
    step = grpo.fused(recipe, lambda completions, answers: even(completions), GRPO)
    states = [start(recipe)]
    for progress in loop.run(step, start(recipe), PROBLEMS, steps=4, chunk=1):
        states.append(jax.tree.map(jnp.copy, progress.state))
    return states, recipe


class Run:
    """A run on a mesh to train on and one to sample on."""

    def __init__(self, training, sampling, lag):
        self.training, self.sampling = apart.two_meshes(training, sampling)
        self.trainer = recipe_of(
            parallel.model_on(CONFIG, self.training), constrain=partial(parallel.shard_batch, mesh=self.training)
        )
        sampler = recipe_of(parallel.model_on(CONFIG, self.sampling))
        everywhere = NamedSharding(self.training, PartitionSpec())
        self.begin, self.step = apart.make(
            sampler.sample,
            self.trainer.learn,
            jax.jit(even),
            place_batch=lambda batch: jax.device_put(batch, everywhere),
            policy_shardings=lambda policy: parallel.state_shardings(policy, self.sampling),
            lag=lag,
        )

    def fresh(self):
        state = start(self.trainer)
        state = jax.device_put(state, parallel.state_shardings(state, self.training))
        return self.begin(state, PROBLEMS)

    def run(self, state, steps):
        return list(loop.run(self.step, state, PROBLEMS, steps=steps, chunk=2, jit=False))


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a, jax.device_get(b))


@pytest.mark.parametrize(
    ("training", "sampling"),
    [("fsdp=4", "data=4"), pytest.param("fsdp=8", "data=4,tensor=2", marks=pytest.mark.slow)],
    ids=["own devices", "same devices"],
)
def test_without_a_lag_it_is_the_run_of_one_device(training, sampling):
    run = Run(training, sampling, lag=0)
    *_, last = run.run(run.fresh(), 4)
    close(last.state.params, alone()[0][4].params)
    rows = [row for progress in run.run(run.fresh(), 4) for row in progress.metrics]
    assert [row["policy/lag"] for row in rows] == [0.0] * 4
    assert all(row["sampler/log_prob_gap"] < 1e-5 for row in rows)
    kernel = last.state.policy.params["layers"]["ffn"]["up"]["kernel"]
    assert kernel.sharding.device_set == set(run.sampling.devices.flat) and last.state.policy.opt_state is None
    assert run.training.size == run.sampling.size == last.state.params["norm"]["scale"].sharding.num_devices


def test_a_lag_is_as_long_as_it_says():
    """Batch i is drawn by the policy of max(i - 2, 0) updates: its behaviour log-probs are that policy's, exactly."""
    run = Run("fsdp=4", "data=4", lag=2)
    state, lags, model = run.fresh(), [], language_model(CONFIG)
    versions = [jax.device_get(state.params)]
    score = jax.jit(partial(grpo.completion_log_probs, model))
    for i in range(5):
        oldest = jax.device_get(state.pending[0])
        assert len(state.pending) == 2 and int(oldest.version) == max(i - 2, 0)
        own, _ = score(versions[int(oldest.version)], oldest.completions)
        mask = oldest.completions.mask
        np.testing.assert_allclose(own * mask, oldest.completions.behaviour_log_probs * mask, atol=2e-5)
        (progress,) = loop.run(run.step, state, PROBLEMS, steps=i + 1, chunk=1, jit=False)
        state = progress.state
        versions.append(jax.device_get(state.params))
        lags.append(progress.metrics[0]["policy/lag"])
        moved = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, versions[-2:]), strict=True))
        assert moved > 1e-4
    assert lags == [0.0, 1.0, 2.0, 2.0, 2.0]
    assert progress.metrics[0]["sampler/log_prob_gap"] > 1e-4  # the policy has moved on since
    drawn = {tuple(np.asarray(batch.completions.tokens).ravel()) for batch in state.pending}
    assert len(drawn) == 2  # no batch is drawn twice


def test_resumes_bitwise(tmp_path):
    """Batches that wait are part of the checkpoint, with the devices that everything lies on."""
    run = Run("fsdp=4", "data=4", lag=1)
    *_, whole = run.run(run.fresh(), 4)
    *_, half = run.run(run.fresh(), 2)
    checkpoint.save(tmp_path, 2, half.state)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run.fresh())
    shapes = jax.eval_shape(run.begin, start(run.trainer), PROBLEMS)  # what a run on the command line restores into
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)] == [(x.shape, x.dtype) for x in jax.tree.leaves(like)]
    restored, _ = checkpoint.restore(tmp_path, like)
    *_, resumed = run.run(restored, 4)
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    assert resumed.metrics == whole.metrics


@pytest.mark.parametrize(
    ("training", "sampling", "message"),
    [
        ("fsdp=4", "data=2", "takes 4 devices and the sampler's 'data=2' takes 2, of 8; let both take all"),
        ("fsdp=8", "dta=8", "did you mean 'data'"),
    ],
)
def test_meshes_that_do_not_add_up(training, sampling, message):
    with pytest.raises(ValueError, match=message):
        apart.two_meshes(training, sampling)


def test_the_samplers_matrices_are_in_its_type_and_compute_the_same():
    """A copy of half the bytes; routers see float32, so they must keep it."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16", qk_norm=True, experts=MoEConfig(4, 2, 8, shared=8))
    model = language_model(config)
    params = jax.tree.map(lambda x: 10 * x, jax.jit(model.init)(jax.random.key(0)))
    copy = apart.as_computed(params, "bfloat16")
    types = {jax.tree_util.keystr(path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(copy)}
    wide = {path for path, dtype in types.items() if dtype == jnp.float32}
    assert wide == {path for path in types if "router" in path or "norm" in path} < types.keys()
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 16)
    got, want = (jax.jit(lambda p: model.apply(p, tokens)[0])(p) for p in (copy, params))
    np.testing.assert_array_equal(got, want)
    drawn = presets.performer(16, 16, 2, heads=2, kv_heads=2, max_length=16, dtype="bfloat16")
    params = jax.jit(language_model(drawn).init)(jax.random.key(0))
    copy, run = apart.as_computed(params, "bfloat16"), jax.jit(lambda p: language_model(drawn).apply(p, tokens)[0])
    np.testing.assert_array_equal(run(copy), run(params))


def test_a_negative_lag():
    with pytest.raises(ValueError, match="lag is -1; expected 0"):
        Run("fsdp=4", "data=4", lag=-1)


def options(out, **changes):
    model = recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=2, ffn=32)
    sizes = dict(steps=4, chunk=2, eval_every=0, held_out=8, model=model)
    small = grpo.GRPOConfig(prompts=4, group=4, importance_cap=2.0, sampling=Sampling(max_tokens=4))
    meshes = {"mesh": "fsdp=4", "sampler_mesh": "data=4", "lag": 1}
    return recipes.GRPORun(out=str(out), grpo=small, **{**sizes, **meshes, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["", "number"], ids=["jax", "python"])
def test_whole_runs_on_two_meshes_resume_bitwise(reward, tmp_path):
    whole = recipes.train_grpo(options(tmp_path / "whole", reward=reward))
    recipes.train_grpo(options(tmp_path / "half", reward=reward, steps=2))
    resumed = recipes.train_grpo(options(tmp_path / "half", reward=reward), resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    lags = [row["policy/lag"] for row in metrics.read(tmp_path / "half" / "metrics.jsonl") if "policy/lag" in row]
    assert lags == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler_mesh": ""}, "lag is 1 and there is no sampler_mesh"),
        ({"segment": 2}, "sampler_mesh does not go together with segment and repetition"),
        ({"tools": "calculator"}, "sampler_mesh does not go together with tools"),
    ],
)
def test_what_does_not_go_together(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **changes)
