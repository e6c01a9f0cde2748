"""What the tests of vision networks share: golden files, and the comparison with torch."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.nets.weights.maps import from_checkpoint, nested, shapes, to_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
quick = functools.partial(jax.jit, compiler_options=QUICK)


def golden(file):
    """(weights, cases {name: arrays}) of a file; what was stored as float16 is float32 here."""
    weights, cases = {}, {}
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        for key, value in arrays.items():
            case, name = key.split("/", 1)
            value = value.astype(np.float32) if value.dtype == np.float16 else value
            (weights if case == "weight" else cases.setdefault(case, {}))[name] = value
    return weights, cases


def parameters(module, names, weights, image_size):
    """Our parameters from a golden file's weights."""
    found = from_checkpoint(names, shapes(module, jnp.zeros((1, *image_size, 3))), weights)
    return jax.tree.map(jnp.asarray, found)


def random_params(module, *args, seed=3):
    """Parameters none of which is 0 or 1 by initialisation."""
    draw = np.random.default_rng(seed)
    centre = lambda path: 1.0 if path.endswith("scale") else 0.0
    drawn = {path: draw.normal(centre(path), 0.3, shape) for path, shape in shapes(module, *args).items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), nested(drawn))


def close(got, want, error=1e-5):
    """Equal to `error` of the largest value."""
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=error * np.abs(want).max())


def gradients_close(ours, theirs):
    """Gradients by checkpoint names are the same, to 1e-5 of the network's largest."""
    assert ours.keys() == theirs.keys()
    scale = max(np.abs(want).max() for want in theirs.values())
    for name, want in theirs.items():
        np.testing.assert_allclose(ours[name], want, rtol=1e-3, atol=1e-5 * scale, err_msg=name)


def gradients_equal(module, names, params, case, error=1e-4):
    """Logits, mean cross-entropy and its gradients of a case are torch's, gradients to `error`."""

    def loss(params, images):
        logits = module.apply({"params": params}, images)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), case["labels"][:, None], axis=-1)
        return -picked.mean(), logits

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, logits), (d_params, d_images) = both(params, jnp.asarray(case["images"]))
    close(logits, case["logits"])
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    close(d_images, case["d_images"], error)
    theirs = {k.removeprefix("grad/"): v for k, v in case.items() if k.startswith("grad/")}
    ours = to_checkpoint(names, d_params)
    assert not theirs or ours.keys() == theirs.keys()
    scale = max((np.abs(want).max() for want in theirs.values()), default=1.0)
    for name, want in theirs.items():
        # keys' biases have no gradient: what is there is rounding
        atol = error * max(np.abs(want).max(), 1e-3 * scale)
        np.testing.assert_allclose(ours[name], want, rtol=error, atol=atol, err_msg=name)
