"""What networks that are no decoders are trained on, as a loss and the shapes of its batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl import segment
from jaxrl.kernels.log_probs import token_log_probs
from jaxrl.losses.tokens import cross_entropy
from jaxrl.nets import encoder, recurrent
from jaxrl.nets.densities import made, nade, pixelcnn
from jaxrl.nets.vision import sam, swin, vit, vq
from jaxrl.posttrain import sft
from jaxrl.types import TokenBatch


class Objective(NamedTuple):
    """loss: (params, batch, key) -> scalar, the mean over rows. batch: its shapes [rows, ...]. what: in words."""

    loss: Callable
    batch: Any
    what: str


def objective(config: Any, rows: int, length: int) -> Objective:
    """The training of a network.

    Args:
      config: of an encoder, a recurrent language model, or a network of pictures or densities.
      rows: of a batch.
      length: tokens of a row; pictures have the size that the config, or the field, says.

    Raises:
      ValueError: a network that is none of these.
    """
    for kind, make in _KINDS.items():
        if isinstance(config, kind):
            return make(config, rows, length)
    raise ValueError(f"{type(config).__name__} has no objective here; expected one of {_names()}")


def retyped(config: Any, *, remat: str, **types: str) -> Any:
    """The config with what it has of remat (whether layers are computed again, or which), dtype and param_dtype."""
    if isinstance(config, encoder.EncoderConfig):
        body = dataclasses.replace(config.transformer, remat=remat, **types)
        return dataclasses.replace(config, transformer=body)
    given = {"remat": remat != "none", **types}
    known = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: value for name, value in given.items() if name in known})


def _shape(*sizes: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _encoder(config: encoder.EncoderConfig, rows: int, length: int) -> Objective:
    module = encoder.Encoder(config)
    length = min(length, config.transformer.max_length - config.position_offset)

    def loss(params, batch, key):
        out: Any = module.apply({"params": params}, batch["tokens"])
        total = jnp.float32(0)
        if config.masked:
            table = encoder.unembedding(config, params)
            total = total - token_log_probs(out.masked, table, batch["tokens"])[0].mean()
        if config.pair:
            total = total + cross_entropy(out.pair[:, None], batch["label"][:, None]).mean()
        if config.replaced:
            total = total + jax.nn.softplus(jnp.where(batch["tokens"] > 0, out.replaced, -out.replaced)).mean()
        return total

    batch = {"tokens": _shape(rows, length, dtype=jnp.int32), "label": _shape(rows, dtype=jnp.int32)}
    heads = [name for name in ("masked", "pair", "replaced") if getattr(config, name)]
    return Objective(loss, batch, f"rows of {length} tokens, heads {' and '.join(heads)}")


def _recurrent(config: recurrent.RecurrentConfig, rows: int, length: int) -> Objective:
    model = recurrent.recurrent_language_model(config)
    loss = lambda params, batch, key: sft.loss(model, params, batch)[0].mean
    batch = TokenBatch(_shape(rows, length, dtype=jnp.int32), _shape(rows, length))
    return Objective(loss, batch, f"next tokens in rows of {length}")


def _classes(config: vit.ViTConfig | swin.SwinConfig, rows: int, length: int) -> Objective:
    module: Any = vit.ViT(config) if isinstance(config, vit.ViTConfig) else swin.Swin(config)
    if isinstance(config, vit.ViTConfig):
        sides = config.image_size
    else:  # of the papers: windows as wide as the last stage, the larger ones of version 2 as the third
        side = config.window * (16 if config.version == 2 and config.window > 8 else 32)
        sides = (side, side)

    def loss(params, batch, key):
        logits = module.apply({"params": params}, batch["pictures"], rngs={"dropout": key})
        return cross_entropy(logits[:, None], batch["label"][:, None]).mean()

    batch = {"pictures": _shape(rows, *sides, config.channels), "label": _shape(rows, dtype=jnp.int32)}
    return Objective(loss, batch, f"classes of pictures of {sides[0]} x {sides[1]}")


def _segments(config: sam.SAMConfig, rows: int, length: int) -> Objective:
    def loss(params, batch, key):
        return segment.loss(config, params, batch["pictures"], batch["masks"], key)[0].mean()

    side = 4 * config.grid
    pictures, masks = _shape(rows, config.image, config.image, 3), _shape(rows, side, side, dtype=jnp.bool_)
    what = f"11 rounds of prompts about pictures of {config.image} x {config.image}"
    return Objective(loss, {"pictures": pictures, "masks": masks}, what)


def _pictures(config: vq.VQConfig, rows: int, length: int) -> Objective:
    def loss(params, pictures, key):
        out: Any = vq.VQ(config).apply({"params": params}, pictures)
        found, quantised = out
        return jnp.mean(jnp.square(found - pictures)) + quantised.loss

    what = f"pictures of {config.size} x {config.size} put together again, without a discriminator"
    return Objective(loss, _shape(rows, config.size, config.size, 3), what)


def _density(config: Any, rows: int, length: int) -> Objective:
    if isinstance(config, nade.NADEConfig):
        density = nade.eonade(config) if len(config.hidden) > 1 else nade.nade(config)
    else:
        density = made.made(config) if isinstance(config, made.MADEConfig) else pixelcnn.pixelcnn(config)
    size = config.height * config.width if isinstance(config, pixelcnn.PixelCNNConfig) else config.size
    loss = lambda params, x, key: density.loss(params, x, key).mean()
    return Objective(loss, _shape(rows, size), f"the likelihood of {size} binary numbers")


_KINDS: dict[Any, Callable[..., Objective]] = {
    encoder.EncoderConfig: _encoder,
    recurrent.RecurrentConfig: _recurrent,
    (vit.ViTConfig, swin.SwinConfig): _classes,
    sam.SAMConfig: _segments,
    vq.VQConfig: _pictures,
    (made.MADEConfig, nade.NADEConfig, pixelcnn.PixelCNNConfig): _density,
}


def _names() -> str:
    kinds = [kind for one in _KINDS for kind in (one if isinstance(one, tuple) else (one,))]
    return ", ".join(kind.__name__ for kind in kinds)
