"""LoRA in PEFT's format, in and out: adapter_config.json and adapter_model.safetensors, for the Llama family."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl.nets.adapters.adapted import get, put
from jaxrl.nets.adapters.low_rank import LoRAConfig
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.nets.weights.files import read_safetensors, write_safetensors
from jaxrl.nets.weights.names import LAYER

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYERS = "base_model.model.model.layers"
MODULES = {  # our layer -> its module in a published layer, such as self_attn.q_proj
    place.path.removesuffix("/kernel"): name.removesuffix(".weight")
    for name, place in LAYER.items()
    if place.path.endswith("/kernel")
}
PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
UNSUPPORTED = {  # options that change the arithmetic or the tensors, and the values under which they do not
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}


def to_peft(config: LoRAConfig, params: Any, *, base_model: str = "") -> tuple[dict, dict[str, np.ndarray]]:
    """What PEFT stores of an adapter: `(adapter_config, tensors)`; A is [r, in] and B [out, r] there, a layer each.

    Args:
      config, params: of `lora`.
      base_model: the published base's name or folder, which PEFT loads by itself where it is given.
    """
    paths = _paths(params)
    tensors = {}
    for path in paths:
        for part, theirs in PARTS.items():
            if part in get(params, f"layers/{path}"):
                array = np.asarray(get(params, f"layers/{path}/{part}"))
                for i, one in enumerate(array):
                    tensors[f"{LAYERS}.{i}.{MODULES[path]}.{theirs}"] = one.T
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(MODULES[path].rpartition(".")[2] for path in paths),
        "use_rslora": config.scaling == "rank_stabilised",
        "use_dora": config.magnitude,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return described, tensors


def from_peft(
    transformer: TransformerConfig, described: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[LoRAConfig, dict]:
    """`(config, params)` of `lora` from what PEFT stores.

    Args:
      transformer: the base, whose shapes the tensors must fit.
      described: the parsed adapter_config.json.
      tensors: name -> array, or `Stored` in a file.

    Raises:
      ValueError: another kind of adapter, an option that is not supported, or every missing, unused and wrongly shaped
        tensor in one message.
    """
    if described.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {described.get('peft_type')!r}, expected 'LORA'")
    for name, plain in UNSUPPORTED.items():
        if name in described and described[name] not in plain:
            raise ValueError(
                f"{name} is {described[name]!r} in {CONFIG}, which is not supported; expected {plain[0]!r}"
            )
    modules = described["target_modules"]
    known = {name.rpartition(".")[2]: path for path, name in MODULES.items()}
    known |= {name: path for path, name in MODULES.items()}
    modules = list(known) if modules == "all-linear" else modules
    strange = [name for name in modules if name not in known] if not isinstance(modules, str) else [modules]
    if strange:
        raise ValueError(f"target_modules has {', '.join(strange)}; expected some of {', '.join(known)}")
    paths = [path for path in MODULES if path in {known[name] for name in modules}]
    config = LoRAConfig(
        rank=described["r"],
        alpha=described["lora_alpha"],
        targets=tuple(path.rpartition("/")[2] for path in paths),
        scaling="rank_stabilised" if described.get("use_rslora") else "standard",
        magnitude=bool(described.get("use_dora")),
    )
    wanted = {
        f"{LAYERS}.{i}.{MODULES[path]}.{PARTS[part]}": (path, part, i, shape)
        for path in paths
        for part, shape in _shapes(transformer, path, config).items()
        for i in range(transformer.layers)
    }
    problems = [f"missing {name}, expected {want[3][::-1]}" for name, want in wanted.items() if name not in tensors]
    problems += [f"unused {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} has shape {tuple(np.shape(tensors[name]))}, expected {want[3][::-1]}"
        for name, want in wanted.items()
        if name in tensors and tuple(np.shape(tensors[name])) != want[3][::-1]
    ]
    if problems:
        raise ValueError("the adapter does not fit the base:\n  " + "\n  ".join(problems))
    stacks: dict[str, list] = {}
    for name, (path, part, _, _) in wanted.items():
        stacks.setdefault(f"layers/{path}/{part}", []).append(np.asarray(tensors[name]).astype(np.float32).T)
    return config, put({}, {path: jnp.asarray(np.stack(stack)) for path, stack in stacks.items()})


def save_peft(
    folder: str | Path, config: LoRAConfig, params: Any, *, base_model: str = "", dtype: str = "float32"
) -> Path:
    """Writes a folder that `PeftModel.from_pretrained` and `load_peft` open; takes the package safetensors.

    Raises:
      ValueError: a folder that holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already; expected a new or empty folder")
    described, tensors = to_peft(config, params, base_model=base_model)
    (file,) = write_safetensors(folder, tensors, dtype=dtype, shard_bytes=2**62)
    file.rename(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return folder


def load_peft(folder: str | Path, transformer: TransformerConfig) -> tuple[LoRAConfig, dict]:
    """`(config, params)` of `lora` from a folder of PEFT's.

    Raises:
      ValueError: files that are missing or not what they should be; see `from_peft`.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"no {CONFIG} in {folder}; expected a folder that PEFT saved an adapter to")
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from None
    return from_peft(transformer, described, read_safetensors(folder / WEIGHTS))


def _paths(params: Any) -> list[str]:
    """Our layers, attention/q and so on, that have a pair."""
    layers = params.get("layers", {})
    return [path for path in MODULES if "a" in layers.get(path.split("/")[0], {}).get(path.split("/")[1], {})]


def _shapes(c: TransformerConfig, path: str, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Our shapes of one layer's parts."""
    heads, kv = c.heads * c.head_size, c.kv_heads * c.head_size
    rows, columns = {
        "q": (c.width, heads),
        "k": (c.width, kv),
        "v": (c.width, kv),
        "o": (heads, c.width),
        "gate": (c.width, c.ffn),
        "up": (c.width, c.ffn),
        "down": (c.ffn, c.width),
    }[path.rpartition("/")[2]]
    parts: dict[str, tuple[int, ...]] = {"a": (rows, config.rank), "b": (config.rank, columns)}
    return parts | ({"m": (columns,)} if config.magnitude else {})
