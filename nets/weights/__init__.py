"""Weights in and out: one name map per architecture."""

from jaxrl.nets.weights.configs import from_hugging_face as from_hugging_face
from jaxrl.nets.weights.names import from_checkpoint as from_checkpoint
from jaxrl.nets.weights.names import to_checkpoint as to_checkpoint
