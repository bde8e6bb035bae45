"""Options of a run that its config turns on: what its rows say, and what is refused."""

import dataclasses
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import init, model, stores, train
from moe_jax.config.sections import Optimizer
from moe_jax.parallel import mesh as meshes
from moe_jax.training import checkpoint, metrics, optimizer
from moe_jax.training.state import TrainState
from moe_jax.upcycle import plan
from tests import tiny_runs

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
STUDENT = model.ModelConfig(
    vocab_size=259,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    remat="none",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny_runs.config(tmp_path_factory.mktemp("options"), STUDENT)
    config.optimizer.learning_rate = 1e-2
    return config


def with_changes(config, changes):
    config = config.copy_and_resolve_references()
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return config


def test_a_run_writes_what_is_on_and_evaluates_with_as_many_experts_as_it_is_told(config, tmp_path):
    teacher = str(tmp_path / "teacher")
    params = jax.jit(lambda key: model.init(STUDENT, key))(jax.random.key(0))
    stores.save(tmp_path / "teacher", STUDENT, params)
    changes = {
        "balance.load_balancing_schedule": "adaptive",
        "balance.mutual_information_coefficient": 0.1,
        "objective.distillation.source": teacher,
        "objective.distillation.coefficient": 0.5,
        "balance.load_balancing_coefficient": 0.02,
        "init.source": teacher,
        "evaluation.num_experts_per_tok": 4,
    }
    result = train.run(configs.resolve(with_changes(config, changes)), tmp_path / "run")
    first, second, validation = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert {"load_balancing_loss", "router_z_loss", "mutual_information"} <= set(first)
    assert "importance_loss" not in first
    assert first["load_balancing_coefficients"] == [0.02]
    assert second["load_balancing_coefficients"][0] < 0.02
    # It begins as its teacher, and every token goes to all experts in evaluation alone.
    assert abs(first["distillation_loss"]) < 1e-6 < second["distillation_loss"]
    assert np.ptp(first["router"]["tokens_per_expert"]) > 0
    assert validation["router"]["tokens_per_expert"] == [[0.25] * 4] == result["tokens_per_expert"]


REFUSED = {
    "is not a regular expression": {"optimizer.frozen": "("},
    "use pairs of a regular expression and a factor": {"optimizer.gradient_factors": (("a", "b"),)},
    "frozen: 'expert/up' matches no parameter": {"optimizer.frozen": "expert/up"},
    "set balance.load_balancing_scope='layer'": {
        "balance.load_balancing_schedule": "adaptive",
        "balance.load_balancing_scope": "all_layers",
    },
    "needs a router with a bias, not model.router='softmax_topk'": {
        "balance.bias_update_rate": 0.1
    },
    "set objective.distillation.source": {"objective.distillation.coefficient": 0.1},
    "set objective.distillation.coefficient": {"objective.distillation.source": "runs/dense"},
    "init.upcycle sets router, optimizer_state without a recipe": {
        "init.upcycle.router": "zero",
        "init.upcycle.optimizer_state": "copy",
    },
    "source='does/not/exist' has no checkpoints": {
        "objective.distillation.source": "does/not/exist",
        "objective.distillation.coefficient": 0.1,
    },
    "more than the 4 experts": {"evaluation.num_experts_per_tok": 5},
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(complaint, config, tmp_path):
    with pytest.raises(configs.ConfigError) as error:
        train.run(configs.resolve(with_changes(config, REFUSED[complaint])), tmp_path / "run")
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_vocabulary_is_refused(config, tmp_path):
    changes = {
        "objective.distillation.source": str(GOLDEN / "llama"),
        "objective.distillation.coefficient": 0.1,
        "mesh.data": -1,
        "mesh.fsdp": 1,
    }
    with pytest.raises(configs.ConfigError, match="teacher .*a model of 199 tokens does not fit"):
        train.run(configs.resolve(with_changes(config, changes)), tmp_path / "run")


def test_a_run_with_a_recipe_makes_one_plan_for_its_weights_and_their_moments(
    config, tmp_path, monkeypatch, capsys
):
    train.run(configs.resolve(with_changes(config, {"model.num_experts": 0})), tmp_path / "parent")
    assert "in this order" not in capsys.readouterr().err
    plans, make = [], plan.make
    monkeypatch.setattr(
        plan, "make", lambda *args, **how: plans.append(make(*args, **how)) or plans[-1]
    )
    changes = {
        "init.source": str(tmp_path / "parent"),
        "init.upcycle.recipe": "drop",
        "init.upcycle.optimizer_state": "copy",
    }
    train.run(configs.resolve(with_changes(config, changes)), tmp_path / "child")
    assert [made.name for made in plans] == ["drop"]
    assert "trained on this text in this order, for its seed is 0 too" in capsys.readouterr().err


def test_moments_go_the_way_of_their_weights_and_routers_begin_at_zero(config, tmp_path):
    dense, mesh = dataclasses.replace(STUDENT, num_experts=0), meshes.one_device()
    tx = optimizer.adamw(Optimizer(learning_rate=1e-2), 2)
    params = jax.jit(lambda key: model.init(dense, key))(jax.random.key(0))
    state = TrainState.create(params, tx)
    _, opt_state = tx.update(jax.tree.map(jnp.cos, params), state.opt_state, params)
    state = state.replace(opt_state=opt_state)
    of_parent = configs.resolve(with_changes(config, {"model.num_experts": 0})).config
    (tmp_path / "parent").mkdir()
    configs.save_json(of_parent, tmp_path / "parent")
    checkpoint.save(
        *(tmp_path / "parent" / "checkpoints", 1, state),
        data={"step": 1},
        config=of_parent.to_dict(),
    )
    changes = {
        "init.source": str(tmp_path / "parent"),
        "init.upcycle.recipe": "drop",
        "init.upcycle.optimizer_state": "copy",
        "init.upcycle.permute_neurons": True,
    }
    child = with_changes(config, changes)
    child = configs.resolve(child)
    planned = init.plan_of(child)
    made = init.parameters(child, mesh, planned)
    copied = init.optimizer_state(child, mesh, tx.init(made), planned)
    old, new = (
        next(n for n in jax.tree.leaves(s, is_leaf=init._is_adam) if init._is_adam(n))
        for s in (opt_state, copied)
    )
    assert new.count == old.count == 1
    weights, moments = (p["blocks"]["0"]["moe"] for p in (made, new.mu))
    assert not moments["router"]["kernel"].any()
    old_w, old_m = (p["blocks"]["0"]["mlp"] for p in (params, old.mu))
    for e in range(4):
        for weight_D, moment_D in zip(
            weights["experts"]["up"][0, e].T, moments["experts"]["up"][0, e].T, strict=True
        ):
            same = (np.asarray(old_w["up"][0].T) == weight_D).all(axis=1)
            if same.any():  # a neuron that was not redrawn, wherever it went
                np.testing.assert_array_equal(moment_D, old_m["up"][0].T[same.argmax()])
    assert jax.tree.structure(copied) == jax.tree.structure(tx.init(made))


def test_a_full_disk_at_the_metrics_ends_a_run_after_its_next_checkpoint(
    config, tmp_path, monkeypatch
):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    changes = {"training.num_steps": 4, "checkpoint.every_steps": 2, "training.log_to": ()}
    settings = configs.resolve(with_changes(config, changes))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left.* 2 rows"):
        patch.setattr(metrics, "open", lambda path, *_, **__: Full(path, "a"), raising=False)
        train.run(settings, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]
    train.run(settings, tmp_path)
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [3, 4, 4]
    assert not (tmp_path / "tensorboard").exists()


def test_a_back_end_that_is_not_there_is_refused_before_anything_is_written(config, tmp_path):
    settings = configs.resolve(with_changes(config, {"training.log_to": ("tensorbord",)}))
    with pytest.raises(configs.ConfigError, match="log_to='tensorbord' is unknown: did you mean"):
        train.run(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
