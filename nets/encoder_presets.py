"""Published encoders by name, and GPT-2; parameters are counted in tests/nets/test_encoder.py."""

from dataclasses import replace
from typing import Any

from jaxrl.kernels.attention import BigBird, Longformer
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.encoder import EncoderConfig

PUBLISHED: dict[str, Any] = {
    "norm": "layer",
    "gated": False,
    "bias": True,
    "positions": "learned",
    "tie_embeddings": True,
}
"""What all of them have in common: GPT-2 and the encoders."""


def encoder(
    width: int = 768, layers: int = 12, heads: int = 12, ffn: int | None = None, *, vocab_size: int = 30522, **changes
) -> TransformerConfig:
    """BERT's Transformer: norms after the sums, learned positions, two kinds of tokens, gelu; ffn None: 4 widths."""
    own = {"causal": False, "norm_place": "post", "activation": "gelu", "embed_norm": True}
    sizes = {"kv_heads": heads, "ffn": 4 * width if ffn is None else ffn, "max_length": 512, "norm_eps": 1e-12}
    options: dict[str, Any] = PUBLISHED | own | sizes | {"token_types": 2} | changes
    return TransformerConfig(vocab_size, width, layers, heads, **options)


def gpt2(
    width: int = 768, layers: int = 12, heads: int = 12, *, vocab_size: int = 50257, **changes
) -> TransformerConfig:
    """GPT-2's Transformer (Radford et al. 2019): norms before the layers, learned positions, gelu by tanh."""
    sizes = {"kv_heads": heads, "ffn": 4 * width, "max_length": 1024, "norm_eps": 1e-5, "activation": "gelu_tanh"}
    options: dict[str, Any] = PUBLISHED | sizes | changes
    return TransformerConfig(vocab_size, width, layers, heads, **options)


def bert(*sizes, **changes) -> EncoderConfig:
    """BERT (Devlin et al. 2018, arXiv:1810.04805) with its two heads; arguments as of `encoder`."""
    return EncoderConfig(encoder(*sizes, **changes), pooled="tanh", pair=True)


def roberta(*sizes, **changes) -> EncoderConfig:
    """RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT without pairs, positions from 2 on, as padding has id 1."""
    own = {"vocab_size": 50265, "max_length": 514, "token_types": 1, "norm_eps": 1e-5}
    return EncoderConfig(encoder(*sizes, **(own | changes)), position_offset=2, family="roberta")


def albert(*sizes, **changes) -> EncoderConfig:
    """ALBERT (Lan et al. 2019, arXiv:1909.11942), version 2: one layer for all, embeddings of width 128."""
    own = {"vocab_size": 30000, "embed_width": 128, "share_layers": True, "activation": "gelu_tanh"}
    return EncoderConfig(encoder(*sizes, **(own | changes)), pooled="tanh", pair=True, family="albert")


def electra(*sizes, **changes) -> EncoderConfig:
    """ELECTRA's discriminator (Clark et al. 2020, arXiv:2003.10555)."""
    return EncoderConfig(encoder(*sizes, **changes), masked=False, replaced=True, family="electra")


def electra_generator(discriminator: EncoderConfig, share: float) -> EncoderConfig:
    """The generator that is trained with a discriminator: width, ffn and heads times `share`, embeddings alike.

    The paper's shares: 1/4 for small and large, 1/3 for base (arXiv:2003.10555, appendix A).
    """
    c = discriminator.transformer
    width, heads = round(c.width * share), max(round(c.heads * share), 1)
    sizes: dict[str, Any] = {"width": width, "heads": heads, "kv_heads": heads, "ffn": round(c.ffn * share)}
    sizes["embed_width"] = None if (c.embed_width or c.width) == width else c.embed_width or c.width
    return replace(discriminator, transformer=replace(c, **sizes), masked=True, replaced=False)


LARGE = (1024, 24, 16)
XLM = {"vocab_size": 250002}
SIZES: dict[str, EncoderConfig] = {
    "tiny": bert(32, 2, 4, vocab_size=64, max_length=64),
    # Devlin et al. 2018, section 3, and the authors' releases
    "bert_base": bert(),
    "bert_large": bert(*LARGE),
    "bert_base_cased": bert(vocab_size=28996),
    "bert_base_multilingual": bert(vocab_size=119547),
    # Turc et al. 2019, arXiv:1908.08962, table 1
    "bert_tiny": bert(128, 2, 2),
    "bert_mini": bert(256, 4, 4),
    "bert_small": bert(512, 4, 8),
    "bert_medium": bert(512, 8, 8),
    # all-MiniLM-L6-v2: 6 layers of Wang et al. 2020 (arXiv:2002.10957), tuned to embed sentences
    "minilm_l6": EncoderConfig(encoder(384, 6, 12), masked=False, pooled="tanh"),
    # Liu et al. 2019; Conneau et al. 2019, arXiv:1911.02116; Sanh et al. 2019, arXiv:1910.01108
    "roberta_base": roberta(),
    "roberta_large": roberta(*LARGE),
    "distilroberta": roberta(768, 6),
    "xlm_roberta_base": roberta(**XLM),
    "xlm_roberta_large": roberta(*LARGE, **XLM),
    "distilbert": EncoderConfig(encoder(768, 6, token_types=0), family="distilbert"),
    # Lan et al. 2019, table 1
    "albert_base": albert(),
    "albert_large": albert(*LARGE),
    "albert_xlarge": albert(2048, 24, 16),
    "albert_xxlarge": albert(4096, 12, 64),
    # Clark et al. 2020, table 6
    "electra_small": electra(256, 12, 4, embed_width=128),
    "electra_base": electra(),
    "electra_large": electra(*LARGE),
}
SIZES |= {
    f"electra_{name}_generator": electra_generator(SIZES[f"electra_{name}"], share)
    for name, share in {"small": 1 / 4, "base": 1 / 3, "large": 1 / 4}.items()
}
SPARSE_SIZES: dict[str, EncoderConfig] = {
    # Zaheer et al. 2020, arXiv:2007.14062; bigbird-roberta-base: a BERT with blocks of 64
    "bigbird_base": EncoderConfig(
        encoder(vocab_size=50358, max_length=4096, activation="gelu_tanh", pattern=BigBird(64)),
        masked=False, pooled="tanh",
    ),
    # Beltagy et al. 2020, arXiv:2004.05150; longformer-base-4096: a RoBERTa with a window of 512 and a first token that
    # all see, which has matrices of its own there
    "longformer_base": EncoderConfig(
        encoder(vocab_size=50265, max_length=4098, token_types=1, norm_eps=1e-5, pattern=Longformer(256, 1)),
        masked=False, pooled="tanh", position_offset=2, family="roberta",
    ),
}  # fmt: skip
"""Encoders that are settings: no checkpoint of theirs opens."""
GPT2_SIZES: dict[str, TransformerConfig] = {
    # Radford et al. 2019, table 2; distilgpt2 as Sanh et al. 2019
    "gpt2": gpt2(),
    "gpt2_medium": gpt2(*LARGE),
    "gpt2_large": gpt2(1280, 36, 20),
    "gpt2_xl": gpt2(1600, 48, 25),
    "distilgpt2": gpt2(768, 6),
}
