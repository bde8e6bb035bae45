"""What a run refuses before it has cost anything."""

import pathlib
import shutil

import jax.numpy as jnp
import pytest

from moe_jax import config as configs
from moe_jax import train
from moe_jax.training import checkpoint
from moe_jax.training import step as steps
from tests.faults import runs


def test_a_workdir_that_cannot_be_made_is_refused_before_the_step_compiles(
    config_file, tmp_path, monkeypatch
):
    def refuse(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(steps, "jitted", refuse)
    (tmp_path / "file").write_text("in the way")
    settings = configs.resolve(configs.load(str(config_file)))
    with pytest.raises(configs.ConfigError, match="workdir=.*file/run cannot be used: .*Not a dir"):
        train.run(settings, tmp_path / "file" / "run")


def test_a_run_whose_checkpoints_are_not_mounted_is_refused_and_nothing_is_touched(
    config_file, unbroken, tmp_path
):
    workdir = pathlib.Path(shutil.copytree(unbroken[0], tmp_path / "run"))
    (workdir / "checkpoints").rename(tmp_path / "elsewhere")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    code, said = runs.ended(runs.start(config_file, workdir))
    assert code == 2 and said.count("\n") == 1, said
    assert f"{workdir}/checkpoints has no checkpoint, but the run in --workdir" in said
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json.tmp", "saved.json", ".lock"])
def test_a_folder_in_the_place_of_a_file_is_named_at_the_start(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(configs.ConfigError, match=f"{name}'; give a file, or move the fol"):
        train._lock(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_checkpoint_in_another_dtype_is_refused_with_both(unbroken):
    checkpoints = unbroken[0] / "checkpoints"
    abstract = runs.shapes(checkpoints / str(runs.STEPS))
    name = next(name for name in abstract if name.endswith("embed/tokens"))
    abstract[name] = abstract[name].update(dtype=jnp.bfloat16)
    with pytest.raises(checkpoint.Mismatch, match=rf"{name} is float32.*, not bfloat16"):
        checkpoint.restore_latest(checkpoints, abstract)
