"""`jaxrl train kimi`: Kimi k1.5's reinforcement learning, as settings of GRPO's recipe.

Kimi Team 2025, arXiv 2501.12599, section 2.3: mirror descent on a group of completions (losses.group.PRESETS["kimi"]),
its reference the policy at the start of each iteration, with fresh optimizer moments; several updates on each
iteration's completions; a length reward inside the group after a warm phase; problems drawn the more often the less
they were solved; a curriculum by the column `difficulty` where `grpo.curriculum_steps` is set.

The paper publishes neither the number of completions nor tau nor the weight of the length reward: the values here are
those that did well on small tasks (docs/reasoning.md). tau is that of the row, 0.1.
"""

from jaxrl.posttrain import update
from jaxrl.posttrain.grpo import GRPOConfig
from jaxrl.posttrain.recipes.grpo import GRPORun
from jaxrl.posttrain.recipes.grpo import train_grpo as train_kimi
from jaxrl.posttrain.rollout import Sampling

__all__ = ["KIMI_RUN", "train_kimi"]

KIMI_RUN = GRPORun(
    optimizer=update.OptimizerConfig(learning_rate=2e-5, warmup_steps=10),
    grpo=GRPOConfig(
        variant="kimi",
        prompts=32,
        group=8,
        minibatches=4,
        length_weight=0.5,
        length_warmup=50,
        prioritised=True,
        sampling=Sampling(max_tokens=64),
    ),
)
"""The defaults of `jaxrl train kimi`. Long2short by RL is a second run with `init` the first, `length_warmup` 0 and a
smaller `sampling.max_tokens`."""
