"""Distillation on the student's own samples: what it writes is graded by the teacher, token by token.

GKD: Agarwal et al. 2023, arXiv 2306.13649; reverse KL on own samples also MiniLLM, Gu et al. 2023, arXiv 2306.08543.
Distillation on the teacher's samples is supervised tuning on them: `long2short.sample`, `select`, and `sft`.

No pass holds the logits of all tokens: the divergence goes over chunks of tokens, forward and backward.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxrl.data.tokenizer import Tokenizer, same_tokens
from jaxrl.losses import kl, policy, reduce
from jaxrl.nets.language_model import LanguageModel, logits
from jaxrl.posttrain import update
from jaxrl.posttrain.rollout import Sampling, rollout
from jaxrl.posttrain.score import layout, log_probs_of
from jaxrl.types import Finish, Prompts, Rollout, TokenBatch

ESTIMATORS = ("full", "sampled")
CHUNK_LOGITS = 2**21  # of student and of teacher each, where `chunk` is left to us


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """One step of distillation."""

    estimator: str = "full"
    """full: the divergence over the whole vocabulary. sampled: the reverse KL's policy gradient from the tokens that
    were drawn, each with the advantage log teacher - log student."""
    beta: float = 1.0
    """Divergence: 0 forward KL, 1 reverse KL, between them the generalised Jensen-Shannon divergence."""
    temperature: float = 1.0
    """Divides the logits of both models in the divergence."""
    prompts: int = 32
    """Prompts per step; a step on given examples takes prompts * group of them."""
    group: int = 1
    """Completions for each prompt."""
    on_policy: float = 1.0
    """Share of steps on the student's own samples; the others are on given examples (GKD's lambda)."""
    micro_batches: int = 1
    """Parts in which a batch is computed; the gradient is the whole batch's."""
    chunk: int = 0
    """Tokens whose logits are held at once; 0 chooses."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """How the student's completions are drawn."""

    def __post_init__(self):
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator is {self.estimator!r}; expected one of {', '.join(ESTIMATORS)}")
        limits = {
            "beta": (0 <= self.beta <= 1, "0 (forward KL) to 1 (reverse KL)"),
            "temperature": (self.temperature > 0, "more than 0"),
            "on_policy": (0 <= self.on_policy <= 1, "a share from 0 to 1"),
            "prompts": (self.prompts >= 1, "at least 1"),
            "group": (self.group >= 1, "at least 1"),
            "chunk": (self.chunk >= 0, "at least 1, or 0"),
        }
        for name, (valid, expected) in limits.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}")
        rows = self.prompts * self.group
        if self.micro_batches < 1 or rows % self.micro_batches:
            raise ValueError(f"micro_batches is {self.micro_batches}; it must divide the {rows} completions of a step")
        if self.estimator == "sampled":
            own = dataclasses.replace(self.sampling, temperature=1.0)
            if self.beta != 1 or self.on_policy != 1 or self.sampling.temperature != self.temperature or own.filters:
                raise ValueError(
                    f"the sampled estimator is of the reverse KL, from the student's own samples: it was given beta "
                    f"{self.beta}, on_policy {self.on_policy}, temperature {self.temperature} and {self.sampling}; "
                    "expected beta 1, on_policy 1, sampling at the same temperature, no filters"
                )


@flax.struct.dataclass
class Data:
    """What a run reads.

    `prompts`: of `N` problems. `teacher`: the teacher's parameters, data like any other. `examples`: what steps that
    are not on policy learn from, or None.
    """

    prompts: Prompts
    teacher: Any
    examples: TokenBatch | None = None


class Distill(NamedTuple):
    """The pure functions of a run.

    init: `(key, params of the student) -> TrainState`.
    step: `(state, Data) -> (state, metrics)`.
    """

    init: Callable
    step: Callable


def divergence(log_student: jax.Array, log_teacher: jax.Array, *, beta: float) -> jax.Array:
    """The divergence of two categorical distributions, p the teacher's and q the student's.

        beta = 0   KL(p || q), forward: cover all that the teacher does
        beta = 1   KL(q || p), reverse: do nothing that the teacher would not
        else       beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q      (GKD, equation 1)

    The last goes to 0 at both ends; divided by beta or 1 - beta it goes to the two KLs, which therefore stand there.

    Args:
      log_student, log_teacher: `[..., V]` normalised log-probs.
      beta: a Python number in [0, 1].

    Returns:
      `[...]` float32. Differentiable in both.
    """
    if beta == 0:
        return kl.categorical(log_teacher, log_student)
    if beta == 1:
        return kl.categorical(log_student, log_teacher)
    log_mixture = jnp.logaddexp(log_teacher + math.log(beta), log_student + math.log1p(-beta))
    return beta * kl.categorical(log_teacher, log_mixture) + (1 - beta) * kl.categorical(log_student, log_mixture)


def token_divergence(
    hidden: jax.Array,
    unembedding: jax.Array,
    teacher_hidden: jax.Array,
    teacher_unembedding: jax.Array,
    targets: jax.Array,
    *,
    beta: float,
    temperature: float = 1.0,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`divergence` of next-token distributions from hidden states, with the logits of one chunk of tokens at a time.

    The backward pass computes each chunk's logits anew. The teacher gets no gradient.

    Args:
      hidden, unembedding: `[B, T, D]` and `[D, V]` of the student.
      teacher_hidden, teacher_unembedding: `[B, T, E]` and `[E, V]`.
      targets: `[B, T]`, the tokens that follow.
      beta: as in `divergence`.
      temperature: divides the logits of both.
      chunk: tokens of a chunk; 0 takes as many as make two million logits.

    Returns:
      `(divergence, log student / teacher of the targets, entropy of the student)`, each `[B, T]` float32; only the
      first has a gradient.

    Raises:
      ValueError: vocabularies of two sizes.
    """
    vocabulary = unembedding.shape[1]
    if teacher_unembedding.shape[1] != vocabulary:
        raise ValueError(
            f"distill: the student has {vocabulary} tokens and the teacher {teacher_unembedding.shape[1]}; expected "
            "models with the same tokenizer"
        )
    shape, count = targets.shape, targets.size
    chunk = min(chunk or max(CHUNK_LOGITS // vocabulary, 1), count)

    @jax.checkpoint
    def one(part):
        states, teacher_states, following = part
        log_q, log_p = (
            jax.nn.log_softmax(logits(x, w) / temperature)
            for x, w in ((states, unembedding), (teacher_states, jax.lax.stop_gradient(teacher_unembedding)))
        )
        values = divergence(log_q, log_p, beta=beta)
        fixed = jax.lax.stop_gradient(log_q)
        entropy = policy.entropy_from_log_probs(fixed)
        gap = jnp.take_along_axis(fixed - log_p, following[:, None], axis=-1)[:, 0]
        return values, gap, entropy

    flat = (
        hidden.reshape(count, -1),
        jax.lax.stop_gradient(teacher_hidden).reshape(count, -1),
        targets.reshape(count),
    )
    if chunk == count:
        out = one(flat)
    else:
        number = -(-count // chunk)
        fill = lambda x: jnp.pad(x, [(0, number * chunk - count)] + [(0, 0)] * (x.ndim - 1))
        parts = jax.tree.map(lambda x: fill(x).reshape(number, chunk, *x.shape[1:]), flat)
        out = jax.tree.map(lambda x: x.reshape(-1)[:count], jax.lax.map(one, parts))
    values, gap, entropy = (x.reshape(shape) for x in out)
    return values, gap, entropy


def examples_of(completions: Rollout) -> TokenBatch:
    """A rollout as right-padded rows `[B, P + C]`, the completions to be learnt."""
    columns = jnp.arange(completions.tokens.shape[1])[None]
    padding = (completions.prompt_width - completions.prompt_lengths)[:, None]
    source = jnp.minimum(columns + padding, columns.shape[1] - 1)
    shift = lambda x: jnp.take_along_axis(x, source, axis=1)
    mask = jnp.pad(completions.mask, ((0, 0), (completions.prompt_width, 0)))
    inside = columns < (completions.prompt_lengths + completions.lengths)[:, None]
    return TokenBatch(shift(completions.tokens), shift(mask) * inside)


def loss(
    config: DistillConfig, student: LanguageModel, params, teacher: LanguageModel, teacher_params, batch: TokenBatch
):
    """The loss of a batch and its companions, as (total, weight) pairs: means over tokens.

        full      D(p_t, q_t), summed over the vocabulary
        sampled   -(log p(y_t) - log q(y_t)) log q(y_t), the bracket held fixed: in expectation grad KL(q_t || p_t)

    Neither gradient goes through the sampling. "sampled" looks at one token ahead only (a discount of 0).

    Returns:
      `(Weighted, {"distill/log_ratio", "policy/entropy": Weighted})`.
    """
    if config.estimator == "sampled":
        log_q, entropy, mask = log_probs_of(student, params, batch, temperature=config.temperature)
        log_p, _, _ = log_probs_of(teacher, teacher_params, batch, temperature=config.temperature)
        gap = jax.lax.stop_gradient(log_q - log_p)
        values = policy.policy_gradient(log_q, -gap)
    else:
        segments = batch.segments
        seen, positions = layout(None if segments is None else segments[:, :-1])
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        hidden, _ = student.apply(params, inputs, positions=positions, mask=seen)
        teacher_hidden, _ = teacher.apply(teacher_params, inputs, positions=positions, mask=seen)
        values, gap, entropy = token_divergence(
            hidden,
            student.unembedding(params),
            teacher_hidden,
            teacher.unembedding(teacher_params),
            targets,
            beta=config.beta,
            temperature=config.temperature,
            chunk=config.chunk,
        )
        mask = batch.loss_mask[:, 1:]
        if segments is not None:
            mask = jnp.where(segments[:, 1:] == segments[:, :-1], mask, 0.0)
    metrics = {"distill/log_ratio": gap, "policy/entropy": entropy}
    return reduce.tokens(values, mask), {
        name: reduce.tokens(jax.lax.stop_gradient(value), mask) for name, value in metrics.items()
    }


def make(
    config: DistillConfig,
    student: LanguageModel,
    teacher: LanguageModel,
    optimizer: optax.GradientTransformation,
    *,
    eos_id: int,
    pad_id: int,
    max_grad_norm: float = 1.0,
    constrain: Callable = lambda batch: batch,
) -> Distill:
    """The pure functions of a run.

    Args:
      config: sizes and the divergence.
      student, teacher: two models of one vocabulary; see `LanguageModel`.
      optimizer: from `update.make_optimizer`, or any optax transformation.
      eos_id, pad_id: see `rollout`.
      max_grad_norm: global norm above which the gradient is scaled down; 0 leaves it.
      constrain: puts a batch pytree onto the mesh (`parallel.shard_batch`); the identity on one device.
    """
    rows_of_step = config.prompts * config.group
    descend = partial(update.descend, micro_batches=config.micro_batches, max_grad_norm=max_grad_norm)

    def init(key, params):
        return update.init_state(params, optimizer, key)

    def own_samples(state, data: Data) -> tuple[TokenBatch, jax.Array]:
        number = data.prompts.tokens.shape[0]
        rows = update.epoch_batch(state.key, state.step, batch=config.prompts, examples=number)
        completions = rollout(
            student,
            state.params,
            constrain(jax.tree.map(lambda x: x[rows], data.prompts)),
            _key(state, 0),
            sampling=config.sampling,
            eos_id=eos_id,
            pad_id=pad_id,
            samples=config.group,
        )
        return constrain(examples_of(completions)), (completions.finish == Finish.LENGTH).mean()

    def given(state, data: Data) -> tuple[TokenBatch, jax.Array]:
        assert data.examples is not None, "steps that are not on policy need examples"
        number = data.examples.tokens.shape[0]
        rows = update.epoch_batch(state.key, state.step, batch=rows_of_step, examples=number)
        return constrain(jax.tree.map(lambda x: x[rows], data.examples)), jnp.float32(jnp.nan)

    def drawn(state, data: Data):
        if config.on_policy == 1:
            return own_samples(state, data)
        if config.on_policy == 0:
            return given(state, data)
        own, other = (jax.eval_shape(f, state, data)[0].tokens.shape[1] for f in (own_samples, given))
        widen = lambda x: jnp.pad(x, ((0, 0), (0, max(own, other) - x.shape[1])))
        wide = lambda f: lambda: (lambda batch, cut: (jax.tree.map(widen, batch), cut))(*f(state, data))
        coin = jax.random.uniform(_key(state, 1)) < config.on_policy
        return jax.lax.cond(coin, wide(own_samples), wide(given))

    def step(state, data: Data):
        batch, truncated = drawn(state, data)
        of = lambda student, params, part: loss(config, student, params, teacher, data.teacher, part)
        state, metrics = descend(state, student, of, batch, optimizer)
        tokens = batch.loss_mask[:, 1:].sum()
        lengths = {"completion/length": tokens / rows_of_step, "completion/truncated": truncated}
        metrics |= {**lengths, "throughput/tokens": tokens}
        return dataclasses.replace(state, step=state.step + 1), metrics

    return Distill(init, step)


def check_tokenizers(student: Tokenizer, teacher: Tokenizer) -> None:
    """Raises ValueError unless the ids of both mean the same."""
    if not same_tokens(student, teacher):
        kinds = [f"{one.to_json()['kind']} of {one.vocab_size} tokens" for one in (student, teacher)]
        raise ValueError(
            f"the student's tokenizer ({kinds[0]}) is not the teacher's ({kinds[1]}), so their ids mean different "
            "things; start the student from a model with the teacher's tokenizer, or from nothing without --tokenizer. "
            "With two tokenizers, train on the teacher's samples: jaxrl train sft"
        )


def _key(state: update.TrainState, use: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.key, 1 << 30), state.step), use)
