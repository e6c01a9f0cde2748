"""Named configurations: frozen published sizes, each from the model's own config file."""

from dataclasses import replace

from jaxrl.nets.transformer import TransformerConfig


def tiny(vocab_size: int = 64, **changes) -> TransformerConfig:
    """2 layers of width 64: for tests, demonstrations and first steps. `changes` are fields of the config."""
    config = TransformerConfig(
        vocab_size=vocab_size, width=64, layers=2, heads=4, kv_heads=2, ffn=128, max_length=512, tie_embeddings=True
    )
    return replace(config, **changes)
