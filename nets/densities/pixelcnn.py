"""Gated PixelCNN: convolutions that see the pixels before, all of them and no other."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.nets.densities import Density, density


@dataclass(frozen=True)
class PixelCNNConfig:
    """Sizes of a gated PixelCNN of binary images."""

    height: int
    width: int
    channels: int = 32
    layers: int = 5
    kernel: int = 3  # odd; a layer reaches (kernel - 1) / 2 pixels further
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.kernel < 3 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}, expected an odd number of at least 3")
        for name in ("height", "width", "channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


def shifted(x: jax.Array, axis: int) -> jax.Array:
    """x one place further along an axis; what leaves is lost, and 0 comes in."""
    kept = lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)
    return jnp.concatenate([jnp.zeros_like(lax.slice_in_dim(x, 0, 1, axis=axis)), kept], axis=axis)


def conv_by_products(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **_: Any) -> jax.Array:
    """What `lax.conv_general_dilated` does for `nn.Conv` at stride 1, as one product with the neighbours side by side.

    The images are small, and XLA's CPU backend takes far longer for the gradient of a convolution's kernel.
    """
    height, width, features = *kernel.shape[:2], kernel.shape[-1]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    near = [x[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    flat = jnp.concatenate(near, axis=-1).reshape(x.shape[0] * rows * columns, -1)
    return (flat @ kernel.reshape(-1, features)).reshape(-1, rows, columns, features)


class GatedLayer(nn.Module):
    """One layer of two stacks, written as the body of the layer loop.

    The vertical stack sees its own row and those above; what the horizontal one gets of it is moved down a row, so
    that it is of the rows above alone. The horizontal stack sees its own row to the left, in the first layer without
    the pixel itself (mask A of the paper: the kernel is one shorter, the row one further right). Both gates are
    tanh(a) s(b). Together there is no blind spot. Parameters: vertical/kernel [k/2 + 1, k, C, 2 C], horizontal/kernel
    [1, k/2 (+ 1), C, 2 C], link/kernel [1, 1, 2 C, 2 C], out/kernel [1, 1, C, C], each with a bias.
    """

    config: PixelCNNConfig
    first: bool = False

    @nn.compact
    def __call__(self, stacks, _):
        """((v, h), None) -> ((v, h), None), each [N, H, W, C]."""
        c, (v, h) = self.config, stacks
        reach = c.kernel // 2
        types: dict[str, Any] = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}

        def conv(features, size, padding, name) -> Any:
            by = conv_by_products
            return nn.Conv(features, size, padding=padding, conv_general_dilated=by, **types, name=name)

        sides = ((reach, 0), (reach, reach))
        vertical = conv(2 * c.channels, (reach + 1, c.kernel), sides, "vertical")(v)
        row, left = (shifted(h, 2), reach - 1) if self.first else (h, reach)
        horizontal = conv(2 * c.channels, (1, left + 1), ((0, 0), (left, 0)), "horizontal")(row)
        horizontal = horizontal + conv(2 * c.channels, (1, 1), 0, "link")(shifted(vertical, 1))
        out = conv(c.channels, (1, 1), 0, "out")(_gated(horizontal))
        return (_gated(vertical), out if self.first else h + out), None


def _gated(x):
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.tanh(a) * nn.sigmoid(b)


class PixelCNN(nn.Module):
    """Images [N, H, W] of 0 and 1 -> logits [N, H, W] (van den Oord et al. 2016, arXiv:1606.05328).

    Parameters: first/... and rest/... of `GatedLayer`, rest with a leading axis layers - 1 (they are scanned), and two
    layers of one pixel behind relu: inner/kernel [1, 1, C, C], output/kernel [1, 1, C, 1], each with a bias.
    """

    config: PixelCNNConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """See above."""
        c = self.config
        types: dict[str, Any] = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
        image = x.astype(c.dtype)[..., None]
        stacks, _ = GatedLayer(c, first=True, name="first")((image, image), None)
        if c.layers > 1:
            rest: Any = nn.scan(
                GatedLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers - 1
            )
            stacks, _ = rest(c, name="rest")(stacks, None)
        h = nn.Conv(c.channels, (1, 1), **types, name="inner")(nn.relu(stacks[1]))
        return nn.Conv(1, (1, 1), **types, name="output")(nn.relu(h))[..., 0].astype(jnp.float32)


def pixelcnn(config: PixelCNNConfig) -> Density:
    """`PixelCNN` as a density of images in raster order, x [..., height width]; a sample is as many passes."""
    model, shape = PixelCNN(config), (config.height, config.width)
    n = config.height * config.width

    def init(key):
        return model.init(key, jnp.zeros((1, *shape)))["params"]

    def logits(params, x):
        found: Any = model.apply({"params": params}, x.reshape(-1, *shape))
        return found.reshape(x.shape)

    return density(init, logits, order=lambda: jnp.arange(n))


SIZES: dict[str, PixelCNNConfig] = {
    "tiny": PixelCNNConfig(height=4, width=4, channels=8, layers=4),
    "digits": PixelCNNConfig(height=8, width=8, channels=16, layers=5),
    "mnist": PixelCNNConfig(height=28, width=28, channels=32, layers=7),
}
