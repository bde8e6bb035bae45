"""Whole runs that train a part of a model: resumed bitwise, counted, and read as merged models."""

import json

import jax
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import hf, model, stores, train, tree
from moe_jax.parallel import mesh as meshes
from moe_jax.training import lora

MODEL = model.ModelConfig(
    vocab_size=259,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=4,
    remat="none",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("partial")
    (root / "text").mkdir()
    for i in range(10):
        (root / "text" / f"{i}.txt").write_text(f"the number {i} is {i * i} and no other " * 20)
    params = jax.jit(lambda: model.init(MODEL, jax.random.key(0)))()
    stores.save(root / "base", MODEL, params)
    return root


def settings_of(root, file, **keys):
    small = {
        "init.source": str(root / "base"),
        "data.source": str(root / "text"),
        "data.cache_dir": str(root / "cache"),
        "data.sequence_length": 32,
        "data.validation_fraction": 0.3,
        "training.num_steps": 4,
        "training.batch_size": 8,
        "training.log_to": (),
        "optimizer.warmup_steps": 0,
        "optimizer.learning_rate": 1e-2,
        "evaluation.batch_size": 8,
        "model.remat": "none",
    }
    config = configs.load(f"configs/{file}.py")
    config.update_from_flattened_dict({**small, **keys})
    return configs.resolve(config)


@pytest.mark.long
def test_a_run_of_lora_is_resumed_bitwise_and_read_as_a_merged_model_everywhere(root):
    whole = train.run(settings_of(root, "lora"), root / "whole")
    assert whole["trained_parameters"] < 0.5 * whole["parameters"]
    moments = 2 * 4 * whole["trained_parameters"]
    assert moments <= whole["optimizer_state_bytes"] < moments + 100
    train.run(settings_of(root, "lora", **{"training.stop_step": 2}), root / "parts")
    train.run(settings_of(root, "lora"), root / "parts")
    _, expected = stores.load(root / "whole", meshes.one_device())
    _, params = stores.load(root / "parts", meshes.one_device())
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    _, base = stores.load(root / "base", meshes.one_device())
    changed = {n for n, w in tree.flatten(base).items() if (w != tree.flatten(params)[n]).any()}
    assert changed == {n for n in tree.flatten(base) if n.rpartition("/")[2] in lora.AXES}
    # The run evaluated what is read; a child starts from it, and its copy is an ordinary folder.
    child = settings_of(root, "experts_only", **{"init.source": str(root / "whole")})
    first = train.run(child, root / "child")
    rows = [json.loads(line) for line in open(root / "child" / "metrics.jsonl")]
    [start] = [row["validation"]["loss"] for row in rows if "validation" in row][:1]
    assert start == pytest.approx(whole["loss"], abs=1e-6)
    assert first["trained_parameters"] == 4 * 3 * 16 * 16
    hf.save(root / "folder", MODEL, params)
    _, copy = hf.load(root / "folder", mesh=meshes.one_device())
    jax.tree.map(np.testing.assert_array_equal, copy, params)


def test_frozen_parameters_are_the_same_bits_after_a_run(root):
    result = train.run(settings_of(root, "router_only"), root / "router")
    assert result["trained_parameters"] == 4 * 16
    before, after = (
        tree.flatten(stores.load(root / name, meshes.one_device())[1])
        for name in ("base", "router")
    )
    same = {n: before[n].tobytes() == after[n].tobytes() for n in before}
    assert [name for name, is_same in same.items() if not is_same] == ["blocks/0/moe/router/kernel"]
