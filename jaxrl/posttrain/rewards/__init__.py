"""Rewards. A JAX reward keeps a whole iteration on the device; a Python reward runs between two programs.

A JAX reward is `(rollout, answers) -> [B]`, traceable. A Python reward is called like TRL's:
`reward(prompts=[...], completions=[...], completion_ids=[...], lengths=[...], finish_reasons=[...], **columns)` and
returns one number for each completion, or None where it cannot tell.
"""

from jaxrl.posttrain.rewards.exact import Answers as Answers
from jaxrl.posttrain.rewards.exact import exact_answer as exact_answer
from jaxrl.posttrain.rewards.exact import exact_text as exact_text
from jaxrl.posttrain.rewards.host import Reward as Reward
from jaxrl.posttrain.rewards.host import load_reward as load_reward
from jaxrl.posttrain.rewards.host import score as score
from jaxrl.posttrain.rewards.length import relative_length as relative_length
from jaxrl.posttrain.rewards.length import soft_overlong as soft_overlong
