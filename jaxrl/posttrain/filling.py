"""Networks that fill in masks, such as LLaDA: what the loops take in the place of next-token prediction."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxrl import diffusion
from jaxrl.nets.config import TransformerConfig
from jaxrl.posttrain.preference import DPOConfig
from jaxrl.posttrain.unmasking import Unmasking

KEPT = 1 << 30
"""A `reference_every` that no run reaches: the reference stays, and is scored in each step under the policy's masks."""


@dataclasses.dataclass(frozen=True)
class DiffusionOptions:
    """For networks that fill in masks: LLaDA's, from `init` or `--model.like llada-8b`. Others are not touched."""

    block: int = 0
    """Tokens of a block (block diffusion); 0: those of `init`, else whole sequences (masked diffusion)."""
    low: float = 1e-3
    """Least masked share that sft draws."""
    high: float = 1.0
    """Largest masked share that sft draws; a clipped range lowers the variance (block diffusion)."""
    samples: int = 8
    """dpo: masks that are drawn to estimate the likelihood of a response."""
    prompt_masked: float = 0.15
    """grpo: share of the prompt that is masked to estimate log-probs in one pass (diffu-GRPO)."""

    def __post_init__(self):
        if self.block < 0 or self.samples < 1:
            raise ValueError(f"block is {self.block} and samples {self.samples}; expected 0 or more, and at least 1")
        if not 0 < self.low < self.high <= 1 or not 0 <= self.prompt_masked <= 1:
            raise ValueError(
                f"low is {self.low}, high {self.high} and prompt_masked {self.prompt_masked}; expected 0 < low < high "
                "<= 1, and a share"
            )


class Filling(NamedTuple):
    """A network that fills in masks, and in what order. mask_id: the mask token. block: of block diffusion, or None."""

    mask_id: int
    block: int | None = None
    unmasking: Unmasking = Unmasking()

    def sampler(self) -> Callable:
        """What takes the place of `posttrain.rollout.rollout`.

        Raises:
          ValueError: an order in blocks of another size than those of training.
        """
        if self.block is None:
            return partial(diffusion.generate, mask_id=self.mask_id, unmasking=self.unmasking)
        if self.unmasking.block not in (0, self.block):
            raise ValueError(
                f"unmasking.block is {self.unmasking.block} and the network was trained with blocks of {self.block}; "
                "leave it out"
            )
        unmasking = dataclasses.replace(self.unmasking, block=self.block)
        return partial(diffusion.generate_in_blocks, mask_id=self.mask_id, unmasking=unmasking)

    def sft(self, options: DiffusionOptions, *, eos_id: int, packed: bool) -> dict[str, Any]:
        """Options of `sft.make`: noise drawn in each step, each response by its own length (LLaDA, algorithm 2).

        In rows of one example the EOS is learnt up to the end of the row, as a sampler fills a fixed number of places.
        """
        known: dict[str, Any] = {"mask_id": self.mask_id, "block": self.block}

        def prepare(key, batch):
            batch = batch if packed else diffusion.ended(batch, eos_id)
            return diffusion.noised(key, batch, span=(options.low, options.high), **known)

        return {"prepare": prepare, "objective": partial(diffusion.loss, reduction="sequences", **known)}

    def dpo(self, options: DiffusionOptions, config: DPOConfig) -> tuple[DPOConfig, dict[str, Any]]:
        """Config and options of `preference.make`: policy and reference under the same masks (VRPO)."""
        score = partial(diffusion.responses, mask_id=self.mask_id, samples=options.samples, block=self.block)
        return dataclasses.replace(config, reference_every=config.reference_every or KEPT), {"responses": score}

    def grpo(self, options: DiffusionOptions, key: jax.Array) -> dict[str, Any]:
        """Options of `grpo.make` (diffu-GRPO)."""
        known: dict[str, Any] = {"mask_id": self.mask_id, "block": self.block, "prompt_masked": options.prompt_masked}
        estimate = partial(diffusion.completion_log_probs, key=key, **known)
        return {"sampler": self.sampler(), "log_probs": estimate}


def filling_of(
    transformer: TransformerConfig, mask_id: int | None, block: int | None, unmasking: Unmasking
) -> Filling | None:
    """How a network writes: the `Filling` of one that fills in masks, None of one that reads from left to right.

    Raises:
      ValueError: a network that does neither; an order for one that has none.
    """
    if mask_id is not None:
        return Filling(mask_id, block, unmasking)
    if not transformer.causal:
        raise ValueError("the network sees tokens on both sides and names no mask token; expected one that writes text")
    if unmasking != Unmasking():
        raise ValueError("unmasking is for networks that fill in masks, and this one writes from left to right")
    return None
