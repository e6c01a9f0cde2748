"""Compile time against depth: python benchmarks/nets/depth.py [NETWORK ...] writes depth.json

A loss and its gradients of every network that has layers to add are compiled without any cache, at width 16 or so and
from 4 layers on: a loop of a single round, as some have below that, is removed by XLA. "CPU s" is processor time of
`.compile()` over all threads, the median of three rounds in which all programs take turns; "instructions" are those of
the compiled program (`jaxrl.plan.hlo`), which no other process disturbs. Language models have the loss of next-token
prediction, the others the mean square of what they give. Layers alternate with a period of two where a network has two
kinds (MiniMax, SAM, Swin); a Swin's stages are a loop each, here two, the second of which grows.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl import networks
from jaxrl.nets import presets
from jaxrl.nets.densities.pixelcnn import PixelCNN, PixelCNNConfig
from jaxrl.nets.encoder import masked_language_model
from jaxrl.nets.encoder_presets import bert
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.mlp import MLP
from jaxrl.nets.recurrent import RecurrentConfig, recurrent_language_model
from jaxrl.nets.vision import packed, sam, swin, vit, vq
from jaxrl.nets.vision.sam_encoder import ImageEncoder
from jaxrl.plan import hlo
from jaxrl.posttrain.score import log_probs_of
from jaxrl.types import TokenBatch

DEPTHS, ROUNDS = (4, 16, 64), 3
SYMBOLS, WIDTH, LENGTH = 12, 16, 8
Program = tuple[Callable, Any]  # loss of parameters, and their shapes


def of_tokens(model: LanguageModel) -> Program:
    """Next-token prediction on two rows."""
    rows = TokenBatch(jnp.zeros((2, LENGTH), jnp.int32), jnp.ones((2, LENGTH)))
    return lambda params: -log_probs_of(model, params, rows)[0].mean(), jax.eval_shape(model.init, jax.random.key(0))


def of_module(module: Any, x: Any) -> Program:
    """Mean square of what a module makes of x."""

    def loss(params):
        leaves = jax.tree.leaves(module.apply(params, x))
        return sum(jnp.square(leaf).mean() for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))

    return loss, jax.eval_shape(module.init, jax.random.key(0), x)


def published(name: str) -> Callable[[int], Program]:
    """The choices of a published decoder at other sizes."""
    sizes = {"width": WIDTH, "heads": 2, "ffn": 16, "max_length": 32}
    config = networks.find(name).config
    return lambda layers: of_tokens(language_model(presets.shrunk(config, SYMBOLS, layers=layers, **sizes)))


def own(preset: Callable, **changes) -> Callable[[int], Program]:
    """A preset that takes its sizes."""
    sizes = {"heads": 2, "kv_heads": 2, "max_length": 32} | changes
    return lambda layers: of_tokens(language_model(preset(SYMBOLS, WIDTH, layers, **sizes)))


def tower(name: str, **changes) -> Callable[[int], Program]:
    """A vision tower's choices at other sizes, over one image."""

    def at(layers: int) -> Program:
        sizes = {"width": WIDTH, "heads": 2, "ffn": 16, "out": WIDTH, "patch": 4, "frames": 1, "layers": layers}
        config = replace(packed.SIZES[name], **(sizes | {key: of(layers) for key, of in changes.items()}))
        return of_module(packed.PackedViT(config), packed.pack(config, [jnp.zeros((16, 16, 3))]))

    return at


def stages(name: str, **changes) -> Program:
    """A small Swin of such stages."""
    return of_module(swin.Swin(replace(swin.SIZES[name], **changes)), PICTURE)


PICTURE = jnp.zeros((2, 16, 16, 3))
SAM = replace(sam.SIZES["tiny"], width=WIDTH)
TOKENISER = vq.VQConfig(codes=16, width=8, latent=8, size=16, channels=32, multipliers=(1,))
NETWORKS: dict[str, Callable[[int], Program]] = {
    "GPT-2": published("gpt2"),
    "Qwen2.5": published("qwen25_0_5b"),
    "Qwen3": published("qwen3_0_6b"),
    "Mixtral": published("mixtral_8x7b"),
    "Qwen1.5-MoE": published("qwen15_moe_a2_7b"),
    "DeepSeek-V2": published("deepseek_v2"),
    "DeepSeek-V3": published("deepseek_v3"),
    "Moonlight": published("moonlight_16b_a3b"),
    "Chameleon 7B": published("chameleon_7b"),
    "Chameleon 34B": published("chameleon_34b"),
    "MiniMax-Text-01": published("minimax_text_01"),
    "linear attention": own(presets.linear_transformer),
    "Performer": own(presets.performer),
    "TransNormer": own(presets.transnormer),
    "RetNet": own(presets.retnet_like),
    "LLaDA": own(presets.llama_like, causal=False),
    "BERT": lambda n: of_tokens(masked_language_model(bert(WIDTH, n, 2, vocab_size=SYMBOLS))),
    "LSTM": lambda n: of_tokens(recurrent_language_model(RecurrentConfig(SYMBOLS, WIDTH, n))),
    "ViT": lambda n: of_module(vit.ViT(replace(vit.SIZES["tiny"], layers=n)), PICTURE),
    "Swin": lambda n: stages("tiny", depths=(2, n)),
    "Swin v2": lambda n: stages("tiny_v2", depths=(2, n)),
    "SAM's encoder": lambda n: of_module(ImageEncoder(replace(SAM, layers=n)), PICTURE),
    "MoonViT": tower("moonvit_so_400m"),
    "Qwen2.5-VL's tower": tower("qwen25_vl_3b", window=lambda _: 16, full_layers=lambda n: tuple(range(1, n, 2))),
    "PixelCNN": lambda n: of_module(PixelCNN(PixelCNNConfig(4, 4, channels=8, layers=n)), jnp.zeros((2, 4, 4))),
    "MLP": lambda n: of_module(MLP((WIDTH,) * n), jnp.zeros((2, WIDTH))),
    "VQ tokeniser": lambda n: of_module(vq.VQ(replace(TOKENISER, blocks=n)), PICTURE),
}


def compiled(loss: Callable, params: Any) -> tuple[dict[str, float], str]:
    """Seconds to trace and to compile anew, and the program's text."""
    jax.clear_caches()
    begun = time.process_time()
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
    traced = time.process_time()
    program = lowered.compile()
    ended = time.process_time()
    return {"trace": traced - begun, "compile": ended - traced}, program.as_text() or ""


def main():
    names = sys.argv[1:] or list(NETWORKS)
    begun = time.time()
    jax.config.update("jax_enable_compilation_cache", False)
    programs = {(name, n): NETWORKS[name](n) for name in names for n in DEPTHS}
    compiled(*programs[names[0], DEPTHS[0]])  # does not count
    laps, sizes = {case: [] for case in programs}, {}
    for number in range(ROUNDS):
        for case, program in programs.items():
            seconds, text = compiled(*program)
            laps[case].append(seconds)
            if number == 0:
                sizes[case] = {"instructions": sum(map(len, hlo.parse(text)[0].values())), "bytes": len(text)}
        print(f"round {number + 1}: {time.time() - begun:.0f} s, {time.process_time():.0f} s of CPU", flush=True)
    file = Path(__file__).with_suffix(".json")
    rows = json.loads(file.read_text()) if file.exists() else {}  # networks that were not run stay
    for (name, n), found in laps.items():
        median = {key: round(statistics.median(lap[key] for lap in found), 3) for key in found[0]}
        rows.setdefault(name, {})[str(n)] = median | sizes[name, n]
    file.write_text(json.dumps(rows, indent=1) + "\n")
    heading = ("CPU s at " + " / ".join(map(str, DEPTHS)) + " layers", "instructions")
    print(f"| network | {' | '.join(heading)} |\n|---|---|---|")
    for name in names:
        row = [rows[name][str(n)] for n in DEPTHS]
        seconds = " / ".join(f"{at['compile']:.1f}" for at in row)
        counts = list(dict.fromkeys(str(at["instructions"]) for at in row))  # one where all are equal
        print(f"| {name} | {seconds} | {' / '.join(counts)} |")


if __name__ == "__main__":
    main()
