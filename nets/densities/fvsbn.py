"""Fully visible sigmoid belief networks: a logistic regression of every entry on those before it."""

from jaxrl.nets.densities import Density
from jaxrl.nets.densities.made import MADEConfig, made


def fvsbn(size: int, **options) -> Density:
    """logits_i = b_i + sum_{j < i} x_j A_ji, of n (n + 1) / 2 free parameters (Frey 1998; Neal 1992).

    It is a `MADE` without hidden layers. Parameters: output/kernel [n, n], of which the part above the diagonal is
    used, and output/bias [n].

    Args:
      size: n.
      **options: further fields of `MADEConfig`.
    """
    return made(MADEConfig(size, hidden=(), **options))
