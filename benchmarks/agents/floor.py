"""What a training of PPO cannot do without: its matrix products, and the compilation of its smallest parts.

python benchmarks/agents/floor.py ppo-64x16

The products of actor and critic for a whole training and nothing else, as plain products and by `small_dot`; seconds to
trace and compile the loss, its gradient and the optimizer's step, a rollout, and the first state.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import cases
import jax
import jax.numpy as jnp
import jax_timing
import optax
from jax.flatten_util import ravel_pytree

from jaxrl import envs
from jaxrl.agents import networks, on_policy, ppo
from jaxrl.nets.layers import small_dot


def products(config, updates: int, sizes: tuple[int, ...], dot: Callable):
    """A program of the products that two networks of these sizes need, and no others."""

    def network(x, kernels):
        return [x := dot(x, kernel) * 0.1 for kernel in kernels][-1]

    def train(key):
        shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
        kernels = [[jax.random.normal(jax.random.fold_in(key, i), s) * 0.1 for s in shapes] for i in range(2)]
        rows = config.envs * config.steps // config.minibatches
        x = jax.random.normal(key, (rows, sizes[0]))
        loss = lambda kernels: sum(jnp.sum(network(x, k)) for k in kernels)
        judged = jax.random.normal(key, (2 * config.envs * config.steps, sizes[0]))
        seen = jax.random.normal(key, (config.envs, sizes[0]))

        def update(kernels, _):
            act = lambda total, _: (total + network(seen + total, kernels[0])[0, 0] * 1e-9, None)
            total, _ = jax.lax.scan(act, 0.0, length=config.steps)
            total += network(judged + total, kernels[1])[0, 0] * 1e-9
            learn = lambda k, _: (jax.tree.map(lambda p, g: p - 1e-9 * (g + total), k, jax.grad(loss)(k)), None)
            return jax.lax.scan(learn, kernels, length=config.epochs * config.minibatches)

        return jax.lax.scan(lambda k, _: (update(k, None)[0], None), kernels, length=updates)[0]

    return train


def compiled(function, *inputs) -> float:
    """Seconds to trace and compile."""
    begun = time.perf_counter()
    jax.jit(function).lower(*inputs).compile()
    return round(time.perf_counter() - begun, 2)


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=[name for name, case in cases.CASES.items() if case.agent == "ppo"])
    options = parser.parse_args()
    case = cases.CASES[options.case]
    config, env = ppo.PPOConfig(**case.settings), envs.make(case.env)
    agent, key = ppo.make(config, env), jax.random.key(0)
    actor, critic = networks.actor_and_critic(config, env, None, None)
    state = jax.eval_shape(agent.init, key)
    sizes = (*env.observation_space.shape, *config.hidden, 2)
    plain, own = (
        jax_timing.time_training(products(config, case.steps // agent.env_steps, sizes, dot), key, key, key)[0]
        for dot in (jnp.dot, small_dot)
    )
    roll = lambda state: on_policy.rollout(env, actor, critic, state, steps=config.steps, discount=0.99, lambda_=0.95)
    batch = jax.eval_shape(lambda state: on_policy.single_steps(roll(state)[1]), state)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.scale_by_adam(eps=1e-5))

    def gradient(state, batch):
        flat, unflatten = ravel_pytree(on_policy.trained(state.params))
        loss = lambda flat: ppo.loss(config, actor, critic, unflatten(flat), batch)
        return on_policy.descend(optimizer, loss, flat, state.optimizer, rate=1e-3)

    cpu = lambda timing: round(statistics.median(cpu for cpu, _ in timing["runs"]), 2)
    line = {
        "case": options.case,
        "products_cpu_s": cpu(plain),
        "products_by_small_dot_cpu_s": cpu(own),
        "compile_gradient_s": compiled(gradient, state, batch),
        "compile_acting_s": compiled(lambda s: on_policy.gather(env, actor, s, steps=config.steps)[1].reward, state),
        "compile_initialising_s": compiled(agent.init, key),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
