"""Checkpoint names of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM2) and our parameter paths."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl.nets.transformer import Transformer, TransformerConfig


class Place(NamedTuple):
    """Where a checkpoint tensor lives: our path, and whether it is stored [out, in], to be transposed."""

    path: str
    transpose: bool = False


MODEL = {
    "model.embed_tokens.weight": Place("embed/embedding"),
    "model.norm.weight": Place("norm/scale"),
    "lm_head.weight": Place("unembed/kernel", transpose=True),  # absent from tied checkpoints
}
LAYER = {  # "model.layers.{i}." + name; our arrays stack the layers on a leading axis
    "input_layernorm.weight": Place("attention_norm/scale"),
    "self_attn.q_proj.weight": Place("attention/q/kernel", transpose=True),
    "self_attn.k_proj.weight": Place("attention/k/kernel", transpose=True),
    "self_attn.v_proj.weight": Place("attention/v/kernel", transpose=True),
    "self_attn.o_proj.weight": Place("attention/o/kernel", transpose=True),
    "self_attn.q_proj.bias": Place("attention/q/bias"),  # the biases: Qwen2
    "self_attn.k_proj.bias": Place("attention/k/bias"),
    "self_attn.v_proj.bias": Place("attention/v/bias"),
    "self_attn.q_norm.weight": Place("attention/q_norm/scale"),  # the norms: Qwen3
    "self_attn.k_norm.weight": Place("attention/k_norm/scale"),
    "post_attention_layernorm.weight": Place("ffn_norm/scale"),
    "mlp.gate_proj.weight": Place("ffn/gate/kernel", transpose=True),
    "mlp.up_proj.weight": Place("ffn/up/kernel", transpose=True),
    "mlp.down_proj.weight": Place("ffn/down/kernel", transpose=True),
}
IGNORED = ("rotary_emb.inv_freq", "rope_freqs.weight")  # tables that follow from the config; old files hold them
GGUF_MODEL = {  # llama.cpp's names -> checkpoint names
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GGUF_LAYER = {  # "blk.{i}." + name -> "model.layers.{i}." + name
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
GGUF_INTERLEAVED = {  # architecture -> tensors whose rows llama.cpp reorders, and the metadata key of their heads
    "llama": {"attn_q.weight": "head_count", "attn_k.weight": "head_count_kv"},
}


def gguf_names(layers: int) -> dict[str, str]:
    """llama.cpp's tensor names -> checkpoint names."""
    each = {
        f"blk.{i}.{theirs}": f"model.layers.{i}.{name}" for i in range(layers) for theirs, name in GGUF_LAYER.items()
    }
    return GGUF_MODEL | each


def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter paths and shapes, as init makes them."""
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _wanted(config: TransformerConfig) -> dict[str, tuple[str, int | None, bool, tuple[int, ...]]]:
    """Checkpoint name -> (our path, layer or None, transpose, shape in the checkpoint)."""
    shapes = _shapes(config)
    wanted = {}
    for name, (path, transpose) in MODEL.items():
        if path in shapes:
            wanted[name] = path, None, transpose, shapes[path]
    for name, (path, transpose) in LAYER.items():
        path = f"layers/{path}"
        if path in shapes:
            for i in range(config.layers):
                wanted[f"model.layers.{i}.{name}"] = path, i, transpose, shapes[path][1:]
    unnamed = sorted(shapes.keys() - {path for path, *_ in wanted.values()})
    if unnamed:
        raise ValueError(f"no checkpoint of the Llama family has names for {', '.join(unnamed)}; keep the run folder")
    return {n: (p, i, t, shape[::-1] if t else shape) for n, (p, i, t, shape) in wanted.items()}


def from_checkpoint(config: TransformerConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters from a checkpoint's tensors.

    Args:
      config: the network; decides which tensors must be there.
      tensors: checkpoint name -> array, or `Stored` in a file: one at a time is read and converted. With tied
        embeddings a repeated `lm_head.weight` is ignored, and so are tables of rotary frequencies.

    Returns:
      The nested dict of `jaxrl.nets.transformer.Transformer`, numpy arrays in `config.param_dtype`.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    wanted = _wanted(config)
    spare = {"lm_head.weight"} if config.tie_embeddings else set()
    problems = [f"missing {name}, expected {want[3]}" for name, want in wanted.items() if name not in tensors]
    unused = [name for name in tensors if name not in wanted and name not in spare and not name.endswith(IGNORED)]
    problems += [f"unused {name}" for name in unused]
    problems += [
        f"{name} has shape {tuple(np.shape(tensors[name]))}, expected {want[3]}"
        for name, want in wanted.items()
        if name in tensors and tuple(np.shape(tensors[name])) != want[3]
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the config:\n  " + "\n  ".join(problems))
    params: dict = {}
    for name, (path, layer, transpose, shape) in wanted.items():
        shape = shape[::-1] if transpose else shape
        tensor = np.asarray(tensors[name])
        tensor = tensor.T if transpose else tensor
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        if leaf not in node:
            full = shape if layer is None else (config.layers, *shape)
            node[leaf] = np.empty(full, np.dtype(config.param_dtype))
        node[leaf][... if layer is None else layer] = tensor
    return params


def to_checkpoint(config: TransformerConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`: checkpoint name -> numpy array, layers unstacked.

    Also maps gradients, which are trees like the parameters.
    """
    tensors = {}
    for name, (path, layer, transpose, _) in _wanted(config).items():
        node: Any = params
        for part in path.split("/"):
            node = node[part]
        array = np.asarray(node)  # before it is cut: on CPU the layers are views of one array, not copies
        array = array if layer is None else array[layer]
        tensors[name] = array.T if transpose else array
    return tensors
