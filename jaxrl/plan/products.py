"""FLOPs of a function, from its trace: matrix products and convolutions, as often as its loops run them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def flops(function: Callable, *arguments: Any) -> float:
    """Of one call; nothing is computed, and what no result needs counts too.

    Two for a multiplication and its addition. Of a condition the longest branch counts, of a loop whose rounds the
    data decide one round, of a Pallas kernel its body times its grid.

    Args:
      function: of arrays.
      arguments: arrays or their shapes.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: Any) -> float:
    return sum(_equation(one) for one in jaxpr.eqns)


def _equation(one: Any) -> float:
    name, params = one.primitive.name, one.params
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        shape = one.invars[0].aval.shape
        return 2.0 * math.prod(one.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, places = one.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        return 2.0 * math.prod(one.outvars[0].aval.shape) * math.prod(kernel) / kernel[places[0]]
    inner = [_of(x) for x in _inner(params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    return sum(inner)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Jaxprs in an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr | Jaxpr):
                yield one.jaxpr if isinstance(one, ClosedJaxpr) else one
