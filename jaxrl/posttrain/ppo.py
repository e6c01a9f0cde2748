"""PPO for language models, from the plain form of RLHF to PPO-max, whose every switch is one field of the config.

Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155); Huang et al. 2024 (implementation details, arXiv 2403.17031);
PPO-max: Zheng et al. 2023 (Secrets of RLHF I, arXiv 2307.04964).

An iteration samples completions, scores them, and lays the score on the last token and a KL penalty on every token
(`returns.token_rewards`). GAE over the completion gives advantages (`returns.token_gae`); then come a few epochs of
clipped updates of the policy and of its critic. As in GRPO, a reward in JAX makes all of it one program (`fused`), a
Python reward runs between two (`hosted`), and a learned reward is a reward in JAX with parameters.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxrl.envs import statistics
from jaxrl.losses import kl, policy, reduce
from jaxrl.nets.language_model import LanguageModel
from jaxrl.nets.scalar_model import with_head
from jaxrl.posttrain import sft, update
from jaxrl.posttrain.ppo_advantages import explained_variance, judge
from jaxrl.posttrain.ppo_config import PPO_MAX as PPO_MAX
from jaxrl.posttrain.ppo_config import PPOConfig as PPOConfig
from jaxrl.posttrain.rewards.host import host_rewards
from jaxrl.posttrain.rollout import check_routers, completion_log_probs, rollout
from jaxrl.posttrain.scalars import token_scalars
from jaxrl.types import Finish, Prompts, Rollout, TokenBatch


@flax.struct.dataclass(kw_only=True)
class PPOState(update.TrainState):
    """A run as one pytree: the policy's `TrainState` with what PPO adds.

    `critic`: its parameters, optimizer state and counts of skipped updates. `scores`, `returns`: moments of all scores
    and of the returns of all completions so far. `kl_coef`: the weight of the KL, where it is adapted.
    """

    critic: update.TrainState
    scores: statistics.Statistics
    returns: statistics.Statistics
    kl_coef: jax.Array


@flax.struct.dataclass
class Data:
    """What a run reads.

    `prompts`: of `N` problems. `answers`: a pytree whose leaves have a leading axis `N`, handed to the reward.
    `reward_params`: parameters of a learned reward, or None. `pretraining`: examples for PPO-ptx, or None.
    """

    prompts: Prompts
    answers: Any = None
    reward_params: Any = None
    pretraining: TokenBatch | None = None


class PPO(NamedTuple):
    """The pure functions of a run.

    init: `(key, params, critic = None) -> PPOState`. `critic` are parameters of a `scalar_model`, a reward model's for
      instance; without, those of the policy with a head that says 0. A shared critic's are {"head": ...} alone.
    sample: `(state, prompts [N]) -> (Rollout of prompts * group rows, rows [prompts] drawn from the N)`.
    learn: `(state, rollout, scores [prompts * group], pretraining = None) -> (state, metrics)`; advances `state.step`.
      A NaN score leaves its completion out.
    """

    init: Callable
    sample: Callable
    learn: Callable


def make(
    config: PPOConfig,
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    *,
    eos_id: int,
    pad_id: int,
    critic_optimizer: optax.GradientTransformation | None = None,
    critic_model: LanguageModel | None = None,
    stop: tuple[tuple[int, ...], ...] = (),
    max_grad_norm: float = 1.0,
    constrain: Callable = lambda batch: batch,
) -> PPO:
    """Builds the functions of a run.

    Args:
      config: sizes and switches.
      model: four functions; see `LanguageModel`.
      optimizer: from `update.make_optimizer`, or any optax transformation.
      eos_id, pad_id, stop: see `rollout`.
      critic_optimizer: the critic's, with its own learning rate; None takes `optimizer`.
      critic_model: what a separate critic is built on, where it differs from the policy's model.
      max_grad_norm: global norm above which a gradient is scaled down, policy's and critic's each; 0 leaves them.
      constrain: puts a batch pytree onto the mesh (`parallel.shard_batch`); the identity on one device.

    Raises:
      ValueError: a critic's model for a shared critic; a model whose experts drop choices.
    """
    check_routers(model)
    shared = config.critic == "shared"
    if shared and critic_model is not None:
        raise ValueError("critic_model was given for a shared critic, which is a head on the policy; leave it out")
    critic_optimizer = critic_optimizer or optimizer
    of_critic = critic_model or model
    updates = config.epochs * config.minibatches
    log_probs_of = partial(completion_log_probs, temperature=config.sampling.temperature)

    def values_of(model, params, critic, completions: Rollout):
        """V of the state before each token, `[B, C]`."""
        if shared:
            return token_scalars(model, {"model": params, **critic}, completions)[:, :-1]
        return token_scalars(of_critic, critic, completions)[:, :-1]

    def init(key, params, critic=None):
        if critic is None and critic_model is not None:
            raise ValueError("the critic has a model of its own and no parameters; give init its `critic`")
        if critic is None:
            critic = with_head(model, params)
            critic = {"head": critic["head"]} if shared else critic
        expected = {"head"} if shared else {"model", "head"}
        if not isinstance(critic, dict) or set(critic) != expected:
            raise ValueError(
                f"critic parameters are {sorted(critic) if isinstance(critic, dict) else type(critic).__name__}; "
                f"a {config.critic} critic has {sorted(expected)}"
            )
        reference = jax.tree.map(jnp.copy, params) if config.reference else None
        base = update.init_state(params, optimizer, key, reference=reference)
        return PPOState(
            **{field.name: getattr(base, field.name) for field in dataclasses.fields(base)},
            critic=update.init_state(critic, critic_optimizer, key),
            scores=statistics.statistics(),
            returns=statistics.statistics(),
            kl_coef=jnp.full((), config.kl_coef, jnp.float32),
        )

    def sample(state, prompts: Prompts):
        rows = update.epoch_batch(state.key, state.step, batch=config.prompts, examples=prompts.tokens.shape[0])
        completions = rollout(
            model,
            state.params,
            constrain(jax.tree.map(lambda x: x[rows], prompts)),
            _step_key(state, 0),
            sampling=config.sampling,
            eos_id=eos_id,
            pad_id=pad_id,
            samples=config.group,
            stop=stop,
        )
        return constrain(completions), rows

    def loss(coefficient, model, trained, part):
        """Per token: clipped surrogate - entropy + KL (where it is in the loss) + value loss."""
        log_probs, entropy = log_probs_of(model, trained[0], part["rollout"])
        values = values_of(model, trained[0], trained[1], part["rollout"])
        surrogate, seen = policy.ppo_clip(
            log_probs,
            part["old"],
            part["advantages"],
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )
        errors = policy.value_loss(values, part["targets"], old_values=part["values"], clip=config.value_clip)
        total = surrogate + config.value_coef * errors
        if config.entropy_coef:
            total = total - config.entropy_coef * entropy
        if config.kl_in == "loss" and config.kl_coef:
            total = total + coefficient * kl.ESTIMATORS[config.kl](
                log_probs, part["reference"], old_log_probs=part["old"]
            )
        watched = {
            "policy/loss": surrogate,
            "policy/ratio_mean": seen["ratio"],
            "policy/clip_low": seen["clipped_low"],
            "policy/clip_high": seen["clipped_high"],
            "policy/approx_kl": seen["kl_old"],
            "value/loss": errors,
        }
        if config.dual_clip is not None:
            watched["policy/clip_dual"] = seen["clipped_dual"]
        mask = part["mask"]
        watched = {name: reduce.tokens(jax.lax.stop_gradient(value), mask) for name, value in watched.items()}
        return reduce.tokens(total, mask), watched

    def one(state, part, extra, coefficient, number):
        """One update of the policy and of the critic; both or neither."""
        gradient_of = partial(
            update.value_and_grad_of, model, key=state.key, number=number, micro_batches=config.micro_batches
        )
        value, watched, (to_policy, to_critic) = gradient_of(
            partial(loss, coefficient), (state.params, state.critic.params), part
        )
        if extra is not None:
            ptx, _, gradient = gradient_of(sft.loss, state.params, extra)
            value, watched["ptx/loss"] = value + config.ptx_coef * ptx, ptx
            to_policy = jax.tree.map(lambda a, b: a + (config.ptx_coef * b).astype(a.dtype), to_policy, gradient)
        finite = jnp.isfinite(optax.tree.norm((to_policy, to_critic)))
        value = jnp.where(finite, value, jnp.nan)
        critic, by_critic = update.apply_gradients(
            state.critic, to_critic, value, critic_optimizer, max_grad_norm=max_grad_norm
        )
        after, trained = update.apply_gradients(state, to_policy, value, optimizer, max_grad_norm=max_grad_norm)
        if config.critic_warmup:
            learns = state.step >= config.critic_warmup
            keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(learns, n, o), new, old)
            after = dataclasses.replace(
                after, params=keep(after.params, state.params), opt_state=keep(after.opt_state, state.opt_state)
            )
        watched |= {**trained, "value/grad_norm": by_critic["train/grad_norm"]}
        return dataclasses.replace(after, critic=critic), watched

    def experience(state, completions: Rollout, scores, coefficient):
        """What the updates learn from, what became of the scores, the KL of a completion, and metrics."""
        given = ~jnp.isnan(scores)
        mask = completions.mask * given[:, None]
        old, entropy = log_probs_of(model, state.params, completions)
        reference = log_probs_of(model, state.reference, completions)[0] if config.reference else jnp.zeros_like(old)
        estimate = kl.ESTIMATORS[config.kl](old, reference) if config.reference else jnp.zeros_like(old)
        values = values_of(model, state.params, state.critic.params, completions)
        judged = judge(
            config,
            state.scores,
            state.returns,
            scores,
            completions.finish,
            completions.lengths,
            estimate,
            values,
            kl_coef=coefficient,
        )
        per_token = lambda x: reduce.tokens(x, mask).mean
        per_completion = lambda x: reduce.elements(x, given).mean
        whole = per_completion((estimate * mask).sum(axis=1))
        metrics = {
            "reward/mean": per_completion(scores),
            "reward/score": per_completion(judged.scores),
            "reward/kl": -per_completion((judged.penalties * mask).sum(axis=1)),
            "policy/entropy": per_token(entropy),
            "completion/length": completions.lengths.mean(),
            "completion/truncated": (completions.finish == Finish.LENGTH).mean(),
            "value/explained_variance": explained_variance(judged.targets, values, mask),
            "sampler/log_prob_gap": per_token(jnp.abs(old - completions.behaviour_log_probs)),
            "throughput/tokens": completions.lengths.sum().astype(jnp.float32),
        }
        if config.reference:
            metrics |= {
                "policy/kl": per_token(estimate),
                "policy/kl_completion": whole,
                "reference/perplexity": jnp.exp(-per_token(reference)),
            }
        batch = {
            "rollout": completions,
            "mask": mask,
            "old": old,
            "reference": reference,
            "advantages": judged.advantages,
            "values": values,
            "targets": judged.targets,
        }
        return batch, judged, whole, metrics

    def learn(state, completions: Rollout, scores, pretraining: TokenBatch | None = None):
        if bool(config.ptx_coef) != (pretraining is not None):
            raise ValueError(
                f"ptx_coef is {config.ptx_coef} and pretraining data is {'missing' if pretraining is None else 'given'}"
                "; PPO-ptx needs both, anything else neither"
            )
        coefficient = state.kl_coef if config.kl_target is not None else config.kl_coef
        batch, judged, whole, metrics = experience(state, completions, scores, coefficient)
        rows = completions.tokens.shape[0]
        changes: dict[str, Any] = {"scores": judged.score_moments, "returns": judged.return_moments}
        if config.kl_target is not None:
            adapted = kl.adapted_coefficient(
                state.kl_coef, whole, target=config.kl_target, samples=rows, horizon=config.kl_horizon
            )
            changes["kl_coef"] = jnp.where(state.step >= config.critic_warmup, adapted, state.kl_coef)
            metrics["policy/kl_coef"] = state.kl_coef
        orders = _shuffles(_step_key(state, 1), config, rows=rows)

        def step(state, place):
            part, extra = jax.tree.map(lambda x: x[orders[place]], batch), None
            number = state.step * updates + place
            if pretraining is not None:
                key = jax.random.fold_in(state.key, (1 << 30) + 1)
                examples = pretraining.tokens.shape[0]
                taken = update.epoch_batch(key, number, batch=config.ptx_batch, examples=examples)
                extra = constrain(jax.tree.map(lambda x: x[taken], pretraining))
            return one(state, part, extra, coefficient, number)

        state, stacked = jax.lax.scan(step, state, jnp.arange(updates))
        metrics |= {name: x[-1] if name == "train/skipped" else x.mean() for name, x in stacked.items()}
        return dataclasses.replace(state, step=state.step + 1, **changes), metrics

    return PPO(init, sample, learn)


def fused(ppo: PPO, reward: Callable, config: PPOConfig) -> Callable:
    """One iteration as one pure function `(state, Data) -> (state, metrics)`.

    Args:
      ppo: from `make`.
      reward: `(rollout of B rows, answers of B rows) -> [B]`, traceable; where the data has `reward_params`, these are
        its third argument: `lambda rollout, _, params: reward_model.score_rollout(model, params, rollout)`.
      config: that of `make`.
    """

    def step(state, data: Data):
        completions, rows = ppo.sample(state, data.prompts)
        answers = jax.tree.map(lambda x: jnp.repeat(x[rows], config.group, axis=0), data.answers)
        more = () if data.reward_params is None else (data.reward_params,)
        return ppo.learn(state, completions, reward(completions, answers, *more), data.pretraining)

    return step


def hosted(ppo: PPO, reward: Callable[[Rollout, Any], Any]) -> Callable:
    """The same iteration with Python between two programs; for `loop.run(..., jit=False)`.

    Args:
      ppo: from `make`.
      reward: `(rollout on the host, rows [prompts] of the problems) -> [B]` numbers, NaN where there is none.
    """
    sample, learn = jax.jit(ppo.sample), jax.jit(ppo.learn, donate_argnums=0)

    def step(state, data: Data):
        completions, rows = sample(state, data.prompts)
        scores = host_rewards(reward, completions, rows).values
        return learn(state, completions, jnp.asarray(scores), data.pretraining)

    return step


def _step_key(state: update.TrainState, use: int) -> jax.Array:
    """A key of its own for each step and use; the permutations of `epoch_batch` use the epoch's number instead."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.key, 1 << 30), state.step), use)


def _shuffles(key: jax.Array, config: PPOConfig, *, rows: int) -> jax.Array:
    """Rows of each update, `[epochs * minibatches, rows / minibatches]`: every pass a fresh permutation."""
    orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, config.epochs))
    return orders.reshape(config.epochs * config.minibatches, rows // config.minibatches)
