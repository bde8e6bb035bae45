"""What a run refuses before it has cost anything."""

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


def test_a_checkpoint_in_another_dtype_is_refused_with_both(unbroken):
    checkpoints = unbroken[0] / "checkpoints"
    abstract = runs.shapes(checkpoints / str(runs.STEPS))
    name = next(name for name in abstract if name.endswith("embed/tokens"))
    abstract[name] = abstract[name].update(dtype=jnp.bfloat16)
    with pytest.raises(checkpoint.Mismatch, match=rf"{name} is float32.*, not bfloat16"):
        checkpoint.restore_latest(checkpoints, abstract)
