"""Where adapters and quantised bases lie on a mesh: rules for `jaxrl.parallel`, to stand before its own.

    parallel.state_shardings(state, mesh, rules=(*adapters.RULES, *parallel.RULES))

Every part lies as the kernel's axis that it shares; ranks, bottlenecks and prompts are small and whole everywhere.
"""

_AXES = {  # layer -> logical axes of its inputs and outputs, as in `parallel.RULES`
    "attention/[qkv]": ("embed", "heads"),
    "attention/o": ("heads", "embed"),
    "(ffn|moe/shared)/(gate|up)": ("embed", "ffn"),
    "(ffn|moe/shared)/down": ("ffn", "embed"),
}


def _of_layer(layer: str, rows: str, columns: str) -> list[tuple[str, tuple[str | None, ...]]]:
    path = f"layers/{layer}"
    bottleneck = [("down", (columns, None)), ("down_bias", (None,)), ("up", (None, columns)), ("up_bias", (columns,))]
    low_rank = [("[ap]", (rows, None)), ("[bq]", (None, columns)), ("m", (columns,)), ("e", (None,))]
    int8 = [("kernel/values", (rows, columns)), ("kernel/scales", (None, columns))]
    nf4 = [
        ("kernel/codes", (rows, columns)),
        ("kernel/absmax/values", (None, columns)),
        ("kernel/absmax/scales", (None, None)),
        ("kernel/mean", (None, None)),
    ]
    rules = [(f"{path}/{part}", ("layer", *axes)) for part, axes in bottleneck + low_rank + int8 + nf4]
    return [*rules, (f"kept/{path}", ("layer", None))]


RULES = (
    *(rule for layer, axes in _AXES.items() for rule in _of_layer(layer, *axes)),
    (r"[kv]", ("layer", None, None, None)),
    (r"(?<!embed/)embedding", (None, None)),
    (r"encoder/.*(kernel|input|memory)", (None, None)),
    (r"encoder/.*bias", (None,)),
)
