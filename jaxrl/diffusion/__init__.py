"""Language models that undo masks: masked diffusion (LLaDA, MDLM) and block diffusion, on any `LanguageModel`.

part = diffusion.noised(key, batch, mask_id=mask_id)
(total, weight), metrics = diffusion.loss(model, params, part, mask_id=mask_id)
completions = diffusion.generate(model, params, prompts, key, sampling=..., mask_id=mask_id, eos_id=..., pad_id=...)
"""

from jaxrl.diffusion.likelihood import log_likelihood as log_likelihood
from jaxrl.diffusion.likelihood import log_probs_of as log_probs_of
from jaxrl.diffusion.likelihood import loss as loss
from jaxrl.diffusion.likelihood import values as values
from jaxrl.diffusion.likelihood import variances as variances
from jaxrl.diffusion.noise import Noised as Noised
from jaxrl.diffusion.noise import ended as ended
from jaxrl.diffusion.noise import intervals as intervals
from jaxrl.diffusion.noise import masked_by as masked_by
from jaxrl.diffusion.noise import noised as noised
from jaxrl.diffusion.noise import shortened as shortened
from jaxrl.diffusion.posttrain import completion_log_probs as completion_log_probs
from jaxrl.diffusion.posttrain import responses as responses
from jaxrl.diffusion.sample import generate as generate
from jaxrl.diffusion.sample import generate_in_blocks as generate_in_blocks
from jaxrl.diffusion.sample import infill as infill
from jaxrl.posttrain.unmasking import Unmasking as Unmasking
