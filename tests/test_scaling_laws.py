"""DeepSeek LLM's laws against the sizes they published, counted FLOPs, and fits of known generators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import scaling_laws as laws
from jaxrl.nets.transformer import Transformer, TransformerConfig
from jaxrl.posttrain.update import OptimizerConfig, learning_rate, multi_step

PUBLISHED = {  # layers, width, sequences of 4096 a step, learning rate (repository of DeepSeek LLM)
    "7B": (30, 4096, 2304, 4.2e-4),
    "67B": (95, 8192, 4608, 3.2e-4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_laws_give_the_published_settings(name):
    layers, width, batch, rate = PUBLISHED[name]
    c = laws.compute(layers, width, 4096, 2e12)
    assert laws.learning_rate(c) == pytest.approx(rate, rel=0.12)
    assert laws.batch_tokens(c) == pytest.approx(batch * 4096, rel=0.12)
    split = laws.best_split(c)
    assert split.flops_per_token * split.tokens == pytest.approx(c, rel=2e-3)


def test_flops_are_those_that_the_compiler_counts():
    """One layer with 12 width^2 weights, forward: a third of M, and what is not a product besides."""
    width, length = 96, 64
    config = TransformerConfig(
        8, width, 1, 4, 4, 8 * width // 3, causal=False, attention="reference", remat="none", norm_place="pre"
    )
    net = Transformer(config)
    x = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    compiled = jax.jit(lambda p, x: net.apply(p, x)[0]).lower(params, x).compile()
    counted = compiled.cost_analysis()["flops"]  # pyright: ignore
    expected = laws.flops_per_token(1, width, length) * length / 3
    assert expected < counted < 1.15 * expected


def test_multi_step_schedule():
    rate = learning_rate(
        OptimizerConfig(learning_rate=4.2e-4, warmup_steps=2000, decay="multi_step", decay_steps=10_000)
    )
    at = {0: 0.0, 1000: 0.5, 2000: 1.0, 7999: 1.0, 8000: 0.316, 8999: 0.316, 9000: 0.1, 50_000: 0.1}
    for step, share in at.items():
        assert float(rate(step)) == pytest.approx(share * 4.2e-4, rel=1e-5, abs=1e-12), step
    assert float(multi_step(1.0, 100)(79)) == 1.0 and float(multi_step(1.0, 100)(80)) == pytest.approx(0.316)
    with pytest.raises(ValueError, match="100 updates, of which 90 are the warm-up"):
        multi_step(1.0, 100, start=90)


def surface(size, tokens):
    """A loss of the form A N^-a + B D^-b (Hoffmann et al., approach 3): the best N grows as C^(b / (a + b))."""
    return 1.69 + 406.4 * size**-0.34 + 410.7 * tokens**-0.28


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_isoflop_fit_recovers_a_generator(noise):
    rng = np.random.default_rng(0)
    budgets = np.repeat(np.logspace(18, 21, 7), 9)
    a, b = 0.34, 0.28
    best = (a * 406.4 / (b * 410.7)) ** (1 / (a + b)) * budgets ** (b / (a + b))  # with C = N D
    sizes = best * np.tile(np.logspace(-0.5, 0.5, 9), 7)
    losses = surface(sizes, budgets / sizes) * (1 + noise * rng.normal(size=sizes.shape))
    found = laws.fit_isoflop(budgets, sizes, losses)
    assert found.model.exponent == pytest.approx(b / (a + b), abs=0.02)
    assert found.tokens.exponent == pytest.approx(a / (a + b), abs=0.02)
    assert found.model.r_squared > 0.99 and all(minimum.inside for minimum in found.minima)
    assert found.model.low <= found.model.exponent <= found.model.high
    assert found.model(budgets[0]) == pytest.approx(best[0], rel=0.1)


def test_huber_fit_bears_an_outlier_and_tells_its_doubt():
    rng, x = np.random.default_rng(1), np.logspace(0, 6, 25)
    y = 3.0 * x**-0.4 * np.exp(2e-3 * rng.normal(size=25))
    y[-1] *= 5
    found = laws.fit_power_law(x, y)
    assert found.exponent == pytest.approx(-0.4, abs=2e-3) and found.factor == pytest.approx(3.0, rel=0.02)
    assert abs(np.polyfit(np.log(x), np.log(y), 1)[0] + 0.4) > 0.01  # least squares does not
    assert found.low < -0.4 < found.high < 0 and found.r_squared < 0.99
    exact = laws.fit_power_law(x, 3.0 * x**-0.4)
    assert exact.r_squared == pytest.approx(1.0) and exact.low == pytest.approx(exact.high, abs=1e-9)
    flat = laws.fit_power_law(x, np.full(25, 2.0))
    assert flat.exponent == pytest.approx(0, abs=1e-12) and flat.r_squared == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: laws.fit_power_law([1.0], [1.0]), "two or more positive"),
        (lambda: laws.fit_power_law([1.0, 1.0], [1.0, 2.0]), "different x"),
        (lambda: laws.fit_power_law([1.0, -2.0], [1.0, 2.0]), "positive"),
        (lambda: laws.fit_power_law([1.0, 2.0], [1.0, np.nan]), "positive"),
        (lambda: laws.parabola_minimum([1.0, 2.0], [1.0, 2.0]), "three different"),
        (lambda: laws.parabola_minimum([1.0, 2.0, 4.0], [1.0, 2.0, 1.0]), "no minimum"),
        (lambda: laws.fit_isoflop([1.0, 1.0], [1.0, 2.0], [1.0, 1.0]), "budgets"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
