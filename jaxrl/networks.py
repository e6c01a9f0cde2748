"""`jaxrl nets`: every network of the library with its published sizes, counted from shapes."""

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.display import Display
from jaxrl.nets import chameleon, encoder_presets, presets, recurrent
from jaxrl.nets import vision_language as vl
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.densities import made, nade, pixelcnn
from jaxrl.nets.encoder import Encoder
from jaxrl.nets.language_model import language_model
from jaxrl.nets.multi_token import multi_token_model
from jaxrl.nets.vision import sam, swin, vit, vq
from jaxrl.nets.weights import maps, vision_language


class Network(NamedTuple):
    """A network of one size. family: what kind. config: its config. init: (config, key) -> parameters."""

    name: str
    family: str
    config: Any
    init: Callable[[Any, jax.Array], Any]

    @property
    def shapes(self) -> Any:
        """Of its parameters; nothing is allocated."""
        return jax.eval_shape(lambda: self.init(self.config, jax.random.key(0)))

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.shapes))


def networks() -> Iterator[Network]:
    """All of them."""
    for family, sizes, init in _families():
        for name, config in sizes.items():
            if not name.startswith("tiny"):
                yield Network(name, family, config, init)


def _families() -> Iterator[tuple[str, Mapping[str, Any], Callable]]:
    """(family, published configs by name, (config, key) -> parameters)."""
    tokens, picture = jnp.zeros((1, 2), jnp.int32), lambda *size: jnp.zeros((1, *size, 3))
    decoder = lambda config, key: language_model(config).init(key)
    yield "decoder", {**_presets(presets), **encoder_presets.GPT2_SIZES, **_presets(chameleon)}, decoder
    yield "decoder", {"deepseek_v3_mtp": presets.deepseek_v3()}, lambda c, key: multi_token_model(c).model.init(key)
    yield (
        "encoder",
        encoder_presets.SIZES | encoder_presets.SPARSE_SIZES,
        lambda c, key: Encoder(c).init(key, tokens)["params"],
    )
    yield "recurrent", recurrent.SIZES, lambda c, key: recurrent.recurrent_language_model(c).init(key)
    yield (
        "vision-language",
        vl.SIZES,
        lambda c, _: maps.nested({path: jnp.zeros(shape) for path, shape in vision_language.shapes(c).items()}),
    )
    yield "vision", vit.SIZES, lambda c, key: vit.ViT(c).init(key, picture(*c.image_size))["params"]
    yield "vision", swin.SIZES, lambda c, key: swin.Swin(c).init(key, picture(32, 32))["params"]
    answer = lambda c, key: sam.SAM(c).init(key, picture(c.image, c.image), sam.prompt(points=jnp.zeros((1, 1, 2))))
    yield (
        "vision",
        {f"sam_{name}": config for name, config in sam.SIZES.items() if name != "tiny"},
        lambda c, key: answer(c, key)["params"],
    )
    named = {f"vq_{name}": config for name, config in vq.SIZES.items() if name != "tiny"}
    yield "vision", named, lambda c, key: vq.VQ(c).init(key, picture(c.size, c.size))["params"]
    yield "density", {"fvsbn_mnist": made.MADEConfig(784, hidden=())}, _density("made", made)
    for name, module in (("nade", nade), ("made", made), ("pixelcnn", pixelcnn)):
        sizes = {f"{name}_{size}": config for size, config in module.SIZES.items() if not size.startswith("tiny")}
        yield "density", sizes, _density(name, module)


def _density(name: str, module: Any) -> Callable:
    def init(config, key):
        deep = name == "nade" and len(config.hidden) > 1
        return getattr(module, "eonade" if deep else name)(config).init(key)

    return init


def _presets(module: Any) -> dict[str, Any]:
    """The configs of published sizes: what its functions give that take changes alone."""
    found = {}
    for name, make in vars(module).items():
        own = inspect.isfunction(make) and make.__module__ == module.__name__
        if own and list(inspect.signature(make).parameters) == ["changes"]:
            found[name] = make()
    return found


def show(name: str = "", *, family: str = "", display: Display | None = None) -> None:
    """Prints the table, or of one network its choices and its parameters by part.

    Raises:
      ValueError: no such network or family.
    """
    display = display or Display()
    if name:
        return _show_one(find(name), display)
    known = list(networks())
    families = sorted({one.family for one in known})
    if family and family not in families:
        raise ValueError(f"no family {family!r}; expected one of {', '.join(families)}")
    rows = []
    for one in known:
        if family in ("", one.family):
            count = one.parameters
            rows.append((one.name, one.family, _short(count), f"{2 * count / 1e9:,.2f}", cache_of(one.config)))
    heading = ("network", "family", "parameters", "GB", "a token's cache")
    display.table("networks with their published sizes, in bfloat16", heading, rows)


def _short(count: int) -> str:
    """671.0 B, 134.5 M, 65.5 k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count}"


def cache_of(config: Any) -> str:
    """What a token takes in a decoder's cache, bfloat16; empty for a network without one."""
    config = getattr(config, "text", config)
    if not isinstance(config, TransformerConfig) or not config.causal or config.linear:
        return ""
    cache = jax.eval_shape(lambda: language_model(dataclasses.replace(config, dtype="bfloat16")).init_cache(1, 1))
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v)))
    return f"{size / 1024:,.1f} KiB"


def find(name: str) -> Network:
    """The network of a name, in which - and . may stand as one types them.

    Raises:
      ValueError: no such network; the message has the nearest name.
    """
    known = list(networks())
    plain = lambda text: re.sub(r"[-_.]", "", text.lower())
    names = [one.name for one in known]
    found = [one for one in known if plain(one.name) == plain(name)]
    if not found:
        near = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.0)[0]
        raise ValueError(f"no network {name!r}; did you mean {near!r}? `jaxrl nets` lists them all")
    return found[0]


def _show_one(one: Network, display: Display) -> None:
    given = dataclasses.asdict(one.config)
    display.table(f"{one.name}: its config", ("choice", "value"), [(k, f"{v}") for k, v in given.items()])
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(one.shapes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append((name, f"{leaf.shape}", f"{math.prod(leaf.shape):,}"))
    display.table(f"{one.parameters:,} parameters", ("parameter", "shape", "numbers"), rows)
