"""BD3-LM and MDLM as their authors' classes store them, and our Transformer: norms and gates with the noise folded in.

Block diffusion: Arriola et al. 2025, arXiv:2503.09573; masked diffusion: Sahoo et al. 2024, arXiv:2406.07524. Their
network is a DiT (Peebles and Xie 2022, arXiv:2212.09748): an embedding of the noise level shifts and scales every norm
and gates every branch. The published networks are not told the level, it is always 0, so shift s, scale m and gate g
are constants of a layer, and

    g o(LN(x) w (1 + m) + s)  is a layer whose norm has scale w (1 + m) and bias s, and whose last matrix is g times o.

Their mask token is the last row of the embedding, one more than the tokenizer has words. That is GPT-2's, and the
released folders come without it:

    model = load_pretrained(folder, tokenizer=gpt2)  # of jaxrl.pretrained
    rollout = diffusion.generate_in_blocks(
        model.language_model, model.params, prompts, key, sampling=Sampling(max_tokens=128),
        unmasking=diffusion.Unmasking(block=model.block, order="random"), mask_id=model.mask_id, ...
    )

`diffusion.noised` and `diffusion.loss` train it with the same `block`: that reads [noisy ; clean], twice the tokens, so
rows as long as the published context take `load_pretrained(folder, max_length=2048)`. Without blocks `model.block` is
None and `diffusion.generate` is the sampler.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.weights import maps
from jaxrl.nets.weights.maps import Names, Place, linear
from jaxrl.nets.weights.names import shapes as transformer_shapes

KINDS = ("bd3lm", "mdlm")
FREE = ("dtype", "param_dtype", "cache_dtype", "remat", "attention", "unroll", "decode_unroll")
"""Fields of a config of which the architecture says nothing."""
FREQUENCIES = 256  # of the embedding of the noise level: as many cosines as sines, in all
IGNORED = ("rotary_emb.inv_freq", "sampling_eps_min", "sampling_eps_max")  # tables and settings of training
LEVEL, MODULATION, WEIGHT = "level", "modulation", "adaLN_modulation.weight"


def from_hugging_face(config: Mapping[str, Any], **changes) -> TransformerConfig:
    """The network that a `config.json` of model type bd3lm or mdlm describes.

    Args:
      config: the parsed file. `cross_attn` and `block_size` are not of the network but of its masks, see `masking`.
      changes: fields of TransformerConfig to set, such as dtype or max_length.

    Raises:
      ValueError: choices that are not built here, all in one message: a network that is told the noise level, causal
        attention, quantised weights, another model type.
    """
    told = "the noise level moves its norms and gates at every pass, and our Transformer takes none"
    built = {
        "time_conditioning": (False, told),
        "causal": (False, "it reads from left to right"),
        "quantization_config": (None, "expected plain floats"),
    }
    wrong = [f"{key} is {config[key]!r}: {why}" for key, (want, why) in built.items() if config.get(key, want) != want]
    if config.get("model_type") not in KINDS:
        wrong.append(f"model_type is {config.get('model_type')!r}, expected one of {', '.join(KINDS)}")
    if wrong:
        raise ValueError("; ".join(wrong))
    fields: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_dim"],
        "layers": config["n_blocks"],
        "heads": config["n_heads"],
        "kv_heads": config["n_heads"],
        "ffn": 4 * config["hidden_dim"],
        "max_length": config["model_length"],
        "causal": False,
        "norm": "layer",
        "norm_eps": 1e-5,
        "gated": False,
        "activation": "gelu_tanh",
        "bias": "ffn",
        "unembed_bias": True,
    }
    return TransformerConfig(**(fields | changes))


def masking(config: Mapping[str, Any], words: int) -> tuple[int, int | None]:
    """(the mask token, tokens in a block or None) of a `config.json`, with a tokenizer of so many words.

    A block as long as the context is none: such a network sees a whole sequence, as MDLM does.

    Raises:
      ValueError: no `mask_token_id`, and a tokenizer whose words take the last row of the embedding, too.
    """
    last, mask = config["vocab_size"] - 1, config.get("mask_token_id")
    if mask is None and words > last:
        raise ValueError(
            f"vocab_size is {last + 1}, and the tokenizer has {words} words: one of them must be the mask token, and "
            "no field says which; add mask_token_id"
        )
    block = config.get("block_size", 1) if config["model_type"] == "bd3lm" and config.get("cross_attn", True) else None
    return last if mask is None else mask, None if block is None or block >= config["model_length"] else block


def to_hugging_face(config: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of a BD3-LM without blocks: plain JSON without the ids of special tokens.

    With cross_attn and block_size it is of a network with blocks. transformers opens such a folder with the authors'
    configuration_bd3lm.py and modeling_bd3lm.py in it, and trust_remote_code.

    Raises:
      ValueError: a network with choices that are not such a DiT's.
    """
    c = config
    found = {
        "architectures": ["BD3LM"],
        "auto_map": {
            "AutoConfig": "configuration_bd3lm.BD3LMConfig",
            "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM",
        },
        "model_type": "bd3lm",
        "vocab_size": c.vocab_size,
        "hidden_dim": c.width,
        "n_blocks": c.layers,
        "n_heads": c.heads,
        "model_length": c.max_length,
        "cond_dim": 1,  # of a level that is always 0, see `to_checkpoint`
        "adaln": True,
        "time_conditioning": False,
        "cross_attn": False,
        "causal": False,
        "attn_backend": "sdpa",
        "dropout": 0.0,
        "var_min": False,
    }
    again = from_hugging_face(found, **{name: getattr(c, name) for name in FREE})
    if again.head_size == c.head_size and replace(again, head_dim=c.head_dim) == c:
        return found
    raise ValueError(f"the network is no such DiT: expected the choices of presets.bd3lm_small, got {c}")


def names(config: TransformerConfig, condition: int | None) -> Names:
    """The map of a checkpoint whose noise level has an embedding of so many numbers; None: its norms are plain.

    Places are those of `folded`'s argument.
    """
    d, root = config.width, "backbone"
    found: dict[str, Place | tuple[Place, ...]] = {
        f"{root}.vocab_embed.embedding": Place("embed/embedding"),
        f"{root}.output_layer.norm_final.weight": Place("norm/scale"),
        f"{root}.output_layer.linear.weight": Place("unembed/kernel", axes=(1, 0)),
        f"{root}.output_layer.linear.bias": Place("unembed_bias"),
    }
    if condition is not None:
        found |= linear(f"{root}.sigma_map.mlp.0", f"{LEVEL}/up") | linear(f"{root}.sigma_map.mlp.2", f"{LEVEL}/down")
        found |= linear(f"{root}.output_layer.adaLN_modulation", MODULATION)
    for i in range(config.layers):
        at = f"{root}.blocks.{i}"
        found[f"{at}.attn_qkv.weight"] = tuple(
            Place(f"layers/attention/{name}/kernel", (i,), (1, 0), (n * d, (n + 1) * d)) for n, name in enumerate("qkv")
        )
        found |= linear(f"{at}.attn_out", "layers/attention/o", (i,), bias=False)
        found |= linear(f"{at}.mlp.0", "layers/ffn/up", (i,)) | linear(f"{at}.mlp.2", "layers/ffn/down", (i,))
        found[f"{at}.norm1.weight"] = Place("layers/attention_norm/scale", (i,))
        found[f"{at}.norm2.weight"] = Place("layers/ffn_norm/scale", (i,))
        if condition is not None:
            found |= linear(f"{at}.adaLN_modulation", f"layers/{MODULATION}", (i,))
    return found


def shapes(config: TransformerConfig, condition: int | None) -> dict[str, tuple[int, ...]]:
    """Paths and shapes of `folded`'s argument: the Transformer's without biases of norms, and what modulates them."""
    to_hugging_face(config)  # refuses what is no DiT
    found = {path: shape for path, shape in transformer_shapes(config).items() if not path.endswith("norm/bias")}
    if condition is None:
        return found
    sizes = {
        f"{LEVEL}/up": (FREQUENCIES, condition),
        f"{LEVEL}/down": (condition, condition),
        f"layers/{MODULATION}": (config.layers, condition, 6 * config.width),
        MODULATION: (condition, 2 * config.width),
    }
    for path, (*stack, rows, columns) in sizes.items():
        found |= {f"{path}/kernel": (*stack, rows, columns), f"{path}/bias": (*stack, columns)}
    return found


def folded(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The Transformer's parameters, of a checkpoint's at noise level 0; without modulation norms get biases of 0."""
    layers, conditioned = stored["layers"], MODULATION in stored
    times = lambda x, layer: jnp.matmul(x, layer["kernel"], precision="highest") + layer["bias"]

    def modulations(layer, parts):
        return jnp.split(times(signal, layer), parts, axis=-1)

    def norm(own, shift: Any = 0.0, scale: Any = 0.0):
        return {"scale": own["scale"] * (1 + scale), "bias": jnp.zeros_like(own["scale"]) + shift}

    if conditioned:
        level = jnp.repeat(jnp.array([1.0, 0.0]), FREQUENCIES // 2)  # cosines and sines of 0
        signal = jax.nn.silu(times(jax.nn.silu(times(level, stored[LEVEL]["up"])), stored[LEVEL]["down"]))
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulations(layers[MODULATION], 6)
        last = norm(stored["norm"], *modulations(stored[MODULATION], 2))
    else:
        shift, scale, ffn_shift, ffn_scale = 0.0, 0.0, 0.0, 0.0
        gate = ffn_gate = jnp.ones_like(layers["attention_norm"]["scale"])
        last = norm(stored["norm"])
    attention, ffn, down = layers["attention"], layers["ffn"], layers["ffn"]["down"]
    gated = {
        "attention_norm": norm(layers["attention_norm"], shift, scale),
        "attention": {**attention, "o": {"kernel": attention["o"]["kernel"] * gate[:, None]}},
        "ffn_norm": norm(layers["ffn_norm"], ffn_shift, ffn_scale),
        "ffn": {**ffn, "down": {"kernel": down["kernel"] * ffn_gate[:, None], "bias": down["bias"] * ffn_gate}},
    }
    same = {name: stored[name] for name in ("embed", "unembed", "unembed_bias")}
    return {**same, "layers": gated, "norm": last}


def from_checkpoint(config: TransformerConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters from a checkpoint's tensors, modulated or plain; see `names.from_checkpoint`.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    widths = [np.shape(tensor)[-1] for name, tensor in tensors.items() if name.endswith(WEIGHT)]
    condition = widths[0] if widths else None
    stored = maps.from_checkpoint(names(config, condition), shapes(config, condition), tensors, ignored=IGNORED)
    return jax.tree.map(lambda x: np.asarray(x, np.dtype(config.param_dtype)), folded(stored))


def to_checkpoint(config: TransformerConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A checkpoint that `from_checkpoint` and the authors' class read as these parameters: name -> numpy array.

    The biases of norms are the shifts, gates are 1 and scales 0, all in the biases of the modulation; the level has one
    number, which is multiplied by 0.
    """
    found = shapes(config, 1)
    plain = {path: np.zeros(shape, np.dtype(config.param_dtype)) for path, shape in found.items()}
    layers, zeros = params["layers"], np.zeros((config.layers, config.width))
    shift, ffn_shift = (np.asarray(layers[name]["bias"], np.float32) for name in ("attention_norm", "ffn_norm"))
    six = (shift, zeros, zeros + 1, ffn_shift, zeros, zeros + 1)
    plain[f"layers/{MODULATION}/bias"][:] = np.concatenate(six, axis=-1)
    plain[f"{MODULATION}/bias"][: config.width] = params["norm"]["bias"]
    own = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(params)}
    stored = maps.nested({path: own.get(path, zero) for path, zero in plain.items()})
    return maps.to_checkpoint(names(config, 1), stored)
