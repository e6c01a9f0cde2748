"""Adapters in runs: what is trained, moved and checkpointed is the adapter; the frozen base stands beside the state.

    recipe = over(lambda model: sft.make(config, model, optimizer), model, adapter)
    state = recipe.init(key, base)                   # Over(base, TrainState of the adapter)
    state, metrics = recipe.step(state, data)        # as without an adapter
    whole(state)                                     # parameters of carried(model, adapter), to evaluate with

The base is an argument of every program, never a constant of one, and no program gives out a second copy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.nets import adapters
from jaxrl.nets.adapters import Adapter
from jaxrl.nets.language_model import LanguageModel
from jaxrl.posttrain import update

_RANKED = ("rank", "alpha", "targets")
KINDS = {
    "none": (),
    "lora": (*_RANKED, "scaling"),
    "dora": (*_RANKED, "scaling"),
    "adalora": _RANKED,
    "bottleneck": ("width", "targets"),
    "prompt": ("length",),
    "p_tuning": ("length", "hidden"),
    "prefix": ("length", "hidden"),
}
"""Kind of adapter -> the options that it has."""


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """What is trained beside a frozen base, in the place of all parameters; docs/adapters.md explains the kinds."""

    kind: str = "none"
    """none (all parameters are trained), lora, dora, adalora, bottleneck, prompt, p_tuning or prefix."""
    rank: int = 8
    """Of lora, dora and adalora (its mean at the end; it begins with half as much again)."""
    alpha: float = 16.0
    """Of lora, dora and adalora: the product is weighed by alpha / rank."""
    targets: str = ""
    """Of lora, dora, adalora and bottleneck: layers with commas between them, such as q,v, of q, k, v, o, gate, up and
    down; empty takes all (bottleneck: o,down)."""
    scaling: str = "standard"
    """Of lora and dora: standard, or rank_stabilised: alpha / sqrt(rank)."""
    width: int = 64
    """Inner width of a bottleneck."""
    length: int = 16
    """Tokens of a prompt or prefix."""
    hidden: int = 128
    """Width of the network that makes a prefix or the prompt of p_tuning; 0, for a prefix only, is none."""
    base: str = "float32"
    """How the frozen base is kept: float32 (as it is), int8 or nf4 (QLoRA)."""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"adapter kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.base not in ("float32", "int8", "nf4"):
            raise ValueError(f"adapter base is {self.base!r}; expected float32, int8 or nf4")
        own = ("kind", *KINDS[self.kind], *(("base",) if self.kind != "none" else ()))
        for field in dataclasses.fields(self):
            if field.name not in own and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"adapter {field.name} is {getattr(self, field.name)!r}, which kind {self.kind} does not have; "
                    f"it has {', '.join(own[1:]) or 'no options: choose another kind'}"
                )
        self.build()

    def config(self, updates: int = 1000) -> Any:
        """The config of `nets.adapters`; AdaLoRA's budget falls over so many updates."""
        named: dict[str, Any] = {}
        if self.targets:
            named["targets"] = tuple(name.strip() for name in self.targets.split(","))
        if self.kind in ("lora", "dora"):
            ranks = {"rank": self.rank, "alpha": self.alpha, "scaling": self.scaling}
            return adapters.LoRAConfig(**ranks, magnitude=self.kind == "dora", **named)
        if self.kind == "adalora":
            start, tenth = self.rank + self.rank // 2, updates // 10
            times = {"steps": updates, "warmup": tenth, "final": 3 * tenth, "every": max(updates // 100, 1)}
            return adapters.AdaLoRAConfig(rank=start, target_rank=self.rank, alpha=self.alpha, **times, **named)
        if self.kind == "bottleneck":
            return adapters.BottleneckConfig(width=self.width, **named)
        if self.kind == "prefix":
            return adapters.PrefixConfig(length=self.length, hidden=self.hidden)
        encoder = {"encoder": "mlp", "hidden": self.hidden} if self.kind == "p_tuning" else {}
        return adapters.PromptConfig(length=self.length, **encoder)

    def build(self) -> Adapter | None:
        """The adapter; None where all parameters are trained."""
        makers = {"lora": adapters.lora, "dora": adapters.lora, "adalora": adapters.adalora, "prefix": adapters.prefix}
        makers |= {"bottleneck": adapters.bottleneck}
        return None if self.kind == "none" else makers.get(self.kind, adapters.prompt)(self.config())

    def optimizer(self, inner: Any, *, updates: int) -> Any:
        """The optimizer of a run of so many updates: `inner`, or what AdaLoRA makes of it."""
        return adapters.allocate(self.config(updates), inner) if self.kind == "adalora" else inner

    def refuse_heads(self, what: str) -> None:
        """Raises ValueError where a head beside the adapter cannot be trained, as `what` has one."""
        if self.kind == "adalora":
            raise ValueError(
                f"adapter kind is adalora, which ranks all that is trained, and {what} has a head; take lora"
            )

    def frozen(self, params: Any) -> Any:
        """The base as it is kept, of a model's parameters."""
        return params if self.base == "float32" else adapters.quantise_base(params, form=self.base)


@flax.struct.dataclass
class Over:
    """A run over a frozen base: its parameters, and the adapter's state, which alone is trained and checkpointed."""

    base: Any
    state: update.TrainState

    @property
    def params(self) -> Any:
        """The adapter's."""
        return self.state.params

    @property
    def step(self) -> jax.Array:
        """Iterations done."""
        return self.state.step

    @property
    def skipped_in_a_row(self) -> jax.Array:
        """As in `TrainState`."""
        return self.state.skipped_in_a_row


def carried(model: LanguageModel, adapter: Adapter) -> LanguageModel:
    """An adapted model whose parameters are {"base": ..., "adapter": ...}; with None for an adapter it is the base.

    Any function of a model and its parameters takes them, and holds the base as an argument.
    """

    def init(key):
        first, second = jax.random.split(key)
        base = model.init(first)
        return {"base": base, "adapter": adapter.init(second, model, base)}

    def apply(params, tokens, **options):
        base, own = params["base"], params["adapter"]
        if own is None:
            return model.apply(base, tokens, **options)
        return adapters.adapt(model, base, adapter).apply(own, tokens, **options)

    empty = adapters.adapt(model, None, adapter).init_cache
    unembedding = lambda params: model.unembedding(params["base"])
    return model._replace(init=init, apply=apply, unembedding=unembedding, init_cache=empty)


def join(base: Any, params: Any) -> Any:
    """Parameters for `carried` from the base's and a run's; a reward model's keep their head."""
    if isinstance(params, dict) and set(params) == {"model", "head"}:
        return {"model": join(base, params["model"]), "head": params["head"]}
    return {"base": base, "adapter": params}


def whole(state: Any) -> Any:
    """Parameters to evaluate a run's state with: its own, or joined with those of its base."""
    return join(state.base, state.params) if isinstance(state, Over) else state.params


def trained(state: Any) -> Any:
    """What a checkpoint holds of a run's state: all but the base."""
    return state.state if isinstance(state, Over) else state


def over(make: Callable, model: LanguageModel, adapter: Adapter, *, moving_reference: bool = False) -> Any:
    """A recipe's functions over a frozen base: those of a state take and give `Over` in its place.

    The reference of a KL is the base without the adapter, of which there is no copy. Where the reference moves, it
    begins as the adapter of the start and is a copy of an adapter.

    Args:
      make: from a model to a NamedTuple of pure functions, `init(key, params, ...) -> state` among them, such as
        `lambda model: grpo.make(config, model, optimizer, ...)`.
      model: the base's functions.
      adapter: from `nets.adapters`.
      moving_reference: whether the recipe changes `state.reference`.

    Returns:
      That tuple, with `init(key, base, ...) -> Over`; `sample`, `learn` and `step` of `(Over, ...)`; and any others
      as `make(carried(model, adapter))` has them.
    """
    of_both = carried(model, adapter)

    def on(base):
        """The recipe's functions with this base put in: the parameters are the adapter's alone."""

        def apply(params, *args, **options):
            return of_both.apply({"base": base, "adapter": params}, *args, **options)

        start = lambda key: adapter.init(key, model, base)
        return make(of_both._replace(init=start, apply=apply, unembedding=lambda params: model.unembedding(base)))

    def init(key, base, *args, **options):
        params = adapter.init(jax.random.fold_in(key, (1 << 30) + 2), model, base)
        state = on(base).init(key, params, *args, **options)
        return Over(base, state if moving_reference else dataclasses.replace(state, reference=None))

    def lifted(name):
        def function(given: Over, *rest):
            result = getattr(on(given.base), name)(given.state, *rest)
            is_state = lambda x: isinstance(x, update.TrainState)
            return jax.tree.map(lambda x: Over(given.base, x) if is_state(x) else x, result, is_leaf=is_state)

        return function

    recipe = make(of_both)
    names = [name for name in ("sample", "learn", "step") if name in recipe._fields]
    return recipe._replace(init=init, **{name: lifted(name) for name in names})


def fingerprint(params: Any) -> int:
    """A number that changes when a bit of the parameters does: the sum of their bits as integers, modulo 2^32."""

    @jax.jit
    def total(tree):
        bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        places = lambda x: jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) * 2 + 1  # an exchange of two shows, too
        return sum((bits(x) * places(x)).sum(dtype=jnp.uint32) for x in jax.tree.leaves(tree))

    return int(total(params))
