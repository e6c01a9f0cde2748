"""AdaLoRA: budget, importance, penalty and the choice of what stays, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.nets import adapters
from jaxrl.nets.adapters import adaptive_rank
from jaxrl.nets.adapters.adapted import get
from tests.nets import adapter_cases as cases
from tests.oracles import adapters as oracle

CONFIG = adapters.AdaLoRAConfig(
    rank=4, target_rank=2, alpha=6, steps=14, warmup=2, final=4, every=3, orthogonality=0.3, targets=("q", "down")
)
PATHS = ["layers/attention/q", "layers/ffn/down"]


def made():
    _, model, base = cases.network()
    adapter = adapters.adalora(CONFIG)
    return model, base, adapter, adapter.init(jax.random.key(0), model, base)


def triplets(tree):
    """(P, E, Q) of each kernel, layer by layer, in the order of the paths."""
    return [tuple(cases.layer(tree, f"{path}/{part}", n) for part in "peq") for path in PATHS for n in range(2)]


def test_at_the_start_the_model_is_the_base_and_merged_is_the_paper():
    model, base, adapter, start = made()
    got = cases.forward(model, adapter)(base, start, cases.tokens())
    np.testing.assert_array_equal(got, jax.jit(model.apply)(base, cases.tokens())[0])
    params = cases.stirred(start)
    merged = adapters.merge(base, params, adapter).params
    for path in PATHS:
        for n in range(2):
            p, e, q = (cases.layer(params, f"{path}/{part}", n) for part in "peq")
            expected = cases.layer(base, f"{path}/kernel", n) + 6 / 4 * p @ np.diag(e) @ q
            np.testing.assert_allclose(cases.layer(merged, f"{path}/kernel", n), expected, atol=1e-5)
    got = cases.forward(model, adapter)(base, params, cases.tokens())
    np.testing.assert_allclose(got, model.apply(merged, cases.tokens())[0], atol=2e-5)


def test_budget_is_the_papers():
    sizes = {"warmup": CONFIG.warmup, "final": CONFIG.final, "steps": CONFIG.steps}
    for step in range(16):
        got = adaptive_rank.budget(CONFIG, jnp.int32(step), kernels=4)
        assert got == oracle.budget(step, first=16, last=8, **sizes), step
    long = adapters.AdaLoRAConfig(rank=12, target_rank=8, steps=1000, warmup=100, final=300)
    values = [int(adaptive_rank.budget(long, step, kernels=7)) for step in (0, 100, 101, 400, 700, 999)]
    assert values == [84, 84, oracle.budget(101, first=84, last=56, warmup=100, final=300, steps=1000), 59, 56, 56]


def test_penalty_and_its_gradient():
    *_, start = made()
    params = cases.stirred(start, std=0.3)
    np.testing.assert_allclose(adaptive_rank.orthogonality(params), oracle.orthogonality(triplets(params)), rtol=1e-5)
    gradient = jax.grad(adaptive_rank.orthogonality)(params)
    p = cases.layer(params, "layers/ffn/down/p", 1)
    np.testing.assert_allclose(gradient["layers"]["ffn"]["down"]["p"][1], 4 * p @ (p.T @ p - np.eye(4)), rtol=1e-4)
    assert not np.asarray(gradient["layers"]["ffn"]["down"]["e"]).any()


def test_steps_against_loops():
    """Fourteen updates by SGD with random gradients: parameters, scores and what stays follow the algorithm."""
    *_, start = made()
    params = cases.stirred(start, std=0.3)
    optimizer = adapters.allocate(CONFIG, optax.sgd(0.05))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    watched = [
        oracle.Importance(*part, CONFIG.sensitivity_decay, CONFIG.uncertainty_decay) for part in triplets(params)
    ]
    kept = np.ones(16, bool)
    zeroed = []
    for step in range(1, 15):
        gradient = cases.stirred(jax.tree.map(jnp.zeros_like, params), seed=step, std=1.0)
        before, raw = triplets(params), triplets(gradient)
        full = []
        for (p, _, q), (gp, ge, gq) in zip(before, raw, strict=True):
            eye = np.eye(4)
            full.append((gp + 0.3 * 4 * p @ (p.T @ p - eye), ge, gq + 0.3 * 4 * (q @ q.T - eye) @ q))
        scores = np.concatenate([w.update(v, g) for w, v, g in zip(watched, before, full, strict=True)])
        if (2 < step < 10 and step % 3 == 0) or step == 10:
            left = oracle.budget(step, first=16, last=8, warmup=2, final=4, steps=14)
            kept = np.zeros(16, bool)
            kept[np.argsort(-scores, kind="stable")[:left]] = True
            masks = True
        else:
            masks = step > 10
        expected = [tuple(w - 0.05 * g for w, g in zip(v, g, strict=True)) for v, g in zip(before, full, strict=True)]
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for n, (got, want) in enumerate(zip(triplets(params), expected, strict=True)):
            p, e, q = want
            e = np.where(kept[4 * n : 4 * n + 4], e, 0.0) if masks else e
            for a, b in zip(got, (p, e, q), strict=True):
                np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4, err_msg=f"step {step}, kernel {n}")
        zeroed.append(int(sum((e == 0).sum() for _, e, _ in triplets(params))))
    assert zeroed[-5:] == [8] * 5 and zeroed[2] == 3 and zeroed[:2] == [0, 0]
    assert zeroed[3] == 0  # between two choices what was cut may grow again
    assert int(state.count) == 14


def test_ties_leave_exactly_the_budget():
    scores = {"a": jnp.zeros((2, 3)), "b": jnp.asarray([[1.0, 0.0]])}
    kept = adaptive_rank.most_important(scores, jnp.int32(4))
    np.testing.assert_array_equal(kept["a"], [[True, True, True], [False, False, False]])
    np.testing.assert_array_equal(kept["b"], [[True, False]])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="target_rank is 5; expected 1 to the rank at the start, 4"):
        adapters.AdaLoRAConfig(rank=4, target_rank=5)
    with pytest.raises(ValueError, match="warmup is 10, final 10"):
        adapters.AdaLoRAConfig(steps=20, warmup=10, final=10)
    assert get({"a": {"b": 1}}, "a/b") == 1
