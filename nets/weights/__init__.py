"""Weights in and out: one name map per architecture."""

from jaxrl.nets.weights.decoders import from_checkpoint as from_checkpoint
from jaxrl.nets.weights.decoders import from_hugging_face as from_hugging_face
from jaxrl.nets.weights.decoders import masking as masking
from jaxrl.nets.weights.decoders import to_checkpoint as to_checkpoint
from jaxrl.nets.weights.decoders import to_hugging_face as to_hugging_face
from jaxrl.nets.weights.decoders import with_masking as with_masking
from jaxrl.nets.weights.files import in_blocks as in_blocks
from jaxrl.nets.weights.files import read_safetensors as read_safetensors
from jaxrl.nets.weights.files import write_safetensors as write_safetensors
from jaxrl.nets.weights.gguf import read_gguf as read_gguf
from jaxrl.nets.weights.gguf_config import from_gguf as from_gguf
