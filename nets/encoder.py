"""Encoders: a Transformer in which every token sees all others, and the heads that BERT and its kin put on it."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Mask
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.language_model import LanguageModel
from jaxrl.nets.layers import ACTIVATIONS, Linear, make_norm
from jaxrl.nets.transformer import Transformer

FAMILIES = ("bert", "roberta", "albert", "electra", "distilbert")
POOLS = ("tanh", "gelu", "relu")


@dataclass(frozen=True)
class EncoderConfig:
    """The network and its heads. Frozen and hashable; `jaxrl.nets.encoder_presets` names published ones.

    BERT (Devlin et al. 2018, arXiv:1810.04805) has a head for masked tokens, a pooled first token and a head for pairs
    of sentences; RoBERTa (Liu et al. 2019, arXiv:1907.11692) has the first alone; ALBERT (Lan et al. 2019,
    arXiv:1909.11942) has BERT's over shared layers, its pairs in right or swapped order; ELECTRA (Clark et al. 2020,
    arXiv:2003.10555) is a generator with the first and a discriminator that says which tokens were replaced.
    """

    transformer: TransformerConfig
    masked: bool = True  # predicts masked tokens: a layer and a norm before the tied embeddings, and a bias
    pooled: Literal["tanh", "gelu", "relu"] | None = None  # a layer over the first token, with this activation
    pair: bool = False  # two logits from the pooled token: next sentence (BERT), order of sentences (ALBERT)
    replaced: bool = False  # one logit a token: was it replaced? (ELECTRA)
    classes: int | None = None  # logits of so many classes from the pooled token
    position_offset: int = 0  # row of the position table at which position 0 stands; RoBERTa: padding id + 1
    family: Literal["bert", "roberta", "albert", "electra", "distilbert"] = "bert"  # whose names a checkpoint has

    def __post_init__(self):
        if self.transformer.causal or not self.transformer.tie_embeddings:
            raise ValueError(
                f"the transformer has causal={self.transformer.causal} and tie_embeddings="
                f"{self.transformer.tie_embeddings}, expected False and True: an encoder sees both sides, and its "
                "embeddings also decode"
            )
        if self.family not in FAMILIES or self.pooled not in (None, *POOLS):
            raise ValueError(
                f"family is {self.family!r} and pooled {self.pooled!r}, expected one of {', '.join(FAMILIES)}, and "
                f"None or one of {', '.join(POOLS)}"
            )
        if self.pooled is None and (self.pair or self.classes):
            raise ValueError(
                f"pair is {self.pair} and classes {self.classes}, but pooled is None: they are read from the pooled "
                "token; give pooled its activation"
            )


class Outputs(NamedTuple):
    """What an encoder makes of tokens [B, T]; None for a head that the config does not have.

    hidden [B, T, D]: of the last layer. masked [B, T, E + 1]: what the tied embeddings decode, see `unembedding`.
    pooled [B, D]. The others are logits, float32: pair [B, 2], replaced [B, T], classes [B, classes].
    """

    hidden: jax.Array
    masked: jax.Array | None
    pooled: jax.Array | None
    pair: jax.Array | None
    replaced: jax.Array | None
    classes: jax.Array | None


class Encoder(nn.Module):
    """tokens [B, T] -> `Outputs`. Under jit, heads that are not read cost nothing.

    Parameters: transformer/... (`jaxrl.nets.transformer`), and for the heads that there are (E: width of the embedding)
      masked/kernel [D, E], masked/bias, masked_norm/{scale, bias} [E], masked_bias [V]
      pooled/{kernel, bias} [D, D]; pair/{kernel, bias} [D, 2]; classes/{kernel, bias} [D, classes]
      replaced_hidden/{kernel, bias} [D, D], replaced/{kernel, bias} [D, 1]
    Deviations: no dropout, as elsewhere here. Padding sees padding, where the published code has it see the text: what
    stands on real tokens is the same.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        token_types: jax.Array | None = None,
        positions: jax.Array | None = None,
        mask: Mask | None = None,
    ) -> Outputs:
        """Encode.

        Args:
          tokens: [B, T].
          token_types: [B, T], which sentence a token is of; None: the first. No effect with token_types 0.
          positions: [B, T], from 0 at a row's first real token; None: columns.
          mask: who sees whom; None: all. `Segments(real)`, real 1 on text and 0 on padding, hides padding.
        """
        c, body = self.config, self.config.transformer
        types: dict[str, Any] = {"dtype": body.dtype, "param_dtype": body.param_dtype}
        layer = lambda features, name: Linear(features, use_bias=True, **types, name=name)
        logits = lambda features, name: Linear(features, True, param_dtype=body.param_dtype, name=name)
        if c.position_offset:
            if tokens.shape[1] + c.position_offset > body.max_length:
                raise ValueError(
                    f"{tokens.shape[1]} tokens exceed the {body.max_length - c.position_offset} positions that are "
                    f"left of {body.max_length} from {c.position_offset} on: shorten them"
                )
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape[:2])
            positions = positions + c.position_offset
        transformer = Transformer(body, name="transformer")
        x, _ = transformer(tokens, positions=positions, mask=mask, token_types=token_types)
        act = ACTIVATIONS[body.activation]
        masked = pair = replaced = classes = None
        pooled: Any = None
        if c.masked:
            masked = act(layer(body.embed_width or body.width, "masked")(x))
            masked = make_norm(body.norm, body.norm_eps, **types, name="masked_norm")(masked)
            masked = jnp.concatenate([masked, jnp.ones_like(masked[..., :1])], axis=-1)
            self.param("masked_bias", nn.initializers.zeros, (body.vocab_size,), jnp.dtype(body.param_dtype))
        if c.pooled:
            squash = jnp.tanh if c.pooled == "tanh" else ACTIVATIONS[c.pooled]
            pooled = squash(layer(body.width, "pooled")(x[:, 0]))
        if c.pair:
            pair = logits(2, "pair")(pooled)
        if c.replaced:
            replaced = logits(1, "replaced")(act(layer(body.width, "replaced_hidden")(x)))[..., 0]
        if c.classes:
            classes = logits(c.classes, "classes")(pooled)
        return Outputs(x, masked, pooled, pair, replaced, classes)


def unembedding(config: EncoderConfig, params: Any) -> jax.Array:
    """[E + 1, V]: logits of masked tokens are `language_model.logits(outputs.masked, unembedding(config, params))`.

    The last row is the decoder's bias; what stands against it in `Outputs.masked` is always 1. So whatever works with
    hidden states and an unembedding, such as `token_log_probs`, needs to know nothing of a bias.
    """
    if not config.masked:
        raise ValueError("the encoder has no head for masked tokens: give its config masked=True")
    rows = params["transformer"]["embed"]["embedding"].T
    return jnp.concatenate([rows, params["masked_bias"][None]]).astype(config.transformer.dtype)


def masked_language_model(config: EncoderConfig) -> LanguageModel:
    """An encoder as a `LanguageModel`: hidden states [B, T, E + 1] are those of the head for masked tokens.

    `apply` also takes token_types [B, T]. Logits at t are of token t itself, not of the one after it. There is no
    cache: a new token changes what every token before it has become.
    """
    if not config.masked:
        raise ValueError("the encoder has no head for masked tokens: give its config masked=True")
    module = Encoder(config)

    def refuse(*_):
        raise ValueError("an encoder has no cache, as every token sees those after it: call apply on whole sequences")

    def init(key):
        return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def apply(params, tokens, *, positions=None, mask=None, cache=None, token_types=None):
        if cache is not None:
            refuse()
        outputs = module.apply({"params": params}, tokens, token_types=token_types, positions=positions, mask=mask)
        return outputs.masked, None  # pyright: ignore[reportAttributeAccessIssue]

    return LanguageModel(init, apply, lambda params: unembedding(config, params), refuse)


def with_embeddings_of(params: Any, other: Any) -> Any:
    """The encoder's parameters with the other one's embeddings: an ELECTRA generator has its discriminator's.

    (arXiv:2003.10555, section 3.2: tokens', positions', types' and their norm.) Gradients reach both networks' use.
    """
    shared = ("embed", "position_embed", "type_embed", "embed_norm")
    taken = {name: value for name, value in other["transformer"].items() if name in shared}
    return {**params, "transformer": {**params["transformer"], **taken}}
