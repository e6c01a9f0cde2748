"""Losses as pure functions of arrays: values per element first, reductions apart (`reduce`).

from jaxrl.losses import group, reduce
values, diagnostics = group.loss(..., variant=group.PRESETS["dapo"])
total, weight = reduce.tokens(values, mask)
"""

from jaxrl.losses import continuous as continuous
from jaxrl.losses import diffusion as diffusion
from jaxrl.losses import group as group
from jaxrl.losses import kl as kl
from jaxrl.losses import policy as policy
from jaxrl.losses import preference as preference
from jaxrl.losses import reduce as reduce
from jaxrl.losses import reward as reward
from jaxrl.losses import segmentation as segmentation
from jaxrl.losses import segments as segments
from jaxrl.losses import td as td
from jaxrl.losses import tokens as tokens
from jaxrl.losses.policy import approx_kl as approx_kl
from jaxrl.losses.policy import clipped_surrogate as clipped_surrogate
from jaxrl.losses.policy import entropy_from_log_probs as entropy_from_log_probs
from jaxrl.losses.policy import entropy_from_logits as entropy_from_logits
from jaxrl.losses.policy import policy_gradient as policy_gradient
from jaxrl.losses.policy import ppo_clip as ppo_clip
from jaxrl.losses.policy import reinforce as reinforce
from jaxrl.losses.policy import value_loss as value_loss
from jaxrl.losses.reduce import Weighted as Weighted
from jaxrl.losses.reward import bradley_terry as bradley_terry
from jaxrl.losses.td import double_q_learning as double_q_learning
from jaxrl.losses.td import expected_sarsa as expected_sarsa
from jaxrl.losses.td import huber as huber
from jaxrl.losses.td import n_step_td_learning as n_step_td_learning
from jaxrl.losses.td import q_learning as q_learning
from jaxrl.losses.td import sarsa as sarsa
from jaxrl.losses.td import squared as squared
from jaxrl.losses.td import td_learning as td_learning
from jaxrl.losses.tokens import cross_entropy as cross_entropy
from jaxrl.losses.tokens import negative_log_likelihood as negative_log_likelihood
