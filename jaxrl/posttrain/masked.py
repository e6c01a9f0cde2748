"""Pre-training of encoders: masked tokens and pairs of sentences (BERT and its kin), replaced tokens (ELECTRA)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxrl.data import masking
from jaxrl.kernels.attention import Segments
from jaxrl.kernels.log_probs import token_log_probs
from jaxrl.losses import masked as losses
from jaxrl.losses import reduce
from jaxrl.losses.tokens import cross_entropy
from jaxrl.nets.encoder import Encoder, EncoderConfig, Outputs, unembedding, with_embeddings_of
from jaxrl.nets.language_model import logits
from jaxrl.posttrain import sft

SPANS = {"": None, "geometric": masking.geometric, "poisson": masking.poisson}


@flax.struct.dataclass
class Texts:
    """Clean rows, `[B, T]` each: `tokens`, `real` (0 on padding), `maskable` (bool; see `data.masking`).

    `types`: which sentence a token is of, or None. `labels`: `[B]`, of pairs of sentences, or None.
    """

    tokens: jax.Array
    real: jax.Array
    maskable: jax.Array
    types: jax.Array | None = None
    labels: jax.Array | None = None


@flax.struct.dataclass
class Masked:
    """Rows with a part of their tokens to be guessed. Noise is data: a loss is a plain function of parameters and this.

    `tokens`: `[B, T]` as the network sees them. `chosen`: `[B, T]` bool. `keys`: `[B]`, one for each row, which ELECTRA
    draws replacements with.
    """

    texts: Texts
    tokens: jax.Array
    chosen: jax.Array
    keys: jax.Array


@dataclasses.dataclass(frozen=True)
class MaskedConfig:
    """One step of pre-training."""

    batch: int = 256
    """Rows per step."""
    micro_batches: int = 1
    """Parts in which a batch is computed."""
    share: float = 0.15
    """Of the tokens that may be masked, how many are to be guessed."""
    exact: bool = False
    """The same share of every row, rather than on average; spans always are."""
    mask: float = 0.8
    """Of these, seen as the mask token; 1 for ELECTRA."""
    random: float = 0.1
    """Of these, seen as a random token; 0 for ELECTRA. The rest is seen as it is."""
    spans: str = ""
    """Choose spans of geometric (SpanBERT) or poisson length; empty: single tokens."""


def masked(key: jax.Array, texts: Texts, config: MaskedConfig, *, mask_id: int, words: int | jax.Array) -> Masked:
    """Chooses tokens and hides them; consumes the key. mask_id, words: as of `data.masking.corrupted`."""
    if config.spans not in SPANS:
        raise ValueError(f"spans is {config.spans!r}, expected one of {', '.join(map(repr, SPANS))}")
    choose, hide, rows = jax.random.split(key, 3)
    lengths = SPANS[config.spans]
    if lengths is None:
        chosen = masking.chosen(choose, texts.maskable, share=config.share, exact=config.exact)
    else:
        chosen = masking.spans(choose, texts.maskable, jnp.asarray(lengths(), jnp.float32), share=config.share)
    options: dict[str, Any] = {"mask_id": mask_id, "words": words, "mask": config.mask, "random": config.random}
    tokens = masking.corrupted(hide, texts.tokens, chosen, **options)
    return Masked(texts, tokens, chosen > 0, jax.random.split(rows, len(tokens)))


def outputs(config: EncoderConfig, params, texts: Texts, tokens: jax.Array) -> Outputs:
    """What the encoder makes of `tokens [B, T]` in place of the clean ones; padding is hidden."""
    mask = Segments(jnp.asarray(texts.real, jnp.int32))
    return Encoder(config).apply({"params": params}, tokens, token_types=texts.types, mask=mask)  # pyright: ignore


def bert_loss(config: EncoderConfig, params, part: Masked, *, chunk: int | None = None):
    """Masked tokens, plus pairs of sentences where the config has a head and the texts have labels.

    (Devlin et al. 2018, arXiv 1810.04805; without labels Liu et al. 2019, RoBERTa, arXiv 1907.11692.)

    Args:
      config, params: an encoder with masked=True.
      part: from `masked`.
      chunk: tokens whose logits are held at once, at most; None chooses.

    Returns:
      `(Weighted, {"train/target_probability", "masked/pair_loss", "masked/pair_accuracy": Weighted})`: the loss, see
      `losses.masked.joined`; the last two where there are labels.
    """
    found = outputs(config, params, part.texts, part.tokens)
    log_probs, _ = token_log_probs(found.masked, unembedding(config, params), part.texts.tokens, chunk=chunk)  # pyright: ignore
    guessed = reduce.tokens(-log_probs, part.chosen)
    fixed = jax.lax.stop_gradient
    metrics = {"train/target_probability": reduce.tokens(fixed(jnp.exp(log_probs)), part.chosen)}
    if part.texts.labels is None or found.pair is None:
        return guessed, metrics
    pair = reduce.elements(losses.sentence_pair(found.pair, part.texts.labels))
    right = found.pair.argmax(-1) == part.texts.labels
    metrics |= {"masked/pair_loss": jax.tree.map(fixed, pair), "masked/pair_accuracy": reduce.elements(right)}
    return losses.joined(guessed, (1.0, pair)), metrics


def replacements(keys: jax.Array, scores: jax.Array) -> jax.Array:
    """Tokens [B, N] drawn from a generator's logits [B, N, V], each row by its own key; no gradient passes.

    The same keys draw the same: two losses of one `Masked` see one noise.
    """
    return jax.vmap(jax.random.categorical)(jax.random.clone(keys), jax.lax.stop_gradient(scores))


def electra_loss(
    generator: EncoderConfig,
    discriminator: EncoderConfig,
    params,
    part: Masked,
    *,
    coefficient: float = 50.0,
    most: int | None = None,
):
    """ELECTRA: a small generator guesses masked tokens, a discriminator says which of its guesses are wrong.

    Guesses are sampled, and the generator learns by its own likelihood alone, not from the discriminator. (Clark et al.
    2020, arXiv 2003.10555, section 3.) Only the discriminator is kept.

    Args:
      generator, discriminator: `nets.encoder_presets.electra_generator` makes the one from the other.
      params: {"generator", "discriminator"}; the generator's embeddings are not read: it has the discriminator's.
      part: from `masked` with mask=1.0, random=0.0.
      coefficient: of the discriminator's loss.
      most: tokens of a row that are guessed at most, which bounds the logits to [B, most, V]; None: all T.

    Returns:
      `(Weighted, {"electra/generator_loss", "electra/discriminator_loss", "electra/replaced", "electra/accuracy":
      Weighted})`: the loss, see `losses.masked.joined`; its parts; the share of tokens that were replaced.
    """
    texts = part.texts
    columns, counted = masking.gathered(part.chosen, most or part.tokens.shape[1])
    shared = with_embeddings_of(params["generator"], params["discriminator"])
    hidden: Any = outputs(generator, shared, texts, part.tokens).masked
    hidden = jnp.take_along_axis(hidden, columns[..., None], axis=1)
    scores = logits(hidden, unembedding(generator, shared))
    targets = jnp.take_along_axis(texts.tokens, columns, axis=1)
    guessed = reduce.tokens(cross_entropy(scores, targets), counted)
    drawn = jnp.where(counted, replacements(part.keys, scores), targets)
    seen = jax.vmap(lambda row, at, new: row.at[at].set(new))(texts.tokens, columns, drawn)
    is_replaced = seen != texts.tokens
    found: Any = outputs(discriminator, params["discriminator"], texts, seen).replaced
    told = reduce.tokens(losses.replaced_tokens(found, is_replaced), texts.real > 0)
    right = (found > 0) == is_replaced
    metrics = {
        "electra/generator_loss": guessed,
        "electra/discriminator_loss": told,
        "electra/replaced": reduce.tokens(is_replaced, texts.real > 0),
        "electra/accuracy": reduce.tokens(right, texts.real > 0),
    }
    metrics = jax.tree.map(jax.lax.stop_gradient, metrics)
    return losses.joined(guessed, (coefficient, told)), metrics


def make(
    config: MaskedConfig,
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    mask_id: int,
    words: int | jax.Array,
    max_grad_norm: float = 1.0,
    constrain: Callable = lambda batch: batch,
) -> sft.SFT:
    """The pure functions of a run: those of `sft.make`, of texts that are masked anew for each step.

    Args:
      config: batch sizes and masks.
      loss: (params, Masked) -> (Weighted, metrics): `bert_loss` or `electra_loss` with their configs given.
      optimizer: from `update.make_optimizer`, or any optax transformation.
      mask_id, words: as of `data.masking.corrupted`.
      max_grad_norm, constrain: as of `sft.make`.

    Returns:
      `init(key, params) -> TrainState` and `step(state, texts) -> (state, metrics)`, where `texts` are all rows
      `[N, T]`; a step draws `config.batch` of them by `update.epoch_batch`.
    """
    sizes = sft.SFTConfig(batch=config.batch, micro_batches=config.micro_batches)
    objective = lambda _, params, part: loss(params, part)
    prepare = lambda key, texts: masked(key, texts, config, mask_id=mask_id, words=words)
    options: dict[str, Any] = {"max_grad_norm": max_grad_norm, "constrain": constrain}
    return sft.make(sizes, None, optimizer, objective=objective, prepare=prepare, **options)
