"""Log-probabilities of chosen tokens, and the entropy of the distribution they were drawn from."""

from jaxrl.kernels.log_probs.api import token_log_probs as token_log_probs
from jaxrl.kernels.log_probs.reference import select_log_probs as select_log_probs
