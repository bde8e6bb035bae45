"""The notebook runs from top to bottom on small settings, and is kept without outputs."""

import contextlib
import io
import os
import pathlib
import re
import types

import nbclient
import nbformat
import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_outputs_are_stripped_and_it_is_short(notebook):
    assert len(notebook.cells) <= 20
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
    assert text.count("not answered yet") == 3
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


def test_the_exercises_know_the_right_answers_and_refuse_wrong_ones(notebook):
    exercises = next(c.source for c in notebook.cells if "def check(" in c.source)
    names = {"hidden_size": 4, "intermediate_size": 6}
    dense = types.SimpleNamespace(**names)
    moe = types.SimpleNamespace(num_experts_per_tok=2, num_hidden_layers=3)
    right = ["3 * D * F", "total - 6 * 3 * 3 * D * F", "two_largest(logits)"]
    for answers, said in ((right, "right"), (["1", "2", "0 * logits[:2]"], "not yet")):
        code = exercises
        for answer in answers:
            code = re.sub(
                r"(answer = |return )\.\.\.$", rf"\g<1>{answer}", code, count=1, flags=re.M
            )
        output = io.StringIO()
        known = {"dense": dense, "moe": moe, "total": 10_000, "E": 8, "np": np}
        known["two_largest"] = lambda x: np.exp(np.sort(x)[:-3:-1]) / np.exp(np.sort(x)[-2:]).sum()
        with contextlib.redirect_stdout(output):
            exec(code, known)
        lines = output.getvalue().splitlines()
        assert len(lines) == 3 and all(line.startswith(said) for line in lines)
