"""Named configurations: frozen published sizes, as the models' own config files state them.

Every function takes `changes`, fields of TransformerConfig to set otherwise: `qwen3_0_6b(dtype="bfloat16")`.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

from jaxrl.kernels.attention import Chunked, Fixed, Pattern
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.latent_attention import LatentConfig
from jaxrl.nets.linear_attention import LinearConfig
from jaxrl.nets.moe import GATINGS
from jaxrl.nets.rope import Llama3Scaling, Yarn


def tiny(vocab_size: int = 64, **changes) -> TransformerConfig:
    """2 layers of width 64: for tests, demonstrations and first steps."""
    sizes = {"heads": 4, "kv_heads": 2, "ffn": 128, "max_length": 512}
    return replace(llama_like(vocab_size, 64, 2, **sizes), **changes)


def llama_like(vocab_size: int, width: int, layers: int, **changes) -> TransformerConfig:
    """A small model of your own size: heads of 64, ffn 8/3 of the width (in 64s), tied embeddings."""
    heads = max(width // 64, 1)
    sizes = {"heads": heads, "kv_heads": heads, "ffn": -(-8 * width // (3 * 64)) * 64, "tie_embeddings": True}
    return TransformerConfig(vocab_size=vocab_size, width=width, layers=layers, **(sizes | changes))


def shrunk(
    config: TransformerConfig,
    vocab_size: int,
    *,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    ffn: int = 128,
    max_length: int = 512,
    **changes,
) -> TransformerConfig:
    """The choices of a published network at a size of your own: for tests, notebooks and first steps.

    At most 8 experts of a quarter of `ffn`, two of which a token meets, of one in two groups where groups are limited,
    and half of the width as latent; key heads, window and sections keep their share; a pattern's lengths are at most
    an eighth of `max_length`; layers of several kinds keep their order (`cut`).
    """
    c, head = config, width // heads
    sizes = {"vocab_size": vocab_size, "width": width, "layers": layers, "heads": heads, "ffn": ffn, "head_dim": None}
    new: dict[str, Any] = {**sizes, "max_length": max_length, "kv_heads": max(heads * c.kv_heads // c.heads, 1)}
    if c.experts:
        limited = c.experts.top_groups < c.experts.groups
        own, most = max(ffn // 4, 1), {"experts": 8, "top_k": 2, "first_dense": 1, "groups": 2}
        most["top_groups"] = 1 if limited else 2
        fewer: dict[str, Any] = {name: min(getattr(c.experts, name), limit) for name, limit in most.items()}
        new["experts"] = replace(c.experts, **fewer, ffn=own, shared=own * (c.experts.shared > 0), aux_choices=None)
    if c.latent:
        q_rank = None if c.latent.q_rank is None else width // 2
        new["latent"] = LatentConfig(width // 2, head, max(head // 4 * 2, 2), head, q_rank)
    if c.rotary_dim:
        new["rotary_dim"] = max(head * c.rotary_dim // c.head_size // 2 * 2, 2)
    if c.rope_sections:
        rest = (head // 2 - head // 8) // 2
        new["rope_sections"] = (head // 2 - 2 * rest, rest, rest)
    if c.window:
        new["window"] = max(max_length // 8, 1)
    if c.pattern:
        new["pattern"] = _shorter(c.pattern, max(max_length // 8, 2))
    if c.linear:
        new["linear"] = replace(c.linear, random=min(c.linear.random, 2 * head), kv_heads=None)
    chosen = {name: getattr(c, name) for name in ("window_layers", "linear_layers") if getattr(c, name)}
    kinds = cut([tuple(i in some for some in chosen.values()) for i in range(c.layers)], layers)
    for number, name in enumerate(chosen):
        new[name] = tuple(i for i in range(layers) if kinds[i][number]) or (layers - 1,)
    if c.embed_width:
        new["embed_width"] = width // 2
    return replace(c, **(new | changes))


def cut(kinds: Sequence[Any], layers: int) -> list[Any]:
    """So many layers in the order of these kinds.

    Where they come round, each run of a period becomes one layer; else a layer has the kind at its share of the depth.
    """
    n = len(kinds)
    period = next(p for p in range(1, n + 1) if all(kinds[i] == kinds[i % p] for i in range(n)))
    runs = [kind for kind, _ in groupby(kinds[:period])]
    same_depth = [kinds[(2 * i + 1) * n // (2 * layers)] for i in range(layers)]
    if period == n and set(same_depth) == set(kinds):
        return same_depth
    return [runs[i % len(runs)] for i in range(layers)]


def _shorter(pattern: Pattern, longest: int) -> Pattern:
    """A pattern with its lengths in tokens in proportion, the largest of them at most `longest`."""
    named = ("n", "stride", "block", "summary", "near", "first")
    lengths = {f.name: getattr(pattern, f.name) for f in fields(pattern) if f.name in named}
    most = max(lengths.values())
    if most <= longest:
        return pattern
    return replace(pattern, **{name: max(n * longest // most, min(n, 1)) for name, n in lengths.items()})


def smollm2_135m(**changes) -> TransformerConfig:
    """SmolLM2 135M (Allal et al. 2025, arXiv:2502.02737): 134,515,008 parameters."""
    config = TransformerConfig(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, ffn=1536, max_length=8192,
        rope_base=1e5, norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    return replace(config, **changes)


def llama2_7b(**changes) -> TransformerConfig:
    """Llama 2 7B (Touvron et al. 2023, arXiv:2307.09288): 6,738,415,616 parameters."""
    config = TransformerConfig(
        vocab_size=32000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        ffn=11008,
        max_length=4096,
        norm_eps=1e-5,
    )
    return replace(config, **changes)


def llama2_13b(**changes) -> TransformerConfig:
    """Llama 2 13B: 13,015,864,320 parameters."""
    sizes = {"width": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "ffn": 13824}
    return replace(llama2_7b(), **(sizes | changes))


def llama2_70b(**changes) -> TransformerConfig:
    """Llama 2 70B: 68,976,648,192 parameters."""
    sizes = {"width": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "ffn": 28672}
    return replace(llama2_7b(), **(sizes | changes))


def mistral_7b(**changes) -> TransformerConfig:
    """Mistral 7B, version 0.1 (Jiang et al. 2023, arXiv:2310.06825): 7,241,732,096 parameters, windows of 4096."""
    sizes = {"kv_heads": 8, "ffn": 14336, "max_length": 32768, "window": 4096}
    return replace(llama2_7b(), **(sizes | changes))


def llama31_8b(**changes) -> TransformerConfig:
    """Llama 3.1 8B (Grattafiori et al. 2024, arXiv:2407.21783): 8,030,261,248 parameters."""
    config = TransformerConfig(
        vocab_size=128256, width=4096, layers=32, heads=32, kv_heads=8, ffn=14336, max_length=131072,
        rope_base=5e5, rope_scaling=Llama3Scaling(8.0, 8192), norm_eps=1e-5,
    )  # fmt: skip
    return replace(config, **changes)


def llama31_70b(**changes) -> TransformerConfig:
    """Llama 3.1 70B: 70,553,706,496 parameters."""
    return replace(llama31_8b(), **({"width": 8192, "layers": 80, "heads": 64, "ffn": 28672} | changes))


def llama32_1b(**changes) -> TransformerConfig:
    """Llama 3.2 1B: 1,235,814,400 parameters."""
    config = TransformerConfig(
        vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8, ffn=8192, max_length=131072,
        rope_base=5e5, rope_scaling=Llama3Scaling(32.0, 8192), norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    return replace(config, **changes)


def qwen25_0_5b(**changes) -> TransformerConfig:
    """Qwen2.5 0.5B (Qwen 2024, arXiv:2412.15115); Qwen2 has the same sizes: 494,032,768 parameters."""
    config = TransformerConfig(
        vocab_size=151936, width=896, layers=24, heads=14, kv_heads=2, ffn=4864, max_length=32768,
        rope_base=1e6, qkv_bias=True, tie_embeddings=True,
    )  # fmt: skip
    return replace(config, **changes)


def qwen25_1_5b(**changes) -> TransformerConfig:
    """Qwen2.5 1.5B; Qwen2 has the same sizes: 1,543,714,304 parameters."""
    config = TransformerConfig(
        vocab_size=151936, width=1536, layers=28, heads=12, kv_heads=2, ffn=8960, max_length=131072,
        rope_base=1e6, qkv_bias=True, tie_embeddings=True,
    )  # fmt: skip
    return replace(config, **changes)


def qwen25_7b(**changes) -> TransformerConfig:
    """Qwen2.5 7B; Qwen2 has the same sizes: 7,615,616,512 parameters."""
    config = TransformerConfig(
        vocab_size=152064, width=3584, layers=28, heads=28, kv_heads=4, ffn=18944, max_length=131072,
        rope_base=1e6, qkv_bias=True,
    )  # fmt: skip
    return replace(config, **changes)


def qwen25_3b(**changes) -> TransformerConfig:
    """Qwen2.5 3B: 3,085,938,688 parameters."""
    sizes = {"width": 2048, "layers": 36, "heads": 16, "ffn": 11008, "max_length": 32768}
    return replace(qwen25_1_5b(), **(sizes | changes))


def qwen25_14b(**changes) -> TransformerConfig:
    """Qwen2.5 14B: 14,770,033,664 parameters."""
    sizes = {"width": 5120, "layers": 48, "heads": 40, "kv_heads": 8, "ffn": 13824}
    return replace(qwen25_7b(), **(sizes | changes))


def qwen25_32b(**changes) -> TransformerConfig:
    """Qwen2.5 32B: 32,763,876,352 parameters."""
    return replace(qwen25_14b(), **({"layers": 64, "ffn": 27648} | changes))


def qwen25_72b(**changes) -> TransformerConfig:
    """Qwen2.5 72B: 72,706,203,648 parameters."""
    return replace(qwen25_14b(), **({"width": 8192, "layers": 80, "heads": 64, "ffn": 29568} | changes))


def qwen3_0_6b(**changes) -> TransformerConfig:
    """Qwen3 0.6B (Qwen 2025, arXiv:2505.09388): 596,049,920 parameters, the tied embedding counted once."""
    config = TransformerConfig(
        vocab_size=151936, width=1024, layers=28, heads=16, kv_heads=8, ffn=3072, head_dim=128,
        max_length=40960, rope_base=1e6, qk_norm=True, tie_embeddings=True,
    )  # fmt: skip
    return replace(config, **changes)


def qwen3_1_7b(**changes) -> TransformerConfig:
    """Qwen3 1.7B: 1,720,574,976 parameters, the tied embedding counted once."""
    return replace(qwen3_0_6b(), **({"width": 2048, "ffn": 6144} | changes))


def qwen3_4b(**changes) -> TransformerConfig:
    """Qwen3 4B: 4,022,468,096 parameters, the tied embedding counted once."""
    return replace(qwen3_0_6b(), **({"width": 2560, "layers": 36, "heads": 32, "ffn": 9728} | changes))


def qwen3_8b(**changes) -> TransformerConfig:
    """Qwen3 8B: 8,190,735,360 parameters."""
    sizes = {"width": 4096, "layers": 36, "heads": 32, "ffn": 12288, "tie_embeddings": False}
    return replace(qwen3_0_6b(), **(sizes | changes))


def qwen3_14b(**changes) -> TransformerConfig:
    """Qwen3 14B: 14,768,307,200 parameters."""
    return replace(qwen3_8b(), **({"width": 5120, "layers": 40, "heads": 40, "ffn": 17408} | changes))


def qwen3_32b(**changes) -> TransformerConfig:
    """Qwen3 32B: 32,762,123,264 parameters."""
    return replace(qwen3_8b(), **({"width": 5120, "layers": 64, "heads": 64, "ffn": 25600} | changes))


def deepseek_llm_7b(**changes) -> TransformerConfig:
    """DeepSeek LLM 7B (DeepSeek-AI 2024, arXiv:2401.02954): 6,910,365,696 parameters."""
    return replace(llama2_7b(vocab_size=102400, layers=30, norm_eps=1e-6), **changes)


def deepseek_llm_67b(**changes) -> TransformerConfig:
    """DeepSeek LLM 67B: 67,425,001,472 parameters."""
    sizes = {"width": 8192, "layers": 95, "heads": 64, "kv_heads": 8, "ffn": 22016}
    return replace(deepseek_llm_7b(), **(sizes | changes))


def llada_8b(**changes) -> TransformerConfig:
    """LLaDA 8B (Nie et al. 2025, arXiv:2502.09992): 8,015,581,184 parameters, all tokens see each other.

    Base and Instruct; `nets.weights.llada` says how it is sampled from. Its mask token is 126336, its EOS 126081.
    """
    config = TransformerConfig(
        vocab_size=126464, width=4096, layers=32, heads=32, kv_heads=32, ffn=12288, max_length=4096, causal=False,
        rope_base=5e5, norm_eps=1e-5,
    )  # fmt: skip
    return replace(config, **changes)


def bd3lm_small(**changes) -> TransformerConfig:
    """BD3-LM small, and MDLM (Arriola et al. 2025, arXiv:2503.09573): 162,265,682 parameters.

    All tokens see each other; blocks are a matter of masks. The mask token is 50257, the last row. The authors' class
    has 169,627,218: of those that tell it the noise level `nets.weights.dit` makes scales and biases.
    """
    config = TransformerConfig(
        vocab_size=50258, width=768, layers=12, heads=12, kv_heads=12, ffn=3072, max_length=1024, causal=False,
        norm="layer", norm_eps=1e-5, gated=False, activation="gelu_tanh", bias="ffn", unembed_bias=True,
    )  # fmt: skip
    return replace(config, **changes)


def mixtral_8x7b(**changes) -> TransformerConfig:
    """Mixtral 8x7B (Jiang et al. 2024, arXiv:2401.04088): 46,702,792,704 parameters."""
    config = TransformerConfig(
        vocab_size=32000, width=4096, layers=32, heads=32, kv_heads=8, ffn=14336, experts=GATINGS["mixtral"],
        max_length=32768, rope_base=1e6, norm_eps=1e-5,
    )  # fmt: skip
    return replace(config, **changes)


def mixtral_8x22b(**changes) -> TransformerConfig:
    """Mixtral 8x22B, version 0.1 (Mistral AI 2024): 140,620,634,112 parameters."""
    experts = replace(GATINGS["mixtral"], ffn=16384)
    sizes = {"width": 6144, "layers": 56, "heads": 48, "ffn": 16384, "experts": experts, "max_length": 65536}
    return replace(mixtral_8x7b(), **(sizes | changes))


def qwen15_moe_a2_7b(**changes) -> TransformerConfig:
    """Qwen1.5-MoE-A2.7B (Qwen 2024): 14,315,784,192 parameters."""
    config = TransformerConfig(
        vocab_size=151936, width=2048, layers=24, heads=16, kv_heads=16, ffn=5632, experts=GATINGS["qwen_moe"],
        max_length=8192, rope_base=1e6, qkv_bias=True,
    )  # fmt: skip
    return replace(config, **changes)


def qwen3_30b_a3b(**changes) -> TransformerConfig:
    """Qwen3 30B-A3B (Qwen 2025, arXiv:2505.09388): 30,532,122,624 parameters."""
    config = TransformerConfig(
        vocab_size=151936, width=2048, layers=48, heads=32, kv_heads=4, ffn=6144, experts=GATINGS["qwen3_moe"],
        head_dim=128, max_length=40960, rope_base=1e6, qk_norm=True,
    )  # fmt: skip
    return replace(config, **changes)


def qwen3_235b_a22b(**changes) -> TransformerConfig:
    """Qwen3 235B-A22B: 235,093,634,560 parameters."""
    experts = replace(GATINGS["qwen3_moe"], ffn=1536)
    sizes = {"width": 4096, "layers": 94, "heads": 64, "ffn": 12288, "experts": experts}
    return replace(qwen3_30b_a3b(), **(sizes | changes))


def deepseek_v2_lite(**changes) -> TransformerConfig:
    """DeepSeek-V2-Lite (DeepSeek-AI 2024, arXiv:2405.04434): 15,706,484,224 parameters."""
    config = TransformerConfig(
        vocab_size=102400, width=2048, layers=27, heads=16, kv_heads=16, ffn=10944,
        experts=GATINGS["deepseek_v2_lite"], latent=LatentConfig(512, 128, 64, 128), max_length=163840,
        rope_scaling=Yarn(40.0, 4096, attention_factor=1.0, mscale_all_dim=0.707),
    )  # fmt: skip
    return replace(config, **changes)


def deepseek_v2(**changes) -> TransformerConfig:
    """DeepSeek-V2: 235,741,434,880 parameters."""
    sizes = {
        "width": 5120, "layers": 60, "heads": 128, "kv_heads": 128, "ffn": 12288, "experts": GATINGS["deepseek_v2"],
        "latent": LatentConfig(512, 128, 64, 128, q_rank=1536),
        "rope_scaling": Yarn(40.0, 4096, attention_factor=1.0, mscale_all_dim=1.0),
    }  # fmt: skip
    return replace(deepseek_v2_lite(), **(sizes | changes))


def deepseek_v3(**changes) -> TransformerConfig:
    """DeepSeek-V3, and R1 (DeepSeek-AI 2024, arXiv:2412.19437): 671,026,419,200 parameters, without the MTP module."""
    sizes = {"vocab_size": 129280, "width": 7168, "layers": 61, "ffn": 18432, "experts": GATINGS["deepseek_v3"]}
    return replace(deepseek_v2(), **(sizes | changes))


def moonlight_16b_a3b(**changes) -> TransformerConfig:
    """Moonlight 16B-A3B (Liu et al. 2025, arXiv:2502.16982), Kimi-VL's decoder: 15,960,110,208 parameters."""
    experts = replace(
        GATINGS["deepseek_v3"], experts=64, top_k=6, ffn=1408, shared=2 * 1408, first_dense=1, scale=2.446,
        groups=1, top_groups=1,
    )  # fmt: skip
    sizes = {
        "vocab_size": 163840, "ffn": 11264, "experts": experts, "max_length": 8192, "rope_base": 5e4,
        "rope_scaling": None, "norm_eps": 1e-5,
    }  # fmt: skip
    return replace(deepseek_v2_lite(), **(sizes | changes))


def linear_transformer(vocab_size: int, width: int, layers: int, **changes) -> TransformerConfig:
    """`llama_like` with linear attention, elu + 1 and normalised (Katharopoulos et al. 2020, arXiv:2006.16236)."""
    return llama_like(vocab_size, width, layers, **({"linear": LinearConfig()} | changes))


def performer(vocab_size: int, width: int, layers: int, **changes) -> TransformerConfig:
    """`llama_like` with FAVOR+ and 256 orthogonal features (Choromanski et al. 2020, arXiv:2009.14794)."""
    return llama_like(vocab_size, width, layers, **({"linear": LinearConfig("performer")} | changes))


def retnet_like(vocab_size: int, width: int, layers: int, **changes) -> TransformerConfig:
    """`llama_like` with retention: decay by head, norm by head, gate (Sun et al. 2023, arXiv:2307.08621)."""
    linear = LinearConfig("identity", normalise=False, norm="heads", decay="retention", gate="silu")
    return llama_like(vocab_size, width, layers, **({"linear": linear} | changes))


def transnormer(vocab_size: int, width: int, layers: int, variant: str = "t2", **changes) -> TransformerConfig:
    """`llama_like` with DiagAttention in blocks of 64 in the first half, NormAttention in the second.

    (Qin et al. 2022, arXiv:2210.10340.) variant "t1": ReLA in the blocks, elu after; "t2": softmax, 1 + elu. Blocks go
    by columns: in packed and padded rows they begin where the row does.
    """
    if variant not in ("t1", "t2"):
        raise ValueError(f"transnormer variant is {variant!r}, expected 't1' or 't2'")
    linear = LinearConfig("elu" if variant == "t1" else "elu+1", normalise=False, norm="all")
    sizes = {
        "linear": linear, "linear_layers": tuple(range(layers // 2, layers)), "pattern": Chunked(64),
        "rectified": variant == "t1",
    }  # fmt: skip
    return llama_like(vocab_size, width, layers, **(sizes | changes))


PLAIN: dict[str, Any] = {
    "positions": "learned", "norm": "layer", "norm_eps": 1e-5, "gated": False, "activation": "gelu", "bias": True,
    "tie_embeddings": False,
}  # fmt: skip
"""A Transformer of 2017 to 2020: learned positions, LayerNorm, no gates, biases."""


def linear_transformer_mnist(**changes) -> TransformerConfig:
    """The Linear Transformer of MNIST's pixels: 8 layers of 8 heads of 32 (arXiv:2006.16236, section 4.2).

    Its output is a class of 256, where the paper has a mixture of ten logistics.
    """
    sizes = {"heads": 8, "kv_heads": 8, "ffn": 1024, "max_length": 784, "linear": LinearConfig(rotary=False)}
    return linear_transformer(256, 256, 8, **(PLAIN | sizes | changes))


def performer_protein(**changes) -> TransformerConfig:
    """The causal Performer of protein sequences: 36 layers of width 512, ffn 1024 (arXiv:2009.14794, appendix A).

    The vocabulary is ours: 20 amino acids, five rare ones and the ends, in 32 rows.
    """
    linear = LinearConfig("performer", rotary=False)
    sizes = {"heads": 8, "kv_heads": 8, "ffn": 1024, "max_length": 8192, "linear": linear}
    return performer(32, 512, 36, **(PLAIN | sizes | changes))


def transnormer_t1(**changes) -> TransformerConfig:
    """TransNormer T1 at the sizes of fairseq's language model: 6 layers of width 512, a vocabulary of our own."""
    sizes = {"heads": 8, "kv_heads": 8, "ffn": 2048, "max_length": 512}
    return transnormer(50265, 512, 6, "t1", **(PLAIN | sizes | {"tie_embeddings": True} | changes))


def transnormer_t2(**changes) -> TransformerConfig:
    """TransNormer T2 at the sizes of `transnormer_t1`."""
    sizes = {"heads": 8, "kv_heads": 8, "ffn": 2048, "max_length": 512}
    return transnormer(50265, 512, 6, "t2", **(PLAIN | sizes | {"tie_embeddings": True} | changes))


def retnet_1_3b(**changes) -> TransformerConfig:
    """RetNet 1.3B's sizes: 24 layers of width 2048, heads of 256, ffn 4096 without a gate (arXiv:2307.08621).

    Values are as wide as keys, where the paper's are twice as wide: 3 width^2 fewer numbers in each layer.
    """
    sizes = {"heads": 8, "kv_heads": 8, "ffn": 4096, "gated": False, "activation": "gelu", "max_length": 2048}
    return retnet_like(50257, 2048, 24, **(sizes | changes))


LIGHTNING = LinearConfig(
    "silu", normalise=False, norm="all", decay="lightning", gate="sigmoid", values="silu", rotary=False
)
"""Lightning attention as MiniMax has it, its heads with keys and values of their own left to `kv_heads`."""


def minimax_text_01(**changes) -> TransformerConfig:
    """MiniMax-Text-01 (MiniMax 2025, arXiv:2501.08313): 456,089,655,296 parameters, every eighth layer attends.

    Its norms stand before a layer and on the residual stream itself, which is norm_place "post" with a norm of the
    embeddings: input_layernorm of the next layer is our ffn_norm. Half of a head turns, as the released configuration
    says; in transformers 5.24's class all of it does (rotary_dim=None).
    """
    config = TransformerConfig(
        vocab_size=200064, width=6144, layers=80, heads=64, kv_heads=8, ffn=9216, head_dim=128,
        experts=replace(GATINGS["mixtral"], experts=32, ffn=9216), linear=replace(LIGHTNING, kv_heads=64),
        linear_layers=tuple(i for i in range(80) if i % 8 != 7), max_length=10_240_000, rope_base=1e7, norm_eps=1e-5,
        norm_place="post", embed_norm=True, residual=3.5565588200778455, rotary_dim=64,
    )  # fmt: skip
    return replace(config, **changes)


def sparse_transformer_enwik8(**changes) -> TransformerConfig:
    """The Sparse Transformer of enwik8 (Child et al. 2019, arXiv:1904.10509): fixed pattern, both its heads in one.

    30 layers of width 512, blocks of 128 with 32 summary columns, 12,288 bytes of context. 101,126,144 parameters and
    not 95M: positions are one table of 12,288 rows, where the paper sums one of 96 and one of 128.
    """
    config = TransformerConfig(
        vocab_size=256, width=512, layers=30, heads=8, kv_heads=8, ffn=2048, max_length=12288, pattern=Fixed(128, 32),
        positions="learned", norm="layer", norm_eps=1e-5, gated=False, activation="gelu", bias=True,
    )  # fmt: skip
    return replace(config, **changes)
