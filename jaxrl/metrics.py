"""A run's numbers: one JSON object a line, `group/name` keys, one step axis; and what the names mean."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

GLOSSARY = {
    "reward/mean": "mean reward of the step's completions",
    "reward/shaped": "the same with what length adds: overlong punishment, length reward",
    "reward/success_rate": "mean over all problems of how often each was solved lately",
    "rewards/NAME/mean": "mean of one part of a combined reward, before its weight; there is /std, too",
    "rewards/NAME/missing": "fraction of completions for which that part gave no value",
    "reward/std": "mean over prompts of the standard deviation inside a group",
    "reward/zero_std": "fraction of groups whose rewards are all equal, which teach nothing",
    "policy/entropy": "mean entropy of the next-token distribution, nats",
    "policy/kl": "mean of the named estimator of KL(policy || reference) per token, nats",
    "time/slowest_process": "seconds of the slowest process over the median of the others, waiting left out",
    "policy/lag": "updates between the policy that drew the batch and the one that learns from it",
    "policy/ratio_mean": "mean of new / old probability; exactly 1 on policy",
    "policy/clip_low": "fraction of tokens whose ratio was clipped below (negative advantage)",
    "policy/clip_high": "fraction of tokens whose ratio was clipped above (positive advantage)",
    "completion/length": "mean completion length in tokens, the EOS included",
    "completion/truncated": "fraction of completions that hit the token limit",
    "completion/repeated": "fraction of completions stopped for repeating themselves",
    "tools/calls": "calls of tools per completion",
    "tools/errors": "those that failed, per completion",
    "sampler/log_prob_gap": "mean |trainer - sampler| log-prob of the same token: rounding, when all is well",
    "sampler/importance": "mean weight between sampler and trainer, capped",
    "sampling/rounds": "rounds of sampling that a step took to fill its batch",
    "sampling/groups_kept": "fraction of the sampled groups whose rewards differ",
    "sampling/groups_ready": "fraction of groups whose completions have all ended: partial rollouts learn from these",
    "reward/score": "mean score as it enters the reward: normalised, clipped, punished, as the switches say",
    "reward/kl": "mean part of a completion's reward that its KL takes",
    "policy/kl_completion": "KL to the reference summed over a completion, nats",
    "policy/kl_coef": "weight of the KL, where it is adapted",
    "policy/approx_kl": "estimate of KL(old || new) of the update, nats per token",
    "policy/clip_dual": "fraction of tokens held by the dual clip",
    "reference/perplexity": "of the completions under the reference",
    "value/explained_variance": "share of the returns' variance that the critic explains",
    "value/grad_norm": "global norm of the critic's gradient before clipping",
    "ptx/loss": "cross-entropy of the pretraining data that is mixed in (PPO-ptx)",
    "rewards/chosen": "mean reward of the better responses; for DPO and KTO the implicit one, beta log pi / ref",
    "rewards/rejected": "the same of the worse responses",
    "rewards/margins": "chosen minus rejected reward",
    "rewards/accuracies": "fraction of pairs whose chosen response has the larger reward",
    "rewards/reference_point": "reward taken from both sides: BCO's running mean, KTO's estimate of beta KL",
    "rewards/step_accuracy": "fraction of steps that a process reward model judges right",
    "rewards/step_probability": "mean probability that a step is right",
    "logps/chosen": "mean log-prob of whole chosen responses, nats; both sides may fall",
    "logps/rejected": "the same of rejected ones",
    "train/multi_token_loss": "mean cross-entropy of the predictions beyond the next token",
    "masked/pair_loss": "cross-entropy of pairs of sentences",
    "masked/pair_accuracy": "pairs told right",
    "electra/generator_loss": "masked tokens' cross-entropy",
    "electra/discriminator_loss": "replaced or not, cross-entropy over all real tokens",
    "electra/replaced": "share of real tokens that the generator got wrong and the discriminator must find",
    "electra/accuracy": "share of real tokens told right",
    "diffusion/masked": "share of the tokens that may be masked which were masked",
    "distill/log_ratio": "mean log student / teacher of the tokens learnt: on policy an estimate of the reverse KL",
    "judge/decided": "fraction of groups with a best and a worst completion",
    "eval/pair_accuracy": "fraction of held-out comparisons ordered right, a tie half",
    "eval/step_accuracy": "fraction of held-out steps judged right, a tie half",
    "train/loss": "surrogate loss; near 0 is expected on policy, so watch reward and KL instead",
    "train/grad_norm": "global gradient norm before clipping",
    "train/skipped": "updates skipped so far because something was not finite",
    "train/target_probability": "mean probability of the token to be learnt",
    "router/max_violation": "largest load of an expert over the mean load, minus 1, mean over layers; 0 is even",
    "router/dropped": "fraction of choices that found no room in their expert, or were left out by chance",
    "router/entropy": "mean entropy of a router's distribution over experts, nats",
    "train/log_z_squared": "mean squared log-normaliser of the logits, which z_loss holds near 0",
    "eval/accuracy": "fraction of held-out problems answered exactly, greedy decoding",
    "eval/reward": "mean Python reward on the held-out problems, greedy decoding",
    "episode/return": "mean return of the episodes that ended while acting to learn, exploration included",
    "episode/length": "mean length of those episodes, steps",
    "episode/count": "episodes that ended in an update",
    "eval/return": "mean return of greedy episodes, over all members",
    "eval/returns": "the same for each member",
    "eval/length": "mean length of greedy episodes, steps",
    "policy/loss": "surrogate loss of the policy",
    "policy/clip": "fraction of steps whose ratio was clipped",
    "policy/ratio": "mean of new / old probability, or of the importance weights of off-policy learning",
    "policy/temperature": "reward that a nat of entropy is worth",
    "q/loss": "loss of the action values",
    "q/mean": "mean value of the actions that were taken",
    "q/target": "mean of what the action values are drawn to",
    "q/epsilon": "probability of a random action",
    "value/loss": "half the mean squared error of the critic",
    "throughput/env_steps_per_second": "environment steps of all members over the time of a round, compilation apart",
    "throughput/tokens": "tokens trained on in the step",
    "throughput/tokens_per_second": "the same over the time of the chunk, compilation apart",
    "time/elapsed": "seconds since the run began, earlier parts of a resumed run included",
}
"""What each metric says; printed by `jaxrl env --metrics`."""


class MetricsLog:
    """Appends to `metrics.jsonl`; on resume the lines after the restored step are dropped."""

    def __init__(self, path: str | os.PathLike, *, after_step: int = 0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read(self.path) if row["step"] <= after_step] if self.path.exists() else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.path)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line of numbers and lists of numbers; one that JSON cannot hold is written as null."""
        row = {"step": step, **{name: _plain(value) for name, value in metrics.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read(path: str | os.PathLike) -> Iterator[dict]:
    """Rows of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    lines = Path(path).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON object: {line[:80]!r}") from None


def _plain(value) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    value = float(value)
    return value if math.isfinite(value) else None
