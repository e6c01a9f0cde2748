"""The table of subjects: what each form is, at every size that the options name."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.bench import options as options_of
from jaxrl.bench import peers
from jaxrl.kernels.attention import Causal, Full, Prefix, attention
from jaxrl.kernels.attention.decode import decode_attention
from jaxrl.kernels.experts import combine, dispatch, sort_by_expert
from jaxrl.kernels.grouped_matmul import grouped_matmul
from jaxrl.kernels.linear_attention import linear_attention
from jaxrl.kernels.log_probs import token_log_probs
from jaxrl.kernels.quantised import FP8, INT8, quantised_grouped_matmul

Arrays = dict[str, jax.Array]

ONLY = {"pallas": "tpu", "splash": "tpu", "cudnn": "gpu", "mosaic_gpu": "gpu"}


class Case(NamedTuple):
    """One size of one subject.

    labels: what tells it from the others, the size last, as {"mask": "causal", "length": 512}.
    draw: makes the arrays, by name.
    wrt: names of the arrays that have gradients; empty where there is no backward pass.
    forms: by name, a function of the arrays, or a `peers.Outside`; ours first.
    """

    labels: dict[str, Any]
    draw: Callable[[], Arrays]
    wrt: tuple[str, ...]
    forms: dict[str, Any]


def cases(subject: str, options: options_of.Bench) -> list[Case]:
    """All sizes of a subject, with the forms that the options name, or all."""
    chosen = getattr(options, "implementations", ())
    made = SUBJECTS[subject](options)
    return [case._replace(forms={name: case.forms[name] for name in chosen or case.forms}) for case in made]


def absent(form: str) -> str | None:
    """Why this machine does not have a form, or None if it does."""
    platform = jax.default_backend()
    if ONLY.get(form, platform) != platform:
        return f"only on {ONLY[form]}"
    if form == "torch" and importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    return None


def dtype_of(options: options_of.Bench) -> str:
    """The dtype that `auto` stands for, or the one named."""
    automatic = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return automatic if options.dtype == "auto" else options.dtype


def _normal(options, **shapes: tuple[int, ...]) -> Arrays:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draws = zip(keys, shapes.items(), strict=True)
    return {name: jax.random.normal(key, shape, dtype_of(options)) for key, (name, shape) in draws}


def _attention(o: options_of.Attention) -> list[Case]:
    return [_attention_case(o, mask, length) for mask in o.masks for length in o.lengths]


def _attention_case(o, name, length) -> Case:
    query = (o.rows, length, o.heads, o.size)
    key = (o.rows, length, o.key_heads or o.heads, o.size)
    causal = name == "causal"
    mask = Causal() if causal else Full()
    ours = lambda form: lambda a: attention(a["q"], a["k"], a["v"], mask=mask, implementation=form)
    forms = {form: ours(form) for form in ("xla", "reference", "pallas", "mosaic_gpu", "cudnn")}
    forms["jax.nn"] = lambda a: jax.nn.dot_product_attention(
        a["q"], a["k"], a["v"], is_causal=causal, implementation="xla"
    )
    forms |= {"splash": functools.partial(peers.splash, causal=causal), "torch": peers.torch_attention(causal)}
    draw = lambda: _normal(o, q=query, k=key, v=key)
    return Case({"mask": name, "length": length}, draw, ("q", "k", "v"), forms)


def _log_probs(o: options_of.LogProbs) -> list[Case]:
    def draw(length):
        arrays = _normal(o, hidden=(o.rows, length, o.size), unembedding=(o.size, o.vocabulary))
        arrays["unembedding"] *= o.size**-0.5
        return arrays | {"targets": jax.random.randint(jax.random.key(1), (o.rows, length), 0, o.vocabulary)}

    form = lambda call: lambda a: call(a["hidden"], a["unembedding"], a["targets"])
    forms = {
        "ours": form(token_log_probs),
        "reference": form(functools.partial(token_log_probs, implementation="reference")),
        "naive": form(peers.naive_log_probs),
    }
    wrt = ("hidden", "unembedding")
    return [Case({"length": length}, functools.partial(draw, length), wrt, forms) for length in o.lengths]


def _decode(o: options_of.Decode) -> list[Case]:
    def draw(length):
        cache = (o.rows, length, o.key_heads or o.heads, o.size)
        arrays = _normal(o, q=(o.rows, 1, o.heads, o.size), k=cache, v=cache)
        pages = o.rows * length // o.page
        table = jax.random.permutation(jax.random.key(1), pages).astype(jnp.int32)
        for name in ("k", "v"):
            whole = arrays[name].reshape(pages, o.page, *cache[2:])
            arrays[f"{name}_pages"] = jnp.zeros_like(whole).at[table].set(whole)
        rows = 2 * jnp.arange(o.rows, dtype=jnp.int32) + 1
        filled = jnp.maximum(length * rows // (2 * o.rows), 1) if o.ragged else jnp.full(o.rows, length, jnp.int32)
        return arrays | {"lengths": filled, "table": table.reshape(o.rows, -1)}

    forms = {
        "dense": lambda a: decode_attention(a["q"], a["k"], a["v"], a["lengths"]),
        "paged": lambda a: decode_attention(a["q"], a["k_pages"], a["v_pages"], a["lengths"], block_table=a["table"]),
        "attention": lambda a: attention(a["q"], a["k"], a["v"], mask=Prefix(a["lengths"])),
        "jax.nn": lambda a: jax.nn.dot_product_attention(a["q"], a["k"], a["v"], key_value_seq_lengths=a["lengths"]),
    }
    return [Case({"length": length}, functools.partial(draw, length), (), forms) for length in o.lengths]


def _linear_attention(o: options_of.LinearAttention) -> list[Case]:
    def draw(length):
        shape = (o.rows, length, o.heads, o.size)
        arrays = _normal(o, q=shape, k=shape, v=shape, decay=shape[:3])
        return arrays | {"decay": -0.1 * jax.nn.softplus(arrays["decay"])}

    forms = {
        "chunked": lambda a: linear_attention(a["q"], a["k"], a["v"]),
        "decayed": lambda a: linear_attention(a["q"], a["k"], a["v"], log_decay=a["decay"]),
        "softmax": lambda a: attention(a["q"], a["k"], a["v"]),
    }
    wrt = ("q", "k", "v", "decay")
    return [Case({"length": length}, functools.partial(draw, length), wrt, forms) for length in o.lengths]


def _grouped_matmul(o: options_of.GroupedMatmul) -> list[Case]:
    def draw(tokens):
        wide, deep = (o.experts, o.width, o.hidden), (o.experts, o.hidden, o.width)
        arrays = _normal(o, x=(tokens, o.width), scores=(tokens, o.experts), gate=wide, up=wide, down=deep)
        for name in ("gate", "up", "down"):
            arrays[name] *= arrays[name].shape[1] ** -0.5
        weights, experts = jax.lax.top_k(jax.nn.softmax(arrays.pop("scores")), o.chosen)
        return arrays | {"weights": weights, "experts": experts}

    def sorted_by_expert(product, a):
        """Rows in the order of their experts: each expert sees its own."""
        routing = sort_by_expert(a["experts"], num_experts=o.experts)
        rows, sizes = dispatch(a["x"], routing), routing.group_sizes
        hidden = jax.nn.silu(product(rows, a["gate"], sizes)) * product(rows, a["up"], sizes)
        return combine(product(hidden, a["down"], sizes), routing, a["weights"])

    products = {
        "tiles": functools.partial(grouped_matmul, implementation="tiles"),
        "ragged_dot": functools.partial(grouped_matmul, implementation="ragged_dot"),
        "int8": functools.partial(quantised_grouped_matmul, scheme=INT8),
        "fp8": functools.partial(quantised_grouped_matmul, scheme=FP8),
    }
    forms: dict[str, Any] = {name: functools.partial(sorted_by_expert, call) for name, call in products.items()}
    forms["dense"] = peers.dense_experts
    wrt = ("x", "weights", "gate", "up", "down")
    return [Case({"tokens": tokens}, functools.partial(draw, tokens), wrt, forms) for tokens in o.tokens]


SUBJECTS: dict[str, Callable[[Any], list[Case]]] = {
    "attention": _attention,
    "log-probs": _log_probs,
    "decode": _decode,
    "linear-attention": _linear_attention,
    "grouped-matmul": _grouped_matmul,
}
