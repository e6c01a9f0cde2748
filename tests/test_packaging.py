"""What a user installs: the wheel from another folder, a light import, and peace with other packages."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """Run a command with no network index and without this checkout on the path; return what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy of the tracked tree, links kept, without old build products."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    unwanted = (".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*unwanted))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), ".", cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_source_file_is_in_the_wheel(names):
    for storey in ("nets", "kernels"):
        sources = {f"jaxrl/{path.relative_to(ROOT)}" for path in (ROOT / storey).rglob("*.py")}
        assert sources and sources <= names
    links = {ROOT / "jaxrl" / "nets", ROOT / "jaxrl" / "kernels"}
    files = [path for path in (ROOT / "jaxrl").rglob("*.py") if not links & set(path.parents)]
    sources = {str(path.relative_to(ROOT)) for path in files}
    assert sources and sources <= names
    assert {"jaxrl/py.typed", "jaxrl/nets/py.typed", "jaxrl/kernels/py.typed"} <= names


def test_the_wheel_brings_one_top_level_package(names):
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"jaxrl"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_from_another_folder(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
    ]
    run(*install, cwd=elsewhere)
    code = (
        "import importlib, pkgutil\n"
        "import jaxrl, jaxrl.nets, jaxrl.kernels\n"
        "for package in (jaxrl.nets, jaxrl.kernels):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print(jaxrl.__file__, jaxrl.nets.__file__, jaxrl.kernels.__file__, sep='\\n')\n"
    )
    printed = run(sys.executable, "-c", code, cwd=elsewhere, path=target).splitlines()
    assert len(printed) == 3 and all(Path(file).is_relative_to(target) for file in printed)


def test_importing_jaxrl_is_light():
    code = (
        "import sys, jaxrl, jaxrl.config, jaxrl.data.records\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'tokenizers', 'matplotlib', 'tyro'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is in the extra `test`")
def test_transformers_imports_beside_our_folders():
    """With the repository root on the path, its search for the package `kernels` finds our folder."""
    code = (
        "import transformers\n"
        "from transformers import AutoTokenizer, PreTrainedTokenizerFast\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "import importlib.util\n"
        "print(transformers.__version__, is_kernels_available(), importlib.util.find_spec('kernels').origin)"
    )
    version, available, found = run(sys.executable, "-c", code, cwd=ROOT).split()
    assert Path(found) == ROOT / "kernels" / "__init__.py", "the test must search where our folder stands"
    assert int(version.split(".")[0]) >= 5
    assert available == "False", "transformers took our kernels/ folder for the package `kernels`"


def test_constraints_name_versions_only():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 30
    for line in lines:
        name, pinned, version = line.partition("==")
        assert pinned and name.replace("-", "").replace("_", "").replace(".", "").isalnum(), line
        assert version[0].isdigit() and not set(version) & set("/@ ;"), line
