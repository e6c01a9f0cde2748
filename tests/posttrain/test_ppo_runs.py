"""Runs of PPO: learning, resuming, the adaptive weight, Python in between, and eight devices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import checkpoint, loop, parallel
from jaxrl.losses import kl
from jaxrl.posttrain import ppo, update
from jaxrl.posttrain.rollout import Sampling
from tests.posttrain.ppo_case import EOS, PAD, SAMPLING, build, close, differ, jit, same, share_of_even_tokens


def test_eight_devices_do_what_one_does(model, params, prompts):
    config = dataclasses.replace(ppo.PPO_MAX, prompts=4, group=4, epochs=1, minibatches=2, micro_batches=2,
                                 critic_warmup=1, sampling=SAMPLING, scale_rewards=True)  # fmt: skip
    data = ppo.Data(prompts, jnp.zeros(4))
    alone = build(model, config)
    *_, one = loop.run(ppo.fused(alone, share_of_even_tokens, config), alone.init(jax.random.key(4), params), data,
                       steps=2, chunk=2)  # fmt: skip
    devices = parallel.make_mesh("data=2,fsdp=4")
    spread = build(model, config, constrain=partial(parallel.shard_batch, mesh=devices))
    state = spread.init(jax.random.key(4), params)
    state = jax.device_put(state, parallel.state_shardings(state, devices))
    *_, eight = loop.run(ppo.fused(spread, share_of_even_tokens, config), state, data, steps=2, chunk=2)
    for a, b in zip(one.metrics, eight.metrics, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), atol=5e-5, rtol=1e-4)
    trained = lambda progress: (progress.state.params, progress.state.critic.params)
    close(trained(one), jax.device_get(trained(eight)), atol=2e-5)
    assert len(eight.state.params["layers"]["ffn"]["up"]["kernel"].sharding.device_set) == 8


ADAPTED = dataclasses.replace(
    ppo.PPO_MAX, prompts=2, group=2, epochs=1, minibatches=2, critic_warmup=1, sampling=SAMPLING, kl_target=0.1,
    kl_horizon=20.0, scale_rewards=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(model, params, prompts):
    """`(fresh state, step, data, every state and metrics of four iterations)`, the whole iteration one program."""
    recipe = build(model, ADAPTED, critic_optimizer=optax.adam(1e-2))
    answers = jnp.asarray([0.0, 0.5, -0.5, 2.0])
    step, data = ppo.fused(recipe, share_of_even_tokens, ADAPTED), ppo.Data(prompts, answers)
    fresh = lambda: recipe.init(jax.random.key(1), params)
    run = jit(step)
    states, rows = [fresh()], []
    for _ in range(4):
        state, metrics = run(states[-1], data)
        states.append(state)
        rows.append({name: float(value) for name, value in metrics.items()})
    return recipe, fresh, run, data, states, rows


def test_resumes_bitwise(whole, tmp_path):
    """A checkpoint after two iterations, and two more: the same state to the last bit, moments and weight included."""
    _, fresh, run, data, states, _ = whole
    checkpoint.save(tmp_path, 2, states[2], keep=1)
    state, done = checkpoint.restore(tmp_path, jax.eval_shape(fresh))
    for _ in range(2):
        state, _ = run(state, data)
    numbers = lambda state: jax.tree.map(lambda x: jax.random.key_data(x) if x.dtype == state.key.dtype else x, state)
    assert done == 2 and state.step == 4
    same(numbers(state), numbers(states[4]))


def test_warmup_leaves_the_policy_alone(whole):
    """Bitwise, with its optimizer and the KL's weight, while a critic of its own learns; then all of them move."""
    *_, states, _ = whole
    same((states[1].params, states[1].opt_state, states[1].kl_coef),
         (states[0].params, states[0].opt_state, states[0].kl_coef))  # fmt: skip
    assert differ(states[1].critic.params, states[0].critic.params)
    assert differ(states[2].params, states[1].params) and states[2].kl_coef != states[1].kl_coef


def test_adaptive_weight_of_the_kl(whole):
    """Ziegler et al.'s controller, by hand; it acts on the next iteration."""
    adapt = lambda now: float(kl.adapted_coefficient(0.2, now, target=6.0, samples=64, horizon=640))
    np.testing.assert_allclose([adapt(6.0), adapt(6.6), adapt(60.0), adapt(0.0)], [0.2, 0.202, 0.204, 0.196], rtol=1e-5)
    with pytest.raises(ValueError, match="target is 0 and horizon 1, expected both above 0"):
        kl.adapted_coefficient(0.2, 1.0, target=0, samples=1, horizon=1)
    *_, rows = whole
    weight = 0.05
    for number, row in enumerate(rows):
        np.testing.assert_allclose(row["policy/kl_coef"], weight, rtol=1e-5)
        np.testing.assert_allclose(row["reward/kl"], -weight * row["policy/kl_completion"], rtol=1e-4, atol=1e-7)
        if number >= ADAPTED.critic_warmup:
            weight *= 1 + min(max(row["policy/kl_completion"] / 0.1 - 1, -0.2), 0.2) * 4 / 20
    assert weight != 0.05


def test_python_reward_gives_the_same_run(whole):
    recipe, fresh, _, data, states, rows = whole
    answers = np.asarray(data.answers)
    on_host = lambda rollout, problems: np.asarray(share_of_even_tokens(rollout, np.repeat(answers[problems], 2)))
    *_, last = loop.run(ppo.hosted(recipe, on_host), fresh(), data, steps=3, chunk=3, jit=False)
    close(last.state.params, states[3].params, atol=2e-6)
    for a, b in zip(rows[:3], last.metrics, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[name] for name in a], [b[name] for name in a], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "max"])
def test_learns_to_say_a_token(name, model, prompts):
    """From scratch, the share of a token rises from about a tenth to nearly all, from each of three seeds; plain with a
    critic of its own, PPO-max with a shared one."""
    sizes = {"prompts": 4, "group": 16, "epochs": 2, "minibatches": 2, "sampling": Sampling(max_tokens=6)}
    shared = {"critic": "shared", "value_coef": 0.1, "critic_warmup": 2}
    config = dataclasses.replace(ppo.PPOConfig(kl_coef=0.01) if name == "plain" else ppo.PPO_MAX, **sizes,
                                 **({} if name == "plain" else shared))  # fmt: skip
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-2))
    recipe = ppo.make(config, model, optimizer, eos_id=EOS, pad_id=PAD)
    reward = lambda rollout, _: ((rollout.completions == 3) * rollout.mask).sum(1) / 6
    step, data = jit(ppo.fused(recipe, reward, config)), ppo.Data(prompts)
    start = jit(model.init)(jax.random.key(5))
    for seed in range(3):
        state, rewards = recipe.init(jax.random.key(seed), start), []
        for _ in range(40):
            state, metrics = step(state, data)
            rewards.append(float(metrics["reward/mean"]))
        assert rewards[0] < 0.2 and np.mean(rewards[-5:]) > 0.8, rewards[::5]
