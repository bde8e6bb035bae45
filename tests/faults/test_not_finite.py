"""One NaN, wherever it comes from: the run skips the step bitwise or ends with 3, never with 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import command_line, stores, train
from moe_jax import config as configs
from moe_jax import model as models
from moe_jax.data import batches
from moe_jax.training import metrics, objective, optimizer
from tests import test_train_processes
from tests.faults import runs

# The batches with a NaN, numbered from 0, and what has it: the loss of a row that is on one of the
# eight devices, the whole loss, and one number of one expert's gradient, which is on one device.
ROW, LOSS, GRADIENT = 1, 3, 5
STEPS = 8


@pytest.fixture
def settings(config_file):
    """The settings of a run of a few steps with a checkpoint of each; changed by keys."""

    def of(**changes):
        values = {
            "training.num_steps": STEPS,
            "checkpoint.every_steps": 1,
            "evaluation.every_steps": 0,
        } | {name.replace("__", "."): value for name, value in changes.items()}
        return configs.resolve(configs.load(str(config_file), values))

    return of


def marked(make):
    """Batches, of which the label marks those to spoil, and one has a row whose weight is NaN."""

    def with_marks(*corpus, start_step=0, **how):
        for number, batch in enumerate(make(*corpus, start_step=start_step, **how), start_step):
            labels_BT, weights_BT = np.full_like(batch.labels_BT, number), batch.weights_BT.copy()
            if number == ROW:
                weights_BT[2, 3] = np.nan
            yield batch.replace(labels_BT=labels_BT, weights_BT=weights_BT)

    return with_marks


@jax.custom_vjp
def spoiled(x_LEDF, is_due):
    """The identity with, where it is due, a NaN in the gradient of one weight of expert 1."""
    return x_LEDF


def forward(x_LEDF, is_due):
    return x_LEDF, is_due


def backward(is_due, grad_LEDF):
    wrong = grad_LEDF.at[0, 1, 2, 3].set(jnp.nan)
    return jnp.where(is_due, wrong, grad_LEDF), None


spoiled.defvjp(forward, backward)


def spoiling(make):
    """The objective with a NaN in the loss, or in a gradient, of a marked batch."""

    def make_spoiled(context):
        loss = make(context)

        def with_nan(params, microbatch, key):
            number = microbatch.labels_BT[0, 0]
            moe = params["blocks"]["0"]["moe"]
            up_LEDF = spoiled(moe["experts"]["up"], number == GRADIENT)
            moe = {**moe, "experts": {**moe["experts"], "up": up_LEDF}}
            block = {**params["blocks"]["0"], "moe": moe}
            params = {**params, "blocks": {**params["blocks"], "0": block}}
            total, found = loss(params, microbatch, key)
            nan = jnp.where(number == LOSS, jnp.nan, 0.0)
            return total + nan, found.replace(loss=found.loss + nan)

        return with_nan

    return make_spoiled


def test_a_step_with_a_nan_in_loss_shard_or_expert_changes_no_bit_and_the_run_goes_on(
    settings, tmp_path, monkeypatch, capsys, figure
):
    assert jax.device_count() == 8
    monkeypatch.setattr(batches, "batches", marked(batches.batches))
    made = objective.Objective(spoiling(objective.next_token))
    monkeypatch.setitem(objective.OBJECTIVES, "next_token", made)
    result = train.run(settings(), tmp_path)
    assert result["skipped_steps"] == 3 and np.isfinite(result["loss"])
    rows = [row for row in metrics.read(tmp_path / "metrics.jsonl") if "skipped" in row]
    assert [row["step"] - 1 for row in rows if row["skipped"]] == [ROW, LOSS, GRADIENT]
    # The loss of that step is finite: only the gradient is not.
    assert rows[GRADIENT]["loss"] and rows[LOSS]["loss"] is None
    said = capsys.readouterr().err
    for number in range(1, STEPS):
        before, after = (state_at(tmp_path, step) for step in (number, number + 1))
        skipped = number in (ROW, LOSS, GRADIENT)
        assert (before == after) == skipped
        assert (f"step {number + 1}: " in said) == skipped
    figure("NaN planted in a run", skipped=3)


def state_at(workdir, step):
    """The digests of parameters and moments."""
    found = runs.digests(workdir, step)
    return {name: bits for name, bits in found.items() if name.startswith(("params", "opt_state"))}


def expect_3(settings, workdir):
    """The run ends with 3, and no checkpoint of it has a NaN."""
    with pytest.raises(SystemExit) as ended:
        train.run(settings, workdir)
    assert ended.value.code == command_line.EXIT_NONFINITE
    assert not (workdir / "result.json").exists() and not list(workdir.glob("checkpoints/*"))


@pytest.mark.parametrize("moment", ["mu", pytest.param("nu", marks=pytest.mark.long)])
def test_a_nan_in_adams_moments_ends_the_run_with_3(
    moment, settings, tmp_path, monkeypatch, figure
):
    make = optimizer.adamw

    def planted(*arguments):
        tx = make(*arguments)

        def init(params):
            def spoil(path, leaf):
                is_its = f".{moment}" in jax.tree_util.keystr(path) and leaf.ndim == 2
                return leaf.at[3, 0].set(jnp.nan) if is_its else leaf

            return jax.tree_util.tree_map_with_path(spoil, tx.init(params))

        return tx._replace(init=init)

    monkeypatch.setattr(optimizer, "adamw", planted)
    expect_3(settings(), tmp_path / "run")
    figure("NaN planted in a run", **{"ended with 3": 1})


def test_a_nan_in_an_unused_weight_of_the_parent_ends_the_run(
    settings, tmp_path, capsys, monkeypatch, figure
):
    """The embedding of a byte that the text does not have reaches neither loss nor gradient."""
    config = settings().model
    params = models.init(config, jax.random.key(0))
    params["embed"]["tokens"] = params["embed"]["tokens"].at[7, 0].set(jnp.nan)
    stores.save(tmp_path / "parent", config, params)
    try:
        expect_3(settings(init__source=str(tmp_path / "parent")), tmp_path / "run")
        assert "parameters that are not finite" in capsys.readouterr().err
    except configs.ConfigError as refused:
        assert "embed/tokens" in str(refused) and "1" in str(refused)
    figure("NaN planted in a run", **{"ended with 3": 1})


ON_ONE_HOST = """
import jax
import numpy as np
from moe_jax.data import batches

make = batches.batches

def planted(*corpus, start_step=0, **how):
    for number, batch in enumerate(make(*corpus, start_step=start_step, **how), start_step):
        if number == 1 and jax.process_index() == 1:
            batch = batch.replace(weights_BT=np.full_like(batch.weights_BT, np.nan))
        yield batch

batches.batches = planted
"""


@pytest.mark.long
def test_a_nan_in_the_shard_of_one_of_two_hosts_is_skipped_by_both(config_file, tmp_path, figure):
    planted = tmp_path / "config.py"
    planted.write_text(config_file.read_text() + ON_ONE_HOST)
    flags = ["--config.training.num_steps=3", "--config.checkpoint.every_steps=1"]
    workdir = tmp_path / "run"
    result = test_train_processes.whole_run(planted, workdir, *flags, num_processes=2)
    assert result["skipped_steps"] == 1 and np.isfinite(result["loss"])
    assert state_at(workdir, 1) == state_at(workdir, 2) != state_at(workdir, 3)
    figure("NaN planted in a run", skipped=1)
