"""kernels <- nets <- jaxrl: every import statement of the three storeys is read and judged."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)
# Packages from outside that a storey may import; None: any that pyproject.toml declares.
OUTSIDE = {"kernels": {"jax", "numpy"}, "nets": {"jax", "numpy", "flax", "safetensors", "gguf"}, "jaxrl": None}
INSIDE = {"kernels": ("jaxrl.kernels",), "nets": ("jaxrl.kernels", "jaxrl.nets"), "jaxrl": ("jaxrl",)}


def imports(source: str, package: str) -> list[str]:
    """Return the full dotted name of everything that a file imports, at its top or deep inside."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def breaches(source: str, storey: str, package: str) -> list[str]:
    """Return the imports that this storey may not make."""
    found = []
    for name in imports(source, package):
        top = name.partition(".")[0]
        if top == "jaxrl":
            allowed = any(f"{name}.".startswith(f"{inside}.") for inside in INSIDE[storey])
        elif top in ("nets", "kernels"):
            allowed = False
        else:
            allowed = top in STANDARD or OUTSIDE[storey] is None or top in OUTSIDE[storey]
        if not allowed:
            found.append(name)
    return found


def files(storey: str) -> list[Path]:
    """Return the Python files of a storey; the links in jaxrl/ lead to the other storeys and are left out."""
    links = [ROOT / "jaxrl" / "nets", ROOT / "jaxrl" / "kernels"]
    return [path for path in (ROOT / storey).rglob("*.py") if not any(link in path.parents for link in links)]


@pytest.mark.parametrize("storey", ["kernels", "nets", "jaxrl"])
def test_a_storey_imports_only_what_stands_below(storey):
    assert files(storey), "the storey holds no file: the test would pass on nothing"
    found = {}
    for path in files(storey):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        package = package if storey == "jaxrl" else f"jaxrl.{package}"
        if wrong := breaches(path.read_text(encoding="utf-8"), storey, package):
            found[str(path.relative_to(ROOT))] = wrong
    assert not found


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "notebooks"])
def test_nothing_else_imports_the_folders_by_their_bare_names(folder):
    for path in (ROOT / folder).rglob("*.py"):
        tops = {name.partition(".")[0] for name in imports(path.read_text(encoding="utf-8"), folder)}
        assert not tops & {"nets", "kernels"}, path


def test_the_links_lead_to_the_folders():
    for storey in ("nets", "kernels"):
        link = ROOT / "jaxrl" / storey
        assert link.is_symlink() and link.resolve() == ROOT / storey


@pytest.mark.parametrize(
    ("storey", "source", "found"),
    [
        ("kernels", "import flax", ["flax"]),
        ("kernels", "def f():\n    from jaxrl.nets import rope", ["jaxrl.nets.rope"]),
        ("kernels", "from jaxrl import nets", ["jaxrl.nets"]),
        ("kernels", "from .. import nets", ["jaxrl.nets"]),
        ("kernels", "from . import attention\nimport jax.numpy as jnp, numpy, functools", []),
        ("nets", "import optax", ["optax"]),
        ("nets", "from jaxrl.losses import td", ["jaxrl.losses.td"]),
        ("nets", "from jaxrl.kernels.attention import attention\nimport flax.linen as nn", []),
        ("nets", "from jaxrl import nets_of_another_kind", ["jaxrl.nets_of_another_kind"]),
        ("jaxrl", "import kernels.attention", ["kernels.attention"]),
        ("jaxrl", "from nets import transformer", ["nets.transformer"]),
        ("jaxrl", "from jaxrl.nets.transformer import Transformer\nimport optax", []),
    ],
)
def test_the_judge_sees_each_kind_of_breach(storey, source, found):
    assert breaches(source, storey, f"jaxrl.{storey}" if storey != "jaxrl" else "jaxrl") == found
