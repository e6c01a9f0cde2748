"""Checkpoints of encoders as Hugging Face has them (BERT, RoBERTa, ALBERT, ELECTRA, DistilBERT), and our Encoder."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.encoder import Encoder, EncoderConfig
from jaxrl.nets.weights import maps
from jaxrl.nets.weights.maps import Place, linear, norm

CLASSES = {  # family -> its class name; the first is the plain network's
    "bert": "Bert",
    "roberta": "Roberta",
    "albert": "Albert",
    "electra": "Electra",
    "distilbert": "DistilBert",
}
POOLS: dict[str, Any] = {"bert": "tanh", "roberta": "tanh", "albert": "tanh", "electra": "gelu", "distilbert": "relu"}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
IGNORED = (  # repetitions of the embeddings and the bias, and tables that follow from the config
    *("position_ids", "decoder.weight", "decoder.bias", "generator_lm_head.weight", "vocab_projector.weight"),
)
BERT_LAYER = ("encoder.layer.{}", {
    "attention.self.query": "attention/q",
    "attention.self.key": "attention/k",
    "attention.self.value": "attention/v",
    "attention.output.dense": "attention/o",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "ffn/up",
    "output.dense": "ffn/down",
    "output.LayerNorm": "ffn_norm",
})  # fmt: skip
LAYERS = {  # family -> where its layers stand, and their names there
    "bert": BERT_LAYER,
    "roberta": BERT_LAYER,
    "electra": BERT_LAYER,
    "albert": ("encoder.albert_layer_groups.0.albert_layers.{}", {
        "attention.query": "attention/q",
        "attention.key": "attention/k",
        "attention.value": "attention/v",
        "attention.dense": "attention/o",
        "attention.LayerNorm": "attention_norm",
        "ffn": "ffn/up",
        "ffn_output": "ffn/down",
        "full_layer_layer_norm": "ffn_norm",
    }),
    "distilbert": ("transformer.layer.{}", {
        "attention.q_lin": "attention/q",
        "attention.k_lin": "attention/k",
        "attention.v_lin": "attention/v",
        "attention.out_lin": "attention/o",
        "sa_layer_norm": "attention_norm",
        "ffn.lin1": "ffn/up",
        "ffn.lin2": "ffn/down",
        "output_layer_norm": "ffn_norm",
    }),
}  # fmt: skip
EMBED_UP = {"albert": "encoder.embedding_hidden_mapping_in", "electra": "embeddings_project"}
MASKED = {  # family -> its names of masked, masked_norm, masked_bias
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    "albert": ("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
    "electra": ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"),
    "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
}
PAIR = {"bert": "cls.seq_relationship", "albert": "sop_classifier.classifier"}
CLASSIFIER = {  # family -> its names of pooled and classes, where they stand outside the network; None: inside
    "bert": (None, "classifier"),
    "albert": (None, "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "electra": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
}
POOLER = {"bert": "pooler.dense", "roberta": "pooler.dense", "albert": "pooler"}


def architecture(config: EncoderConfig) -> str:
    """The name of the published class with these heads, as "BertForPreTraining".

    Raises:
      ValueError: heads that none has.
    """
    c, kind = config, config.family
    heads = (c.masked, c.pooled is not None, c.pair, c.replaced, c.classes is not None)
    suffix = {
        (False, kind in POOLER, False, False, False): "Model",
        (True, False, False, False, False): "ForMaskedLM",
        (False, True, False, False, True): "ForSequenceClassification",
        (False, False, False, True, False): "ForPreTraining" if kind == "electra" else None,
        (True, True, True, False, False): "ForPreTraining" if kind in PAIR else None,
        (False, True, True, False, False): "ForNextSentencePrediction" if kind == "bert" else None,
    }.get(heads)
    if suffix is None or c.pooled not in (None, POOLS[kind]):
        raise ValueError(
            f"no published {CLASSES[kind]} has masked={c.masked}, pooled={c.pooled!r}, pair={c.pair}, "
            f"replaced={c.replaced}, classes={c.classes} together: keep the parameters as they are, or change the heads"
        )
    return CLASSES[kind] + suffix


def from_hugging_face(config: Mapping[str, Any], **changes) -> EncoderConfig:
    """The encoder that a Hugging Face `config.json` describes, with the heads that its "architectures" name.

    Args:
      config: the parsed file; without "architectures" the plain network is meant.
      changes: fields of TransformerConfig to set, such as dtype or remat.

    Raises:
      ValueError: a model type, architecture or activation that is not supported.
    """
    kind: Any = {"xlm-roberta": "roberta"}.get(config.get("model_type", ""), config.get("model_type"))
    if kind not in CLASSES:
        raise ValueError(f"model_type is {kind!r}, expected one of {', '.join(CLASSES)}, xlm-roberta")
    distilled = kind == "distilbert"
    of = lambda ours, theirs: config[theirs if distilled else ours]
    wanted = {
        "position_embedding_type": "absolute", "num_hidden_groups": 1, "inner_group_num": 1, "is_decoder": False,
        "tie_word_embeddings": True, "quantization_config": None,
    }  # fmt: skip
    wrong = [f"{k} is {config[k]!r}, expected {v!r}" for k, v in wanted.items() if config.get(k, v) != v]
    act = of("hidden_act", "activation")
    if act not in ACTIVATIONS or (kind in ("roberta", "electra") and act != "gelu"):
        known = ["gelu"] if kind in ("roberta", "electra") else list(ACTIVATIONS)
        wrong.append(f"the activation is {act!r}, expected one of {known}")
    name = (config.get("architectures") or [f"{CLASSES[kind]}Model"])[0].replace("XLMRoberta", "Roberta")
    heads = _heads(kind, name.removeprefix(CLASSES[kind]), len(config.get("id2label") or range(2)))
    if heads is None:
        wrong.append(f"architectures is {config['architectures']}, expected one with heads that exist here")
    if wrong:
        raise ValueError("; ".join(wrong))
    width, embed = of("hidden_size", "dim"), config.get("embedding_size")
    fields: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "width": width,
        "layers": of("num_hidden_layers", "n_layers"),
        "heads": of("num_attention_heads", "n_heads"),
        "kv_heads": of("num_attention_heads", "n_heads"),
        "ffn": of("intermediate_size", "hidden_dim"),
        "max_length": config["max_position_embeddings"],
        "causal": False,
        "positions": "learned",
        "norm": "layer",
        "norm_place": "post",
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "gated": False,
        "activation": ACTIVATIONS[act],
        "bias": True,
        "tie_embeddings": True,
        "embed_norm": True,
        "embed_width": embed if kind == "albert" or embed != width else None,
        "token_types": 0 if distilled else config["type_vocab_size"],
        "share_layers": kind == "albert",
    }
    offset = config.get("pad_token_id", 1) + 1 if kind == "roberta" else 0
    body = TransformerConfig(**(fields | changes))
    return EncoderConfig(body, **(heads or {}), position_offset=offset, family=kind)


def _heads(kind: str, suffix: str, labels: int) -> dict[str, Any] | None:
    """Fields of EncoderConfig for the published class of that ending; None if it is none of ours."""
    pool = {"pooled": POOLS[kind]}
    if suffix == "Model":
        return {"masked": False, **(pool if kind in POOLER else {})}
    if suffix == "ForMaskedLM":
        return {}
    if suffix == "ForSequenceClassification":
        return {"masked": False, **pool, "classes": labels}
    if suffix == "ForPreTraining" and kind == "electra":
        return {"masked": False, "replaced": True}
    if suffix == "ForPreTraining" and kind in PAIR:
        return {**pool, "pair": True}
    return {"masked": False, **pool, "pair": True} if (kind, suffix) == ("bert", "ForNextSentencePrediction") else None


def to_hugging_face(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` of an encoder: plain JSON without the ids of special tokens, but for RoBERTa's padding.

    Raises:
      ValueError: heads that no published class has.
    """
    c, kind = config.transformer, config.family
    act = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[c.activation]
    shared = {"architectures": [architecture(config)], "model_type": kind, "vocab_size": c.vocab_size}
    shared |= {"max_position_embeddings": c.max_length, "tie_word_embeddings": True}
    if config.classes:
        shared["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.classes)}
    if kind == "distilbert":
        sizes = {"dim": c.width, "n_layers": c.layers, "n_heads": c.heads, "hidden_dim": c.ffn}
        return shared | sizes | {"activation": act, "sinusoidal_pos_embds": False}
    embed = {"embedding_size": c.embed_width or c.width} if kind in EMBED_UP else {}
    padding = {"pad_token_id": config.position_offset - 1} if kind == "roberta" else {}
    return shared | embed | padding | {
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.ffn,
        "hidden_act": act,
        "type_vocab_size": c.token_types,
        "layer_norm_eps": c.norm_eps,
    }  # fmt: skip


def names(config: EncoderConfig) -> dict[str, Place]:
    """The map of an encoder: checkpoint name -> `Place`; what the config does not have is not in it."""
    c, kind = config.transformer, config.family
    body = "" if architecture(config).endswith("Model") else f"{kind}."
    embed = f"{body}embeddings"
    found = {
        f"{embed}.word_embeddings.weight": Place("transformer/embed/embedding"),
        f"{embed}.position_embeddings.weight": Place("transformer/position_embed/embedding"),
        **norm(f"{embed}.LayerNorm", "transformer/embed_norm"),
    }
    if c.token_types:
        found[f"{embed}.token_type_embeddings.weight"] = Place("transformer/type_embed/embedding")
    if c.embed_width:
        found |= linear(body + EMBED_UP[kind], "transformer/embed_up")
    stack, layer = LAYERS[kind]
    for i in range(1 if c.share_layers else c.layers):
        index = () if c.share_layers else (i,)
        for theirs, ours in layer.items():
            part = norm if ours.endswith("norm") else linear
            found |= part(f"{body}{stack.format(i)}.{theirs}", f"transformer/layers/{ours}", index)
    if config.masked:
        dense, scale, bias = MASKED[kind]
        found |= linear(dense, "masked") | norm(scale, "masked_norm") | {bias: Place("masked_bias")}
    outside, classifier = CLASSIFIER[kind]
    if config.pooled:
        inside = not (config.classes and outside)
        found |= linear(body + POOLER[kind] if inside else str(outside), "pooled")
    if config.pair:
        found |= linear(PAIR[kind], "pair")
    if config.classes:
        found |= linear(classifier, "classes")
    if config.replaced:
        found |= linear("discriminator_predictions.dense", "replaced_hidden")
        found |= linear("discriminator_predictions.dense_prediction", "replaced")
    return found


def shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter paths and shapes, as init makes them."""
    return maps.shapes(Encoder(config), np.zeros((1, 1), np.int32))


def from_checkpoint(config: EncoderConfig, tensors: Mapping[str, Any]) -> dict:
    """Our parameters from a checkpoint's tensors.

    Args:
      config: the network and its heads; decides which tensors must be there.
      tensors: checkpoint name -> array, or `Stored` in a file. Norms may have their old names, gamma and beta; the
        plain network's tensors may carry the prefix that they have beside heads; repeated embeddings are ignored.

    Returns:
      The nested dict of `jaxrl.nets.encoder.Encoder`, numpy arrays in the transformer's `param_dtype`.

    Raises:
      ValueError: every missing, unused and wrongly shaped tensor, in one message.
    """
    known = names(config)
    prefix = "" if any(name.startswith(f"{config.family}.") for name in known) else f"{config.family}."
    renamed = lambda name: (
        name.removeprefix(prefix).replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
    )
    tensors = {renamed(name): tensor for name, tensor in tensors.items()}
    dtype = config.transformer.param_dtype
    return maps.from_checkpoint(known, shapes(config), tensors, ignored=IGNORED, param_dtype=dtype)


def to_checkpoint(config: EncoderConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_checkpoint`: checkpoint name -> numpy array. Also maps gradients."""
    known = names(config)
    maps.check_total(known, shapes(config))
    return maps.to_checkpoint(known, params)
