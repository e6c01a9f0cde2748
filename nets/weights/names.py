"""Checkpoint names of decoders (Llama, Mistral, Qwen2, Qwen3, Mixtral, DeepSeek and their kin) and our paths."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.transformer import Group, Transformer, groups, runs
from jaxrl.nets.weights import maps
from jaxrl.nets.weights.configs import model_type
from jaxrl.nets.weights.maps import Place

T = (1, 0)
MODEL = {
    "model.embed_tokens.weight": Place("embed/embedding"),
    "model.norm.weight": Place("norm/scale"),
    "lm_head.weight": Place("unembed/kernel", axes=T),  # absent from tied checkpoints
}
LAYER = {  # "model.layers.{i}." + name; our arrays stack the layers on a leading axis
    "input_layernorm.weight": Place("attention_norm/scale"),
    "self_attn.q_proj.weight": Place("attention/q/kernel", axes=T),
    "self_attn.k_proj.weight": Place("attention/k/kernel", axes=T),
    "self_attn.v_proj.weight": Place("attention/v/kernel", axes=T),
    "self_attn.o_proj.weight": Place("attention/o/kernel", axes=T),
    "self_attn.q_proj.bias": Place("attention/q/bias"),  # the biases: Qwen2
    "self_attn.k_proj.bias": Place("attention/k/bias"),
    "self_attn.v_proj.bias": Place("attention/v/bias"),
    "self_attn.q_norm.weight": Place("attention/q_norm/scale"),  # the norms: Qwen3
    "self_attn.k_norm.weight": Place("attention/k_norm/scale"),
    "self_attn.q_norm.bias": Place("attention/q_norm/bias"),  # of each head: Chameleon
    "self_attn.k_norm.bias": Place("attention/k_norm/bias"),
    "self_attn.q_a_proj.weight": Place("attention/q_down/kernel", axes=T),  # latent attention: DeepSeek
    "self_attn.q_a_layernorm.weight": Place("attention/q_down_norm/scale"),
    "self_attn.q_b_proj.weight": Place("attention/q_up/kernel", axes=T),
    "self_attn.kv_a_proj_with_mqa.weight": Place("attention/kv_down/kernel", axes=T),
    "self_attn.kv_a_layernorm.weight": Place("attention/kv_down_norm/scale"),
    "self_attn.kv_b_proj.weight": Place("attention/kv_up/kernel", axes=T),
    "post_attention_layernorm.weight": Place("ffn_norm/scale"),
    "mlp.gate_proj.weight": Place("ffn/gate/kernel", axes=T),
    "mlp.up_proj.weight": Place("ffn/up/kernel", axes=T),
    "mlp.down_proj.weight": Place("ffn/down/kernel", axes=T),
}
QWEN_EXPERTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
EXPERTS = {  # architecture -> (its name of the layer, its names of an expert's matrices, of the shared expert)
    "mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}, ""),
    "qwen2_moe": ("mlp", QWEN_EXPERTS, "shared_expert"),
    "qwen3_moe": ("mlp", QWEN_EXPERTS, ""),
    "deepseek_v2": ("mlp", QWEN_EXPERTS, "shared_experts"),
    "deepseek_v3": ("mlp", QWEN_EXPERTS, "shared_experts"),
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


def expert_names(kind: str, number: int) -> dict[str, Place]:
    """Names of a layer's experts, as in `LAYER`."""
    layer, matrices, shared = EXPERTS[kind]
    return {
        f"{layer}.gate.weight": Place("moe/router/kernel", axes=T),
        f"{layer}.gate.e_score_correction_bias": Place("moe/bias"),
        f"{layer}.shared_expert_gate.weight": Place("moe/shared_gate/kernel", axes=T),
        **{
            f"{layer}.{shared}.{QWEN_EXPERTS[ours]}.weight": Place(f"moe/shared/{ours}/kernel", axes=T)
            for ours in matrices
        },
        **{
            f"{layer}.experts.{e}.{theirs}.weight": Place(f"moe/{ours}", (e,), T)
            for e in range(number)
            for ours, theirs in matrices.items()
        },
    }


def stacks(config: TransformerConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Where each layer's parameters lie among ours: the path of its stack, and its place on the leading axes."""

    def named(parts: tuple[Group, ...]) -> Iterator[tuple[str, Group]]:
        for number, group in enumerate(parts):  # as `transformer.through` calls them
            name = group.kinds[0].name if len(group.kinds) == 1 else "periods"
            again = any(group.kinds == other.kinds for other in parts[:number])
            yield (f"run_{number}_{name}" if again else name), group

    found: list[tuple[str, tuple[int, ...]]] = []
    for name, group in named(groups(config)):
        if len(group.kinds) == 1:
            found += [(name, (n,)) for n in range(group.repeats)]
        else:
            own = [(f"{name}/{inner}", n) for inner, run in named(runs(group.kinds)) for n in range(run.repeats)]
            found += [(path, (period, n)) for period in range(group.repeats) for path, n in own]
    return found


def shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter paths and shapes, as init makes them."""
    return maps.shapes(Transformer(config), np.zeros((1, 1), np.int32))


def names(config: TransformerConfig) -> dict[str, Place]:
    """The map of a decoder: checkpoint name -> `Place`; what the config does not have is not in it."""
    ours, kind = shapes(config), model_type(config)
    layer = LAYER | (expert_names(kind, config.experts.experts) if config.experts else {})
    found = {name: place for name, place in MODEL.items() if place.path in ours}
    for i, (stack, index) in enumerate(stacks(config)):
        found |= {
            f"model.layers.{i}.{name}": place._replace(path=f"{stack}/{place.path}", index=(*index, *place.index))
            for name, place in layer.items()
            if f"{stack}/{place.path}" in ours
        }
    return found


def from_checkpoint(config: TransformerConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters from a checkpoint's tensors.

    Args:
      config: the network; decides which tensors must be there.
      tensors: checkpoint name -> array, or `Stored` in a file: one at a time is read and converted. With tied
        embeddings a repeated `lm_head.weight` is ignored, and so are tables of rotary frequencies and, of
        DeepSeek-V3, the modules behind the layers, which `weights.deepseek` reads.

    Returns:
      The nested dict of `jaxrl.nets.transformer.Transformer`, numpy arrays in `config.param_dtype`.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    ignored = (*IGNORED, "lm_head.weight") if config.tie_embeddings else IGNORED
    if model_type(config) == "deepseek_v3":
        behind = f"model.layers.{config.layers}."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(behind)}
    return maps.from_checkpoint(names(config), shapes(config), tensors, ignored=ignored, param_dtype=config.param_dtype)


def to_checkpoint(config: TransformerConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`: checkpoint name -> numpy array, layers unstacked.

    Also maps gradients, which are trees like the parameters.
    """
    known = names(config)
    maps.check_total(known, shapes(config))
    return maps.to_checkpoint(known, params)
