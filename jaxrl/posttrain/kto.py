"""KTO: learning from responses that are judged one by one, as pure functions.

examples = mismatched(labelled)                        # once, on the host
data = jax.jit(kto.reference)(params, labelled, examples)
state, metrics = kto.step(state, data)
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl.losses import preference as family
from jaxrl.losses import reduce
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain import update
from jaxrl.posttrain.preference import check_batches, in_parts, responses
from jaxrl.types import Labelled, TokenBatch


@dataclasses.dataclass(frozen=True)
class KTOConfig:
    """One step of KTO."""

    batch: int = 32
    """Examples per step."""
    micro_batches: int = 1
    """Parts in which a batch is computed; the gradient is the whole batch's."""
    beta: float = 0.1
    """Scale of the implicit reward."""
    desirable_weight: float = 1.0
    """Weight of desirable examples. The paper keeps (this times their number) / (the same of the undesirable) in
    [1, 4/3]."""
    undesirable_weight: float = 1.0
    """Weight of undesirable examples."""

    def __post_init__(self):
        check_batches(self.batch, self.micro_batches)
        if self.beta <= 0 or self.desirable_weight < 0 or self.undesirable_weight < 0:
            raise ValueError(
                f"beta is {self.beta}, desirable_weight {self.desirable_weight} and undesirable_weight "
                f"{self.undesirable_weight}; expected a positive beta and weights of at least 0"
            )


@flax.struct.dataclass
class KTOData:
    """`N` labelled examples and what the reference says of them.

    `mismatched`: `[N, W]` each prompt with the response to another one. `reference`, `mismatched_reference`: `[N]`
    float32 log-probs of the responses under the reference, summed over tokens.
    """

    labelled: Labelled
    mismatched: TokenBatch
    reference: jax.Array
    mismatched_reference: jax.Array


class KTO(NamedTuple):
    """The pure functions of a run.

    init: `(key, params) -> TrainState`.
    reference: `(params, labelled, mismatched) -> KTOData`; to be called once, under jit.
    step: `(state, KTOData of all N examples) -> (state, metrics)`.
    rewards: `(params, KTOData) -> [N]` implicit rewards.
    """

    init: Callable
    reference: Callable
    step: Callable
    rewards: Callable


def mismatched(labelled: Labelled, *, seed: int = 0) -> TokenBatch:
    """Each prompt followed by the response to another prompt, for KTO's estimate of the KL. On the host.

    The partner is the next one, in a random order of all examples, whose prompt differs; where there is only one
    prompt, the next one. The paper takes the partner from within each batch: drawn once for the whole data set it
    comes from the same distribution, and the reference's log-probs can be kept. (A plain shift by one, as others do,
    often meets the same prompt, since data sets list its responses one after the other.)

    Args:
      labelled: `N` examples, right-padded: a prompt, then the response that the loss mask covers.
      seed: of the order.

    Returns:
      A `TokenBatch` `[N, W]`, wide enough for the longest.

    Raises:
      ValueError: packed examples, fewer than two, or one without a response.
    """
    if labelled.examples.segments is not None:
        raise ValueError("mismatched: the examples are packed; expected one example a row: encode them without packing")
    tokens, mask = (np.asarray(x) for x in (labelled.examples.tokens, labelled.examples.loss_mask))
    if len(tokens) < 2 or not (mask > 0).any(axis=1).all():
        raise ValueError(
            f"mismatched: {len(tokens)} examples, {int((mask > 0).any(axis=1).sum())} of them with a response; "
            "expected at least 2, all with one"
        )
    starts, ends = (mask > 0).argmax(axis=1), mask.shape[1] - (mask[:, ::-1] > 0).argmax(axis=1)
    prompts = [row[:start].tobytes() for row, start in zip(tokens, starts, strict=True)]
    order = np.random.default_rng(seed).permutation(len(tokens))
    alike = len(set(prompts)) == 1
    rows = []
    for place, row in enumerate(order):
        later = (order[(place + step) % len(order)] for step in range(1, len(order)))
        partner = next(other for other in later if alike or prompts[other] != prompts[row])
        rows.append((row, tokens[row, : starts[row]], tokens[partner, starts[partner] : ends[partner]]))
    width = max(len(prompt) + len(response) for _, prompt, response in rows)
    joined, counted = np.zeros((len(tokens), width), tokens.dtype), np.zeros((len(tokens), width), np.float32)
    for row, prompt, response in rows:
        end = len(prompt) + len(response)
        joined[row, :end], counted[row, len(prompt) : end] = np.concatenate([prompt, response]), 1.0
    return TokenBatch(jnp.asarray(joined), jnp.asarray(counted))


def make(
    config: KTOConfig,
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    *,
    max_grad_norm: float = 1.0,
    constrain: Callable = lambda batch: batch,
) -> KTO:
    """The pure functions of a run (Ethayarajh et al. 2024, arXiv 2402.01306).

    The reference point is computed once for each batch, from the batch's own mismatched responses, so micro-batches
    are exact.

    Args:
      config: batch sizes and the loss.
      model: four functions; see `LanguageModel`.
      optimizer: from `update.make_optimizer`, or any optax transformation.
      max_grad_norm: global norm above which the gradient is scaled down; 0 leaves it.
      constrain: puts a batch pytree onto the mesh (`parallel.shard_batch`); the identity on one device.
    """
    descend = partial(update.descend, micro_batches=config.micro_batches, max_grad_norm=max_grad_norm)
    sums_of = lambda params, part: responses(model, params, constrain(part))[0]

    def init(key, params):
        return update.init_state(params, optimizer, key)

    def reference(params, labelled: Labelled, examples: TokenBatch):
        own, others = (
            in_parts(lambda part: sums_of(params, part), batch, rows=config.batch)
            for batch in (labelled.examples, examples)
        )
        return KTOData(labelled, examples, own, others)

    def loss(point, model, params, part: KTOData):
        sums, lengths, entropy = responses(model, params, part.labelled.examples)
        values, diagnostics = family.kto(
            sums - part.reference,
            part.labelled.desirable,
            reference_point=point,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        counted, wanted = lengths > 0, jnp.asarray(part.labelled.desirable, bool)
        metrics = {"policy/entropy": entropy}
        for name, value in (("rewards", diagnostics["rewards"]), ("logps", jax.lax.stop_gradient(sums))):
            metrics[f"{name}/chosen"] = reduce.elements(value, counted & wanted)
            metrics[f"{name}/rejected"] = reduce.elements(value, counted & ~wanted)
        return reduce.elements(values, counted), metrics

    def step(state, data: KTOData):
        examples = data.labelled.desirable.shape[0]
        rows = update.epoch_batch(state.key, state.step, batch=config.batch, examples=examples)
        batch = constrain(jax.tree.map(lambda x: x[rows], data))
        others = in_parts(
            lambda part: sums_of(state.params, part), batch.mismatched, rows=config.batch // config.micro_batches
        )
        point = family.kto_reference_point(others - batch.mismatched_reference)
        state, metrics = descend(state, model, partial(loss, point), batch, optimizer)
        metrics |= {
            "rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"],
            "rewards/reference_point": config.beta * point,
            "throughput/tokens": batch.labelled.examples.loss_mask[:, 1:].sum(),
        }
        return dataclasses.replace(state, step=state.step + 1), metrics

    def rewards(params, data: KTOData):
        sums = in_parts(lambda part: sums_of(params, part), data.labelled.examples, rows=config.batch)
        return config.beta * (sums - data.reference)

    return KTO(init, reference, step, rewards)
