"""Returns and advantages: every recursion over time and every comparison within a group, in one place.

Functions of time take one stream `[T]` (vmap for more) with the suffixes of RLax: step t leads from
observation t-1 to observation t, so `v_tm1[i]`, `r_t[i]`, `discount_t[i]` and `v_t[i]` belong to one
transition. `discount_t` is zero where the episode terminated. `v_t` is the value of the true successor, taken
before any reset. All results are float32.
"""

from jaxrl.returns.group import group_relative as group_relative
from jaxrl.returns.group import leave_one_out as leave_one_out
from jaxrl.returns.group import whiten as whiten
from jaxrl.returns.off_policy import TRACES as TRACES
from jaxrl.returns.off_policy import VTrace as VTrace
from jaxrl.returns.off_policy import off_policy_returns as off_policy_returns
from jaxrl.returns.off_policy import retrace as retrace
from jaxrl.returns.off_policy import vtrace as vtrace
from jaxrl.returns.recursions import Estimates as Estimates
from jaxrl.returns.recursions import discounted_returns as discounted_returns
from jaxrl.returns.recursions import discounted_scan as discounted_scan
from jaxrl.returns.recursions import gae as gae
from jaxrl.returns.recursions import lambda_returns as lambda_returns
from jaxrl.returns.recursions import n_step_returns as n_step_returns
from jaxrl.returns.tokens import token_gae as token_gae
from jaxrl.returns.tokens import token_rewards as token_rewards
