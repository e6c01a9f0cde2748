"""How far networks are from their references: python benchmarks/nets/parity.py writes parity.json and parity.md

The tests that compare with torch run as they are, and what they compare is measured instead of judged: every array that
`np.testing.assert_allclose` is given there. Golden values that are gradients are known by their bytes. Networks whose
weights are a package that is not installed are left out.
"""

import ast
import functools
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
ROUNDING = 1e-5  # gradients this small beside the network's largest one are 0 but for rounding, like a key's bias
HEAD = """# How far networks are from their references

The largest |ours - theirs| of an array over its largest |theirs|, and the worst of a network's arrays. Golden values of
tiny random networks, of the published weights for minilm and smollm2 where they are installed; float32 on a CPU,
compiled as tests are. Losses are left to the tests. A gradient that is 0 but for rounding, as that of a key's bias, is
compared with the largest gradient of its network. In brackets: how many tensors; those of swinv2 are float64's, as its
sharp cosine attention amplifies rounding: torch's own in float32 are 1.4e-4 away. What stands against vqgan is written
in torch beside its values: transformers has no decoder of pictures. llada's reference is transformers' Llama with
nothing masked, dit's the authors' class of BD3-LM, phi3's a Llama of ours whose heads turn in part. switch and
moe_layers, those of the five mixtures above, are layers alone, balance losses among their gradients. Written by
`python benchmarks/nets/parity.py`.

| network | reference | cases | largest error of outputs | of gradients |
|---|---|---|---|---|
"""
NETWORKS = {  # and the script in tests/golden that wrote the values
    "make_transformers": ("llama", "qwen2", "qwen3", "mistral", "phi3"),
    "make_networks": ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "moonlight"),
    "make_linear": ("minimax", "minimax_odd"),
    "make_llada": ("llada",),
    "make_dit": ("dit",),
    "make_chameleon": ("chameleon",),
    "make_vision_language": ("qwen2_vl", "qwen25_vl", "kimi_vl"),
    "make_encoders": ("bert", "roberta", "albert", "electra", "distilbert", "minilm", "gpt2"),
    "make_smollm2": ("smollm2",),
    "make_vision": ("vit", "swin", "swinv2", "vqgan"),
    "make_sam": ("sam",),
    "make_recurrent": ("rnn", "lstm", "gru"),
    "make_moe": ("switch", "moe_layers"),
}
SCRIPT = {network: script for script, networks in NETWORKS.items() for network in networks}
TESTS = {  # and the network of the tests in it that name none
    "nets/test_golden.py": "phi3",
    "nets/test_folders.py": "vqgan",
    "nets/test_llada.py": "llada",
    "nets/test_dit.py": "dit",
    "nets/test_chameleon.py": "chameleon",
    "nets/test_vision_language.py": "qwen2_vl",
    "nets/test_encoder.py": "bert",
    "test_embed.py": "minilm",
    "test_pretrained.py": "smollm2",
    "nets/test_vit.py": "vit",
    "nets/test_swin.py": "swinv2",
    "nets/test_sam.py": "sam",
    "nets/test_recurrent.py": "rnn",
    "nets/test_moe.py": "moe_layers",
}


class Compared(NamedTuple):
    """An array: max |ours - theirs|, max |theirs|, and its name if it is a gradient."""

    error: float
    largest: float
    gradient: str | None


FOUND: dict[str, dict[str, list[Compared]]] = {network: {} for network in SCRIPT}  # {network: {test: arrays}}


def network(item) -> str:
    """Whose test it is: by its argument `file`, by its `case`, by its name, or by its file."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    of_file = TESTS[item.path.relative_to(ROOT / "tests").as_posix()]
    words = (given.get("file", ""), given.get("case", "").split("_")[0], *item.name.split("_"), of_file)
    return next(word for word in words if word in SCRIPT)


def as_bytes(array) -> bytes:
    return np.asarray(array, np.float32).tobytes()


@functools.cache
def gradients() -> dict[bytes, str]:
    """{values: name} of the gradients in all golden files, by which they are known from outputs."""
    from tests.nets.test_sam import unpacked

    found = {}
    for path in GOLDEN.glob("*.npz"):
        with np.load(path) as arrays:
            tensors = {k: arrays[k] for k in arrays if "grad/" in k or k.endswith(("/dx", "/dstate", "/d_images"))}
            tensors |= unpacked(arrays, arrays["grads"]) if "grads" in arrays else {}
        found |= {as_bytes(value): name for name, value in tensors.items()}
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Runs a test with a comparison that writes down and never fails."""
    found = FOUND[network(item)].setdefault(item.name, [])

    def compare(got, want, **_):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape and np.isfinite(got).all(), (got.shape, want.shape)
        if want.ndim:  # a loss is a number and left to the test
            name = gradients().get(as_bytes(want))
            found.append(Compared(float(np.abs(got - want).max()), float(np.abs(want).max()), name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.testing, "assert_allclose", compare)
        return (yield)


def reference(network: str) -> str:
    """Libraries and their versions, from the docstring of its script."""
    script = SCRIPT[network]
    text = ast.get_docstring(ast.parse((GOLDEN / f"{script}.py").read_text())) or ""
    found = dict(re.findall(r"\b(transformers|torch) (\d+\.\d+\.\d+)", text))
    if own := re.search(rf"\b{network} with (\d+\.\d+\.\d+)", text):
        found["transformers"] = own[1]
    return ", ".join(" ".join(pair) for pair in found.items())


def errors(compared: list[Compared]) -> tuple[list[float], list[tuple[float, str]]]:
    """Relative errors of a test's outputs, and of its gradients, these with their names."""
    largest = max((c.largest for c in compared if c.gradient), default=0.0)
    scale = lambda c: c.largest if c.largest > ROUNDING * largest else largest
    gradients = [(c.error / scale(c), c.gradient) for c in compared if c.gradient]
    return [c.error / c.largest for c in compared if not c.gradient], gradients


def summary(network: str) -> dict:
    """A network's row, the worst of its tests."""
    tests = {test: errors(compared) for test, compared in FOUND[network].items()}
    outputs = [(max(of_outputs), test) for test, (of_outputs, _) in tests.items() if of_outputs]
    gradients = sorted(pair for _, of_gradients in tests.values() for pair in of_gradients)
    return {
        "reference": reference(network),
        "cases": len(outputs),
        "outputs": max(outputs)[0],
        "worst_case": max(outputs)[1],
        "tensors": len(gradients),
        "gradients": gradients[-1][0] if gradients else None,
        "worst_tensor": gradients[-1][1] if gradients else None,
    }


def line(name: str, row: dict) -> str:
    """A network's row in markdown."""
    of_gradients = f"{row['gradients']:.1e} ({row['tensors']})" if row["tensors"] else ""
    return f"| {name} | {row['reference']} | {row['cases']} | {row['outputs']:.1e} | {of_gradients} |\n"


def main():
    """Runs the tests, prints and writes."""
    sys.path.insert(0, str(ROOT))
    files = [str(ROOT / "tests" / file) for file in TESTS]
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", "torch or transformers"]
    code = pytest.main([*options, *files], plugins=[sys.modules[__name__]])
    if code:
        sys.exit(int(code))
    rows = {name: summary(name) for name in SCRIPT if FOUND[name]}
    import jax

    about = {"networks": rows, "rounding": ROUNDING, "jax": jax.__version__}
    Path(__file__).with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    table = HEAD + "".join(line(name, row) for name, row in rows.items())
    Path(__file__).with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
