"""An adapter and the model that it makes: a LanguageModel whose parameters are the adapter's alone."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.nets.language_model import LanguageModel

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear maps of a decoder layer."""


class Adapter(NamedTuple):
    """What is trained beside a frozen base, as pure functions.

    init(key, model, base) -> params: a plain nested dict; consumes the key. Of the base only shapes matter, but where
      the adapter's description says otherwise.
    ready(model, base, params) -> what the layers read, small beside the base: computed once in a forward pass, and
      once in a whole rollout.
    graft(base, ready) -> the base's tree with that in it. It computes nothing and copies nothing.
    shift: how many positions the tokens move to the right.
    merges: whether base and adapter are again a base (`merge`).
    """

    init: Callable
    ready: Callable
    graft: Callable
    shift: int = 0
    merges: bool = False


class AdaptedCache(NamedTuple):
    """A model's cache, and what the layers read of the adapter once it has been computed.

    k, v, length: the model's. rest: its cache without them. ready: None before the first call. A cache belongs to the
    parameters of its first call.
    """

    k: Any
    v: Any
    length: jax.Array
    rest: Any
    ready: Any


class Based(NamedTuple):
    """The data of a step and the frozen base that it needs."""

    base: Any
    data: Any


def adapt(model: LanguageModel, base: Any, adapter: Adapter) -> LanguageModel:
    """The base with an adapter, as a model whose parameters are the adapter's.

    Losses and trainers take it like any other: gradients, optimizer state, checkpoints and the reference of a KL are
    of the adapter's size. An array that a jitted function closes over becomes a constant in the program: under `jit`
    let the base be an argument, and call `adapt` inside (`over_base` does).

    Args:
      model: the base's functions.
      base: its parameters; where only `init` is called, shapes are enough.
      adapter: from `lora`, `adalora`, `prompt`, `prefix` or `bottleneck`.
    """

    def init(key):
        return adapter.init(key, model, base)

    def apply(params, tokens, *, positions=None, mask=None, cache=None, **options):
        ready = None if cache is None else cache.ready
        ready = adapter.ready(model, base, params) if ready is None else ready
        if adapter.shift:
            columns = jnp.arange(tokens.shape[1]) + (0 if cache is None else cache.length)
            positions = jnp.broadcast_to(columns[None], tokens.shape[:2]) if positions is None else positions
            positions = positions + adapter.shift
        inner = None if cache is None else cache.rest._replace(k=cache.k, v=cache.v, length=cache.length)
        tree = adapter.graft(base, ready)
        hidden, inner = model.apply(tree, tokens, positions=positions, mask=mask, cache=inner, **options)
        return hidden, None if inner is None else _wrapped(inner, ready)

    def empty(*args, **options):
        return _wrapped(model.init_cache(*args, **options), None)

    return model._replace(init=init, apply=apply, unembedding=lambda params: model.unembedding(base), init_cache=empty)


def over_base(build: Callable, model: LanguageModel, adapter: Adapter) -> Callable:
    """A trainer's function that takes the base with its data, and so holds it once, whatever compiles it.

    Args:
      build: from an adapted model to the trainer's function of `(state, data, ...)`, such as
        `lambda model: sft.make(config, model, optimizer).step`.
      model, adapter: as in `adapt`.

    Returns:
      `(state, Based(base, data), ...)` -> what the built function returns.
    """

    def function(state, given: Based, *rest):
        return build(adapt(model, given.base, adapter))(state, given.data, *rest)

    return function


def bind(function: Callable, base: Any) -> Callable:
    """`(state, data, ...)` of a compiled function of `over_base`, with the base put in: for code outside of `jit`."""
    return lambda state, data, *rest: function(state, Based(base, data), *rest)


def kernels(base: Any, targets: tuple[str, ...], *, who: str) -> dict[str, Any]:
    """Path of a layer, such as layers/attention/q -> its kernel, for all layers named by `targets`.

    Raises:
      ValueError: a name that no linear layer has.
    """
    found = {path: node["kernel"] for path, node in _layers(base) if path != "unembed"}
    names = sorted({path.rpartition("/")[2] for path in found})
    unknown = [name for name in targets if name not in names]
    if unknown or not targets:
        raise ValueError(f"{who}: targets are {targets}, expected some of the linear layers {', '.join(names)}")
    return {path: kernel for path, kernel in found.items() if path.rpartition("/")[2] in targets}


def drawn(key: jax.Array, found: dict[str, Any], draw: Callable) -> dict:
    """Parameters under the layers' paths: `draw(key, kernel)` of each layer that `kernels` found."""
    keys = jax.random.split(key, len(found))
    return put({}, {path: draw(key, kernel) for key, (path, kernel) in zip(keys, found.items(), strict=True)})


def put(tree: Any, values: dict[str, Any]) -> dict:
    """A nested dict with other values at some paths, such as layers/attention/q/kernel; dicts on the way are new."""
    tree = dict(tree)
    for path, value in values.items():
        first, _, rest = path.partition("/")
        if rest:
            tree[first] = put(tree.get(first, {}), {rest: value})
        else:
            tree[first] = value
    return tree


def get(tree: Any, path: str) -> Any:
    """The value at a path of a nested dict."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _layers(tree: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    if not isinstance(tree, dict):
        return
    if "kernel" in tree:
        yield path, tree
    for name, node in tree.items():
        yield from _layers(node, f"{path}/{name}" if path else name)


def _wrapped(cache: Any, ready: Any) -> AdaptedCache:
    rest = cache._replace(k=None, v=None, length=None)
    return AdaptedCache(cache.k, cache.v, cache.length, rest, ready)
