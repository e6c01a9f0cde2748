"""Rewards. A JAX reward keeps a whole iteration on the device; a Python reward runs between two programs.

A JAX reward is `(rollout, answers) -> [B]`, traceable. A Python reward is called like TRL's:
`reward(prompts=[...], completions=[...], completion_ids=[...], lengths=[...], finish_reasons=[...], **columns)` and
returns one number for each completion, or None where it cannot tell. Those of `*_reward(...)` are made by functions
that take their knobs; `combine` makes one of several. None of them evaluates or executes what a model wrote.
"""

from jaxrl.posttrain.rewards.answers import math_reward as math_reward
from jaxrl.posttrain.rewards.answers import number_reward as number_reward
from jaxrl.posttrain.rewards.answers import reasoning_reward as reasoning_reward
from jaxrl.posttrain.rewards.combine import Scores as Scores
from jaxrl.posttrain.rewards.combine import combine as combine
from jaxrl.posttrain.rewards.exact import Answers as Answers
from jaxrl.posttrain.rewards.exact import exact_answer as exact_answer
from jaxrl.posttrain.rewards.exact import exact_reward as exact_reward
from jaxrl.posttrain.rewards.exact import exact_text as exact_text
from jaxrl.posttrain.rewards.extract import boxed as boxed
from jaxrl.posttrain.rewards.extract import last_number as last_number
from jaxrl.posttrain.rewards.extract import marked as marked
from jaxrl.posttrain.rewards.extract import vote_key as vote_key
from jaxrl.posttrain.rewards.host import Reward as Reward
from jaxrl.posttrain.rewards.host import Scored as Scored
from jaxrl.posttrain.rewards.host import score as score
from jaxrl.posttrain.rewards.host import score_parts as score_parts
from jaxrl.posttrain.rewards.isolate import isolated as isolated
from jaxrl.posttrain.rewards.length import cosine_length as cosine_length
from jaxrl.posttrain.rewards.length import cosine_reward as cosine_reward
from jaxrl.posttrain.rewards.length import overlong_reward as overlong_reward
from jaxrl.posttrain.rewards.length import relative_length as relative_length
from jaxrl.posttrain.rewards.length import soft_overlong as soft_overlong
from jaxrl.posttrain.rewards.load import load_reward as load_reward
from jaxrl.posttrain.rewards.text import format_reward as format_reward
from jaxrl.posttrain.rewards.text import language_reward as language_reward
from jaxrl.posttrain.rewards.text import repetition_reward as repetition_reward
