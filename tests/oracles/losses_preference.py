"""Preference losses in float64, pair by pair, each written out from its own paper.

w and lose are log-probs of the chosen and the rejected response (sums over tokens), rw and rl those of the
reference, nw and nl the lengths.
"""

import math


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def dpo(w, lose, rw, rl, nw, nl, b=0.1):
    return -log_sigmoid(b * (w - rw) - b * (lose - rl))


def cdpo(w, lose, rw, rl, nw, nl, b=0.1, e=0.1):
    h = b * ((w - lose) - (rw - rl))
    return -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)


def robust(w, lose, rw, rl, nw, nl, b=0.1, e=0.1):
    right, wrong = dpo(w, lose, rw, rl, nw, nl, b), dpo(lose, w, rl, rw, nl, nw, b)
    return ((1 - e) * right - e * wrong) / (1 - 2 * e)


def ipo(w, lose, rw, rl, nw, nl, tau=0.1):
    h = math.log(math.exp(w - lose) * math.exp(rl - rw))
    return (h - 1 / (2 * tau)) ** 2


def hinge(w, lose, rw, rl, nw, nl, b=0.1):
    return max(0.0, 1 - b * ((w - rw) - (lose - rl)))


def simpo(w, lose, rw, rl, nw, nl, b=2.0, gamma=1.0):
    return -log_sigmoid(b / nw * w - b / nl * lose - gamma)


def orpo(w, lose, rw, rl, nw, nl, lam=0.1):
    def odds(total, n):
        p = math.exp(total / n)
        return p / (1 - p)

    return -w / nw - lam * log_sigmoid(math.log(odds(w, nw) / odds(lose, nl)))


def bco(w, lose, rw, rl, nw, nl, b=0.1, delta=0.0):
    return -log_sigmoid(b * (w - rw) - delta) - log_sigmoid(-(b * (lose - rl) - delta))


def nca(w, lose, rw, rl, nw, nl, b=0.1):
    up, down = b * (w - rw), b * (lose - rl)
    return -log_sigmoid(up) - 0.5 * log_sigmoid(-up) - 0.5 * log_sigmoid(-down)


def sppo(w, lose, rw, rl, nw, nl, eta=1000.0):
    return ((w - rw) - eta * (1 - 0.5)) ** 2 + ((lose - rl) - eta * (0 - 0.5)) ** 2


def apo_zero(w, lose, rw, rl, nw, nl, b=0.1):
    return 1 - sigmoid(b * (w - rw)) + sigmoid(b * (lose - rl))


def apo_down(w, lose, rw, rl, nw, nl, b=0.1):
    return sigmoid(b * (w - rw)) + 1 - sigmoid(b * (w - rw) - b * (lose - rl))


def exo(w, lose, rw, rl, nw, nl, b=0.1, e=1e-3):
    model = [math.exp(b * (w - rw)), math.exp(b * (lose - rl))]
    model = [x / sum(model) for x in model]
    return sum(p * math.log(p / q) for p, q in zip(model, [1 - e, e], strict=True))


ONE_BY_ONE = {
    "dpo": dpo,
    "cdpo": cdpo,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "simpo": simpo,
    "orpo": orpo,
    "bco": bco,
    "nca": nca,
    "sppo": sppo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "exo": exo,
}


def aot(w, lose, rw, rl, nw, nl, b=0.1):
    """Whole batch: sorted margins of the policy against sorted margins of the reference."""
    policy = sorted(x - y for x, y in zip(w, lose, strict=True))
    reference = sorted(x - y for x, y in zip(rw, rl, strict=True))
    return [-log_sigmoid(b * (x - y)) for x, y in zip(policy, reference, strict=True)]


def aot_unpaired(w, lose, rw, rl, nw, nl, b=0.1):
    chosen = sorted(x - y for x, y in zip(w, rw, strict=True))
    rejected = sorted(x - y for x, y in zip(lose, rl, strict=True))
    return [-log_sigmoid(b * (x - y)) for x, y in zip(chosen, rejected, strict=True)]


def family(name, *columns):
    """Values of a batch, as a list."""
    if name in ONE_BY_ONE:
        return [ONE_BY_ONE[name](*row) for row in zip(*columns, strict=True)]
    return {"aot": aot, "aot_unpaired": aot_unpaired}[name](*columns)


def kto(x, desirable, z, b=0.1, wanted=1.0, unwanted=1.0):
    value = wanted * sigmoid(b * (x - z)) if desirable else unwanted * sigmoid(b * (z - x))
    return (wanted if desirable else unwanted) - value
