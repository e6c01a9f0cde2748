"""Losses as pure functions of arrays: per-element values first, reductions apart (`reduce`)."""

from jaxrl.losses import group as group
from jaxrl.losses import kl as kl
from jaxrl.losses import policy as policy
from jaxrl.losses import reduce as reduce
from jaxrl.losses import segments as segments
from jaxrl.losses import tokens as tokens
