"""The notebook runs from top to bottom on small settings, and is kept without outputs."""

import os
import pathlib

import nbclient
import nbformat
import pytest

PATH = pathlib.Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_outputs_are_stripped_and_it_is_short(notebook):
    assert len(notebook.cells) <= 15
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


def test_the_notebook_runs(notebook, monkeypatch):
    monkeypatch.setenv("MOE_JAX_NOTEBOOK_STEPS", "6")
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures are outputs of their cells
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    difference = float(text.split("largest difference of naive and dense logits: ")[1].split()[0])
    assert difference < 1e-5
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
