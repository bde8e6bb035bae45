"""The notebooks run from top to bottom on small settings, and are kept without outputs.

Their first cell installs the project into a runtime like Colab's, which has jax 0.7.2 with its CUDA
plugin: once with a pip that only records its arguments, and with --long into such a runtime.
"""

import ast
import contextlib
import glob
import importlib
import importlib.util
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import types
from importlib import metadata

import jax
import nbclient
import nbformat
import numpy as np
import pytest

from moe_jax.analysis import routing
from moe_jax.data import chat_template
from moe_jax.training import optimizer
from tests import test_docs_run

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
COLAB = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt")  # all of version 0.7.2
UNINSTALL = ["uninstall", "--yes", "jax-cuda12-pjrt", "jax-cuda12-plugin"]


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.fixture
def notebook():
    return read("quickstart")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_short_without_outputs_and_opens_itself_in_colab(name):
    cells = read(name).cells
    assert len(cells) <= 20
    for cell in cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
    assert f"/blob/main/notebooks/{name}.ipynb" in cells[0].source
    assert first_cell(read(name)) == first_cell(read("quickstart"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_names_only_functions_and_files_that_exist(name):
    cells = read(name).cells
    code = "\n".join(
        re.sub(r"^%.*", "", cell.source, flags=re.M) for cell in cells if cell.cell_type == "code"
    )
    nodes, modules = list(ast.walk(ast.parse(code))), {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("moe_jax"):
            for one in node.names:
                with contextlib.suppress(ModuleNotFoundError):  # a class or a function
                    module = importlib.import_module(f"{node.module}.{one.name}")
                    modules[one.asname or one.name] = module
                assert hasattr(importlib.import_module(node.module), one.name), one.name
    used = {
        (node.value.id, node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in modules
    }
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    used |= {(m, a) for m, a in re.findall(r"`(\w+)\.(\w+)`", prose) if m in modules}
    assert used and not {pair for pair in used if not hasattr(modules[pair[0]], pair[1])}
    files = re.findall(r"\b(?:docs|scripts)/\w+\.(?:md|py|sh)", prose)
    assert files and all((ROOT / file).is_file() for file in files)


def runs_quickstart(text, num_images):
    difference = float(text.split("largest difference of naive and dense logits: ")[1].split()[0])
    assert difference < 1e-5 and num_images == 2


def runs_upcycle_your_checkpoint(text, num_images):
    found = re.findall(r"(naive|drop 0.5): largest difference (\S+) of", text)
    differences = {name: float(value) for name, value in found}
    assert differences["naive"] < 1e-5 < 1e-3 < differences["drop 0.5"]
    assert text.count("goodput: ") == 4  # of the parent and three runs
    assert "5 of 5 goals reached" in text and num_images == 1


def runs_what_experts_learn(text, num_images):
    assert "19 labels, 4 sparse layers" in text and num_images == 4
    assert re.search(r"mantel: -?0\.\d+, by chance \S+, p = \d\.\d+, n = 19", text)


def runs_adapt_your_mixture(text, num_images):
    found = re.findall(r"(\S.*): held-out answer loss (\S+) -> (\S+); trains +(\S+) of", text)
    arms = {name: (float(before), float(after), number) for name, before, after, number in found}
    assert list(arms) == ["balance loss", "no balance loss", "no balance loss, LoRA"]
    assert all(after < before for before, after, _ in arms.values())
    assert [number for *_, number in arms.values()] == ["362,176", "362,176", "69,632"]
    assert len({before for before, *_ in arms.values()}) == 1  # LoRA begins as the mixture
    accuracy = re.search(r"preference_accuracy: 0.000 -> (\S+)", text)
    assert float(accuracy[1]) > 0.6 and num_images == 2
    assert "\x1b[32m" in text  # what is trained is green
    assert "chat_template.jinja" in text and "the folder answers as the run does: True" in text


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("adapt_your_mixture", 2, marks=pytest.mark.long),
        ("quickstart", 6),
        pytest.param("upcycle_your_checkpoint", 12, marks=pytest.mark.long),
        pytest.param("what_experts_learn", 8, marks=pytest.mark.long),
    ],
)
def test_a_notebook_runs(name, steps, monkeypatch, tmp_path):
    text, num_images = executed(name, steps, monkeypatch, tmp_path)
    assert text.count("not answered yet") == 3
    globals()[f"runs_{name}"](text, num_images)


@pytest.mark.long
def test_a_checkpoint_with_a_tokenizer_goes_through_three_notebooks(monkeypatch, tmp_path):
    test_docs_run.tiny_model(tmp_path / "dense")
    (tmp_path / "dense" / chat_template.FILE).write_text(chat_template.PLAIN.source)
    monkeypatch.setenv("MOE_JAX_NOTEBOOK_CHECKPOINT", str(tmp_path / "dense"))
    text, _ = executed("upcycle_your_checkpoint", 6, monkeypatch, tmp_path)
    for goal in ("the folder holds a mixture", "the function is preserved at step 0"):
        assert f"passed  {goal}" in text.replace("passed \n ", "passed  ")
    mixture = tmp_path / "runs" / "my_mixture" / "moe"
    assert (mixture / "tokenizer.json").read_bytes() == (
        tmp_path / "dense" / "tokenizer.json"
    ).read_bytes()
    monkeypatch.setenv("MOE_JAX_NOTEBOOK_CHECKPOINT", str(mixture))
    text, num_images = executed("what_experts_learn", 6, monkeypatch, tmp_path)
    assert "19 labels, 2 sparse layers" in text and num_images == 3  # one checkpoint: no saturation
    text, num_images = executed("adapt_your_mixture", 2, monkeypatch, tmp_path)
    assert "the folder answers as the run does: True" in text and num_images == 2
    adapted = tmp_path / "runs" / "adapted" / "moe"
    for name in ("tokenizer.json", chat_template.FILE):
        assert (adapted / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


def executed(name, steps, monkeypatch, folder):
    """Everything that the notebook prints, and the number of its figures."""
    monkeypatch.setenv("MOE_JAX_NOTEBOOK_STEPS", str(steps))
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures are outputs of their cells
    notebook, place = read(name), {"metadata": {"path": str(folder)}}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place)
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    num_images = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs), num_images


MOE = types.SimpleNamespace(num_experts_per_tok=2, num_hidden_layers=3)
DENSE = types.SimpleNamespace(hidden_size=4, intermediate_size=6, num_hidden_layers=3)
# By notebook: what its cells know before the exercises, and the right answers.
EXERCISES = {
    "adapt_your_mixture": (
        {
            **{"E": 8, "jax": jax, "optimizer": optimizer},
            "adapted": (
                types.SimpleNamespace(hidden_size=4, expert_size=6, num_hidden_layers=3),
                {"moe": {"router": np.zeros((3, 4, 8))}, "attention": {"wq": np.zeros((3, 4, 4))}},
            ),
        },
        ["np.log(2)", "L * E * r * 3 * (D + F)", '"moe/router"'],
    ),
    "quickstart": (
        {
            **{"dense": DENSE, "moe": MOE, "total": 10_000, "E": 8},
            "two_largest": lambda x: np.exp(np.sort(x)[:-3:-1]) / np.exp(np.sort(x)[-2:]).sum(),
        },
        ["3 * D * F", "total - 6 * 3 * 3 * D * F", "two_largest(logits)"],
    ),
    "upcycle_your_checkpoint": (
        {
            **{"dense": DENSE, "parent_total": 10_000, "total": 10_000 + 3 * (3 * 72 + 16)},
            **{"NUM_EXPERTS": 4, "EXPERTS_PER_TOKEN": 2},
        },
        ["P + L * (3 * D * F * (E - 1) + D * E)", "4 * 4 * total", "2"],
    ),
    "what_experts_learn": (
        {"E": 8, "routing": routing},
        ["2 ** 1.75", "1", "(1 + 1 / 8) / 2"],
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_exercises_know_the_right_answers_and_refuse_wrong_ones(name):
    exercises = next(c.source for c in read(name).cells if "def check(" in c.source)
    known, right = EXERCISES[name]
    for answers, said in ((right, "right"), (["1.5", "2.5", "0 * np.ones(2)"], "not yet")):
        code = exercises
        for answer in answers:
            code = re.sub(
                r"(answer = |return )\.\.\.$", rf"\g<1>{answer}", code, count=1, flags=re.M
            )
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, {"np": np, **known})
        lines = output.getvalue().splitlines()
        assert len(lines) == 3 and all(line.startswith(said) for line in lines)


def first_cell(notebook):
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


def run_first_cell(source, monkeypatch, folder, *, gpu, tpu=False, plugin="0.7.2", imported=None):
    """Executes the cell as on a runtime without moe_jax, and gives (calls, printed text)."""
    calls, printed = [], io.StringIO()
    installed = {"jax": "0.12.0", "jax-cuda12-plugin": plugin, "jax_cuda12_pjrt": plugin}
    installed = {name: version for name, version in installed.items() if version}

    def call(command, **options):
        program = pathlib.Path(command[0]).name
        if program == "nvidia-smi":
            return subprocess.CompletedProcess(command, {"works": 0, "fails": 9}[gpu])
        assert options["check"]
        calls.append(command[4:] if command[1:3] == ["-m", "pip"] else [program, *command[1:]])
        if "[cuda12]" in calls[-1][-1]:  # jax's extra pins the plugin to jax's version
            installed.update({"jax-cuda12-plugin": "0.12.0", "jax_cuda12_pjrt": "0.12.0"})
        return subprocess.CompletedProcess(command, 0)

    def distributions():
        return [types.SimpleNamespace(name=n, version=v) for n, v in installed.items()]

    with monkeypatch.context() as patch:
        for name in ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "matplotlib"):
            patch.delitem(sys.modules, name, raising=False)
        if imported:
            patch.setitem(sys.modules, "numpy", types.SimpleNamespace(__version__=imported))
        patch.chdir(folder)
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        patch.setattr(glob, "glob", lambda pattern: [pattern] * (tpu and "accel" in pattern))
        patch.setattr("shutil.which", lambda program: f"/bin/{program}" if gpu else None)
        patch.setattr(subprocess, "run", call)
        patch.setattr(metadata, "version", {**installed, "numpy": "2.5.5"}.get)
        patch.setattr(metadata, "distributions", distributions)
        with contextlib.redirect_stdout(printed):
            exec(source, {})
    return calls, printed.getvalue()


@pytest.mark.parametrize(
    ("machine", "wanted", "removed"),
    [
        ({"gpu": "works"}, "./moe_jax[cuda12]", False),
        ({"gpu": "works", "plugin": None}, "./moe_jax[cuda12]", False),
        ({"gpu": "fails"}, "./moe_jax", True),  # Colab without a GPU may have the program
        ({"gpu": None}, "./moe_jax", True),
        ({"gpu": None, "plugin": None}, "./moe_jax", False),
        ({"gpu": None, "plugin": "0.12.0"}, "./moe_jax", False),
        ({"gpu": None, "tpu": True}, "./moe_jax[tpu]", True),
    ],
)
def test_the_first_cell_installs_jax_for_the_accelerator_and_leaves_no_plugin_of_another_version(
    notebook, machine, wanted, removed, monkeypatch, tmp_path
):
    calls, printed = run_first_cell(first_cell(notebook), monkeypatch, tmp_path, **machine)
    clone = ["git", "clone", "--quiet", "--depth=1", "https://github.com/moe-jax/moe_jax"]
    assert calls == [clone, ["install", wanted], *([UNINSTALL] if removed else [])]
    assert printed.startswith("installed jax 0.12.0, ") and "0.7.2" not in printed
    assert ("[cuda12]" not in wanted) or "jax-cuda12-plugin 0.12.0" in printed


def test_the_first_cell_asks_for_a_restart_and_says_why(notebook, monkeypatch, tmp_path):
    (tmp_path / "moe_jax").mkdir()  # the clone of the session before
    with pytest.raises(SystemExit, match=r"restart .*: numpy 2.0.2 was imported before 2.5.5"):
        run_first_cell(first_cell(notebook), monkeypatch, tmp_path, gpu=None, imported="2.0.2")
    calls, _ = run_first_cell(
        first_cell(notebook), monkeypatch, tmp_path, gpu=None, imported="2.5.5"
    )
    assert calls == [["install", "./moe_jax"], UNINSTALL]


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A virtual environment with what Colab's runtime has, as a kernel of Jupyter; its folder."""
    for name in ("PYTHONPATH", "XLA_FLAGS", "JAX_PLATFORMS", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    python = str(tmp_path / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    for packages in (
        ["--no-deps", *(f"{name}==0.7.2" for name in COLAB)],  # without the libraries of CUDA
        [
            "numpy<2.2",
            "scipy",
            "ml_dtypes",
            "opt_einsum",
            "matplotlib",
            "ipykernel",
            "setuptools>=70.1",
        ],
    ):
        pip = [python, "-m", "pip", "install", "--quiet", *packages]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no runtime like Colab's: {(done.stderr.splitlines() or ['?'])[-1]}")
    spec = {"argv": [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    spec |= {"display_name": "Colab", "language": "python"}
    (tmp_path / "jupyter" / "kernels" / "colab").mkdir(parents=True)
    (tmp_path / "jupyter" / "kernels" / "colab" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")  # the clone is of this repository
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{ROOT}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/moe-jax/moe_jax")
    (tmp_path / "content").mkdir()
    return tmp_path


@pytest.mark.long
def test_the_notebook_runs_in_a_runtime_like_colabs(notebook, colab, monkeypatch):
    python = str(colab / "bin" / "python")

    # With a GPU, pip would install CUDA's libraries, of some gigabytes: it only says what it would.
    fake = colab / "gpu" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    plan = {"PIP_DRY_RUN": "1", "PIP_REPORT": str(colab / "plan.json")}
    plan |= {"PIP_NO_BUILD_ISOLATION": "0"}  # a "no": else it would only say it of setuptools too
    plan |= {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    cell = [python, "-c", first_cell(notebook)]
    subprocess.run(cell, env={**os.environ, **plan}, cwd=colab / "content", check=True)
    rows = [row["metadata"] for row in json.loads((colab / "plan.json").read_text())["install"]]
    planned = {row["name"]: row["version"] for row in rows}
    assert {planned[name] for name in COLAB} == {planned["jax"]} != {"0.7.2"}

    # Without one, all of it runs, and jax is left without a plugin that it warns of.
    monkeypatch.setenv("MOE_JAX_NOTEBOOK_STEPS", "6")
    content = {"metadata": {"path": str(colab / "content")}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="colab", resources=content)
    client.execute()
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    text = "".join(output.get("text", "") for output in first.outputs)
    assert re.search(r"installed jax [\d.]+, without a plugin for GPUs", text)
    code = "import moe_jax, jax; print(moe_jax.__version__, jax.devices()[0].platform)"
    shown = [python, "-W", "error", "-c", code]
    alone = subprocess.run(shown, cwd=colab / "content", capture_output=True, text=True, check=True)
    assert alone.stdout.split()[1] == "cpu" and "plugin" not in alone.stderr
