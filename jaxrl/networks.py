"""`jaxrl nets`: every network of the library with its published sizes, counted from shapes."""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxrl.display import Display
from jaxrl.nets import presets
from jaxrl.nets.config import TransformerConfig
from jaxrl.nets.language_model import language_model


class Network(NamedTuple):
    """A network of one size. family: what kind. config: its config. shapes: of its parameters, nothing allocated."""

    name: str
    family: str
    config: Any
    shapes: Callable[[], Any]

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.shapes()))


def networks() -> Iterator[Network]:
    """All of them, decoders first."""
    for name, make in vars(presets).items():
        if inspect.isfunction(make) and make.__module__ == presets.__name__ and list(signature(make)) == ["changes"]:
            yield _decoder(name, make())


def signature(function: Callable) -> Any:
    """Its parameters by name; a preset of a published size has changes alone."""
    return inspect.signature(function).parameters


def _decoder(name: str, config: TransformerConfig) -> Network:
    return Network(name, "decoder", config, lambda: jax.eval_shape(language_model(config).init, jax.random.key(0)))


def show(name: str = "", *, family: str = "", display: Display | None = None) -> None:
    """Prints the table, or of one network its choices and its parameters by part.

    Raises:
      ValueError: no such network or family.
    """
    display, known = display or Display(), list(networks())
    if name:
        return _show_one(_named(name, known), display)
    families = sorted({one.family for one in known})
    if family and family not in families:
        raise ValueError(f"no family {family!r}; expected one of {', '.join(families)}")
    rows = []
    for one in known:
        if family in ("", one.family):
            count = one.parameters
            rows.append((one.name, one.family, f"{count:,}", f"{2 * count / 1e9:,.2f}", cache_of(one.config)))
    heading = ("network", "family", "parameters", "GB", "a token's cache")
    display.table("networks with their published sizes, in bfloat16", heading, rows)


def cache_of(config: Any) -> str:
    """What a token takes in a decoder's cache, bfloat16; empty for a network without one."""
    if not isinstance(config, TransformerConfig) or not config.causal:
        return ""
    cache = jax.eval_shape(lambda: language_model(dataclasses.replace(config, dtype="bfloat16")).init_cache(1, 1))
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v)))
    return f"{size / 1024:,.1f} KiB"


def _named(name: str, known: list[Network]) -> Network:
    names = [one.name for one in known]
    plain = name.replace("-", "_").replace(".", "")
    if plain not in names:
        near = difflib.get_close_matches(plain, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"no network {name!r}; did you mean {near!r}? `jaxrl nets` lists them all")
    return known[names.index(plain)]


def _show_one(one: Network, display: Display) -> None:
    given = dataclasses.asdict(one.config)
    display.table(f"{one.name}: its config", ("choice", "value"), [(k, f"{v}") for k, v in given.items()])
    rows, total = [], one.parameters
    for path, leaf in jax.tree_util.tree_leaves_with_path(one.shapes()):
        count = math.prod(leaf.shape)
        rows.append((jax.tree_util.keystr(path, simple=True, separator="/"), f"{leaf.shape}", f"{count:,}"))
    display.table(f"{total:,} parameters", ("parameter", "shape", "numbers"), rows)
