"""convert.py and upcycle.py as a person runs them, and a run that starts from a folder."""

import json
import pathlib
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import hf, init
from moe_jax.parallel import mesh as meshes
from tests.hf.test_golden import GOLDEN

ROOT = pathlib.Path(__file__).parents[2]
OTHERS = ["--source=tests/golden/llama, tests/golden/mistral,", "--recipe=skywork", "--to=orbax"]
MERGED = ["--source=tests/golden/mixtral", "--recipe=merge_back"]


def run(script, *arguments):
    command = [sys.executable, f"scripts/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_folder_becomes_a_mixture_and_a_checkpoint_and_a_folder_again(tmp_path, monkeypatch):
    moe, imported, again = (tmp_path / name for name in ("moe", "imported", "again"))
    experts = ("--num_experts=4", "--num_experts_per_tok=2", "--model.layers=dense,moe,moe")
    done = run("upcycle.py", f"--source={GOLDEN / 'qwen3'}", f"--output={moe}", *experts)
    assert done.returncode == 0, done.stderr
    assert "step 0: not equal to the parent (a share of 0.5 of the neurons is new; ratio=0.0" in (
        done.stdout
    )
    last = done.stdout.splitlines()[-1].split()  # of the last layer: a half is redrawn
    assert last[-1] == "0.5000" and 0.1 < float(last[1]) < 0.5 and 0.4 < float(last[4]) < 0.8
    for source, output, to in ((moe, imported, "orbax"), (imported, again, "hf")):
        words = ["convert.py", f"--source={source}", f"--output={output}", f"--to={to}"]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(ROOT / "scripts" / "convert.py"), run_name="__main__")
    values = json.loads((again / "config.json").read_text())
    assert values["model_type"] == "qwen3_moe" and values["mlp_only_layers"] == [0]
    jax.tree.map(np.testing.assert_array_equal, hf.load(moe)[1], hf.load(again)[1])


@pytest.mark.parametrize(
    ("script", "arguments", "complaint"),
    [
        ("upcycle.py", ["--source=nowhere"], "nowhere is neither a Hugging Face folder"),
        ("upcycle.py", ["--source=tests/golden/mixtral"], "needs a dense parent"),
        ("upcycle.py", ["--source=tests/golden/nemotron"], "no Hugging Face model class"),
        ("upcycle.py", ["--source=tests/golden/llama", "--recipe.ratio=2"], "ratio=2.0"),
        ("upcycle.py", ["--source=,"], "--source=, names no parent"),
        ("upcycle.py", OTHERS, ": tests/golden/mistral is another model than tests/golden/llama"),
        (
            *("upcycle.py", ["--source=tests/golden/llama", "--output=tests/golden/llama/moe"]),
            "--output=tests/golden/llama/moe lies in the source",
        ),
        (
            *("upcycle.py", ["--source=tests/golden/llama", "--granularity=0"]),
            "--granularity=0 must be at least 1",
        ),
        (
            *("upcycle.py", ["--source=tests/golden/llama", "--model.num_experts=4"]),
            "--model.num_experts: use --num_experts",
        ),
        (
            *("upcycle.py", ["--source=tests/golden/llama", "--model.dispatch=capacity"]),
            "(--to=orbax) holds it, and convert.py --dropless writes it",
        ),
        ("upcycle.py", [*MERGED, "--model.num_experts=2"], "makes a dense model"),
        ("convert.py", ["--source=tests", "--to=hf"], "neither a Hugging Face folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    script, arguments, complaint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, f"--output={tmp_path / 'out'}", *arguments])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(f"scripts/{script}", run_name="__main__")
    assert done.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}: ") and complaint in line
    assert not list(tmp_path.iterdir())


def test_a_run_starts_from_a_folder_and_takes_its_model():
    config = configs.default()
    config.init.source = str(GOLDEN / "llama_bf16")
    config.data.tokenizer = "bytes"
    config.init.upcycle.recipe = "naive"
    config.model.num_experts = 4
    config.mesh.fsdp = 8
    settings = configs.resolve(config)
    mesh = meshes.make(vars(settings.mesh))
    params = init.parameters(settings, mesh, init.plan_of(settings))
    _, parent = hf.load(GOLDEN / "llama_bf16")
    up = params["blocks"]["0"]["moe"]["experts"]["up"]
    assert up.dtype == np.float32 and not up.sharding.is_fully_replicated
    np.testing.assert_array_equal(up[:, 3], parent["blocks"]["0"]["mlp"]["up"].astype(np.float32))


def test_a_mesh_gets_the_values_that_a_whole_read_has():
    mesh = meshes.make({"data": 1, "fsdp": 2, "expert": 1, "tensor": 2}, jax.devices()[:4])
    for name in ("mixtral_sharded", "gpt2", "mixtral_stacked"):
        config, whole = hf.load(GOLDEN / name)
        if config.vocab_size % 2:  # not divisible by the tensor axis
            mesh = meshes.make({"data": 1, "fsdp": 2, "expert": 1, "tensor": 1}, jax.devices()[:2])
        _, placed = hf.load(GOLDEN / name, mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, placed, whole)
