"""The switches of PPO for language models; what they do is in `posttrain.ppo`."""

import dataclasses

from jaxrl.losses import kl
from jaxrl.posttrain.rollout import Sampling


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """One iteration of PPO. The defaults are the plain form; `PPO_MAX` turns the switches of PPO-max on."""

    prompts: int = 64
    """Prompts per iteration."""
    group: int = 1
    """Completions for each prompt."""
    epochs: int = 4
    """Passes over each iteration's completions."""
    minibatches: int = 1
    """Updates per pass."""
    micro_batches: int = 1
    """Parts in which each update's gradient is computed; it is the same gradient in less memory."""
    discount: float = 1.0
    """Weight of the next token's value, gamma."""
    lambda_: float = 0.95
    """Of generalised advantage estimation: 0 trusts the critic, 1 the rewards."""
    clip_low: float = 0.2
    """Clip of the ratio below, as a distance from 1."""
    clip_high: float = 0.2
    """Clip of the ratio above, as a distance from 1."""
    dual_clip: float | None = None
    """Bound, above 1, on the ratio where the advantage is negative (3 is usual); none: no bound."""
    kl_coef: float = 0.05
    """Weight of the KL to the parameters the run began with; with `kl_target`, the first one."""
    kl: str = "k1"
    """KL estimator: k1, k2, k3 or k3_ratio; see losses.kl for their gradients."""
    kl_in: str = "reward"
    """Where the KL enters: reward (per token, before GAE) or loss (not with k1, whose gradient is zero on average)."""
    kl_target: float | None = None
    """KL of a completion, in nats, that the weight is adapted to (arXiv 1909.08593); none: the weight stays."""
    kl_horizon: float = 10_000.0
    """Completions over which that weight changes by a fifth at most."""
    reference: bool = True
    """Keep the first parameters, for the KL and for what is watched of it; false needs kl_coef 0."""
    normalise_scores: str = "none"
    """By running moments: none, scale (over the standard deviation, as MOSS-RLHF's code) or normalise (centred too)."""
    score_clip: float | None = None
    """Bound on |score|, after that; none: no bound."""
    missing_eos_penalty: float = 0.0
    """Taken off the score, after both, of completions that hit the token limit."""
    scale_rewards: bool = False
    """Divide the rewards of all tokens by the running standard deviation of the completions' returns."""
    normalise_advantages: bool = False
    """Shift and scale the advantages of an iteration to mean 0 and standard deviation 1."""
    advantage_clip: float | None = None
    """Bound on |advantage|, after that; none: no bound."""
    value_clip: float | None = None
    """How far a value may move from its old one, in units of value; none: no bound."""
    value_coef: float = 1.0
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy."""
    critic: str = "separate"
    """The critic: separate (a model of its own) or shared (a head on the policy's trunk, which runs a second time)."""
    critic_warmup: int = 0
    """Iterations at the start in which only the critic learns; of a shared one, only the head."""
    ptx_coef: float = 0.0
    """Weight of the gradient of next-token prediction on other data, PPO-ptx (27.8 in InstructGPT)."""
    ptx_batch: int = 32
    """Examples of that data in each update."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """How completions are drawn."""

    def __post_init__(self):
        if self.sampling.temperature == 0:
            raise ValueError("sampling temperature is 0; PPO learns from how sampled completions differ: raise it")
        for name in ("prompts", "group", "epochs", "ptx_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        named = {
            "kl": kl.ESTIMATORS,
            "kl_in": ("reward", "loss"),
            "normalise_scores": ("none", "scale", "normalise"),
            "critic": ("separate", "shared"),
        }
        for name, known in named.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        for name in ("kl_target", "score_clip", "advantage_clip", "value_clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; expected a number above 0, or none for no bound")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip is {self.dual_clip}; expected a bound on the ratio above 1, or none")
        if self.kl_in == "loss" and self.kl == "k1" and self.kl_coef:
            raise ValueError("kl is 'k1' in the loss, where its gradient is zero on average; take k2, k3 or k3_ratio")
        if self.kl_target is not None and self.kl_coef <= 0:
            raise ValueError(f"kl_target is {self.kl_target} with kl_coef {self.kl_coef}, which can only stay there")
        if self.kl_coef and not self.reference:
            raise ValueError(f"reference is false with kl_coef {self.kl_coef}; set it to 0, or keep the reference")
        whole = self.prompts * self.group
        splits = {"minibatches": whole, "micro_batches": whole // max(self.minibatches, 1)}
        for name, rows in splits.items():
            parts = getattr(self, name)
            if parts < 1 or rows % parts:
                raise ValueError(f"{name} is {parts}; it must divide the {rows} completions that it splits")
        if self.ptx_coef and self.ptx_batch % self.micro_batches:
            raise ValueError(f"micro_batches is {self.micro_batches}; it must divide the ptx_batch of {self.ptx_batch}")


PPO_MAX = PPOConfig(
    normalise_scores="normalise",
    score_clip=3.0,
    normalise_advantages=True,
    advantage_clip=3.0,
    value_clip=0.2,
    critic_warmup=10,
)
"""PPO-max: normalised and clipped scores and advantages, value clip, critic warm-up, a KL of 0.05 on every token.

The paper adds a critic that begins as the reward model (`init`'s `critic`), a clip of the gradient norm (`make`) and,
with data for it, PPO-ptx (`ptx_coef`). It names no one value of the clips for all tasks; here they cut off outliers.
"""
