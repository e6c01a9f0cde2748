"""In what order masks are filled; free of JAX, so that help is there at once."""

import dataclasses

ORDERS = ("confidence", "random", "ancestral")
EOS = ("free", "late", "never")


@dataclasses.dataclass(frozen=True)
class Unmasking:
    """For networks that fill in masks: in what order. Which token comes there is up to `Sampling`."""

    block: int = 0
    """Places that are filled before the next ones are begun (semi-autoregressive); 0: the whole completion."""
    steps: int = 0
    """Passes of the network over a block; 0: one for each token."""
    order: str = "confidence"
    """"confidence": the most probable of all draws stay, the others are masked again (arXiv 2502.09992, algorithm 5).
    "random": as many as that, anywhere (algorithm 4); with one token a step this is the first-hitting sampler, exact
    for absorbing noise (arXiv 2409.02908). "ancestral": each with probability 1 / steps left, as the reverse process
    with even steps has it (arXiv 2406.07524); a pass that would reveal nothing is left out."""
    guidance: float = 0.0
    """Classifier-free guidance s: logits u + (s + 1) (l - u), u those with the prompt masked, for a second row."""
    eos: str = "free"
    """"late": an EOS is less confident than any other token; "never": it is not drawn. Models that were tuned with
    EOS for padding are otherwise sure of it first, and end too soon."""

    def __post_init__(self):
        if self.order not in ORDERS or self.eos not in EOS:
            raise ValueError(
                f"order is {self.order!r} and eos is {self.eos!r}; expected one of {', '.join(ORDERS)} and one of "
                f"{', '.join(EOS)}"
            )
        if self.block < 0 or self.steps < 0 or self.guidance < 0:
            raise ValueError(
                f"block, steps and guidance are {self.block}, {self.steps} and {self.guidance}; expected 0 or more"
            )
