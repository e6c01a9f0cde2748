"""A VQ-GAN: pictures as tokens of a codebook, and back. Chameleon's image tokeniser."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.kernels.attention import Full, attention

GROUPS = 32


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQ-GAN (Esser et al. 2020, arXiv:2012.09841); the defaults are Chameleon's (arXiv:2405.09818)."""

    codes: int = 8192  # K, entries of the codebook
    width: int = 256  # of an entry
    latent: int = 256  # channels that the encoder leaves
    size: int = 512  # of the square picture
    channels: int = 128  # of the first level, a multiple of 32
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of the channels, by level; each level but the last halves the size
    blocks: int = 2  # residual blocks of a level
    beta: float = 0.25  # weight of the codebook's term beside the commitment's

    def __post_init__(self):
        if self.channels % GROUPS or self.size % self.scale:
            raise ValueError(
                f"channels is {self.channels} and size {self.size}: expected multiples of {GROUPS} (the groups of a "
                f"norm) and of {self.scale} (the pixels of a token)"
            )

    @property
    def scale(self) -> int:
        """Pixels along the side of a token."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return (self.size // self.scale) ** 2


class Quantised(NamedTuple):
    """ids: int32 [B, h, w]. codes: their entries [B, h, w, width], with the gradient of what was quantised.
    loss: scalar, ||sg(code) - z||^2 + beta ||code - sg(z)||^2, mean over numbers (van den Oord 2017,
    arXiv:1711.00937, with beta on the codebook's term, as in the released code)."""

    ids: jax.Array
    codes: jax.Array
    loss: jax.Array


class Residual(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), [B, H, W, C] -> [B, H, W, features]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Both convolutions are 3 x 3; a 1 x 1 one brings x to other features."""
        y = _conv(self.features, "conv1")(nn.silu(_norm("norm1")(x)))
        y = _conv(self.features, "conv2")(nn.silu(_norm("norm2")(y)))
        return y + (x if x.shape[-1] == self.features else _conv(self.features, "shortcut", 1)(x))


class Mixing(nn.Module):
    """x + attention of all places to all, one head as wide as the channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same."""
        b, h, w, c = x.shape
        normed = _norm("norm")(x)
        q, k, v = (_conv(c, name, 1)(normed).reshape(b, h * w, 1, c) for name in ("q", "k", "v"))
        y: Any = attention(q, k, v, mask=Full())
        return x + _conv(c, "out", 1)(y.reshape(x.shape))


class Middle(nn.Module):
    """Residual, attention, residual."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same."""
        x = Mixing(name="attention")(Residual(x.shape[-1], name="block_0")(x))
        return Residual(x.shape[-1], name="block_1")(x)


class Encoder(nn.Module):
    """Pictures [B, H, W, 3] -> [B, H / scale, W / scale, latent]."""

    config: VQConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Levels of residual blocks, each but the last followed by a convolution of stride 2."""
        c = self.config
        x = _conv(c.channels, "conv_in")(x)
        for level, times in enumerate(c.multipliers):
            for block in range(c.blocks):
                x = Residual(c.channels * times, name=f"down_{level}_block_{block}")(x)
            if level + 1 < len(c.multipliers):
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
                x = nn.Conv(x.shape[-1], (3, 3), strides=2, padding="VALID", name=f"down_{level}")(x)
        x = Middle(name="middle")(x)
        return _conv(c.latent, "conv_out")(nn.silu(_norm("norm_out")(x)))


class Decoder(nn.Module):
    """The encoder backwards: [B, h, w, latent] -> pictures; nearest neighbours and a convolution double the size."""

    config: VQConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """One residual block more in a level than the encoder has."""
        c = self.config
        x = Middle(name="middle")(_conv(c.channels * c.multipliers[-1], "conv_in")(x))
        for level in reversed(range(len(c.multipliers))):
            for block in range(c.blocks + 1):
                x = Residual(c.channels * c.multipliers[level], name=f"up_{level}_block_{block}")(x)
            if level:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(x.shape[-1], f"up_{level}")(x)
        return _conv(3, "conv_out")(nn.silu(_norm("norm_out")(x)))


class VQ(nn.Module):
    """The tokeniser. Parameters: encoder, quant/kernel (1 x 1), codebook [K, width], post_quant/kernel, decoder."""

    config: VQConfig = field(default_factory=VQConfig)

    def setup(self):
        c = self.config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant, self.post_quant = nn.Conv(c.width, (1, 1)), nn.Conv(c.latent, (1, 1))
        even = lambda key, shape: jax.random.uniform(key, shape, minval=-1 / c.codes, maxval=1 / c.codes)
        self.codebook = self.param("codebook", even, (c.codes, c.width))

    def encode(self, pictures: jax.Array) -> Quantised:
        """Pictures [B, H, W, 3], about in [-1, 1], as the nearest entries of the codebook."""
        if pictures.ndim != 4 or pictures.shape[3] != 3 or any(n % self.config.scale for n in pictures.shape[1:3]):
            raise ValueError(
                f"pictures have shape {pictures.shape}, expected [B, H, W, 3] with sides that are multiples of "
                f"{self.config.scale}"
            )
        if not jnp.issubdtype(pictures.dtype, jnp.floating):
            raise ValueError(
                f"pictures have dtype {pictures.dtype}, expected floats, about in [-1, 1]: scale bytes first"
            )
        z = self.quant(self.encoder(pictures))
        inner = jnp.einsum("bhwd,kd->bhwk", z, self.codebook)
        distance = jnp.sum(jnp.square(self.codebook), axis=1)[None, None, None] - 2 * inner  # but for |z|^2
        ids = jnp.argmin(distance, axis=-1).astype(jnp.int32)
        codes, stop = self.codebook[ids], jax.lax.stop_gradient
        loss = jnp.mean(jnp.square(stop(codes) - z)) + self.config.beta * jnp.mean(jnp.square(codes - stop(z)))
        return Quantised(ids, z + stop(codes - z), loss)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Pictures of codes [B, h, w, width], or of ids [B, h, w]."""
        codes = self.codebook[codes] if jnp.issubdtype(codes.dtype, jnp.integer) else codes
        return self.decoder(self.post_quant(codes))

    def __call__(self, pictures: jax.Array) -> tuple[jax.Array, Quantised]:
        """(pictures put together again, what they were quantised to)."""
        quantised = self.encode(pictures)
        return self.decode(quantised.codes), quantised


def _conv(features: int, name: str, size: int = 3) -> nn.Conv:
    return nn.Conv(features, (size, size), name=name)


def _norm(name: str) -> Any:
    return nn.GroupNorm(GROUPS, epsilon=1e-6, use_fast_variance=False, name=name)


SIZES = {
    "tiny": VQConfig(codes=16, width=8, latent=8, size=16, channels=32, multipliers=(1, 2), blocks=1),
    "chameleon": VQConfig(),
}
