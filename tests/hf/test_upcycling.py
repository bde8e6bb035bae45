"""Folder to folder, an expert at a time, gives what the in-memory path gives."""

import jax
import numpy as np
import pytest

from moe_jax import hf, upcycle
from moe_jax.hf import folders, upcycling
from tests.hf.test_golden import GOLDEN

CASES = [
    ("llama", "naive", {}),
    ("llama", "drop", {"ratio": 0.5}),
    ("llama_bf16", "drop", {"ratio": 0.5, "index_sharing": "per_matrix", "permute_neurons": True}),
    ("mistral", "drop", {"ratio": 1.0}),
    ("qwen3", "drop", {"ratio": 0.25}),
]


@pytest.mark.parametrize(("name", "recipe", "parameters"), CASES)
def test_a_folder_upcycled_in_parts_is_bitwise_what_memory_gives(
    name, recipe, parameters, tmp_path
):
    source, key = folders.Folder(GOLDEN / name), jax.random.key(7)
    moe = source.config.to_moe(num_experts=3, num_experts_per_tok=2)
    upcycling.upcycle_folder(
        source,
        tmp_path / "streamed",
        moe,
        recipe=recipe,
        key=key,
        max_shard_bytes=60_000,
        **parameters,
    )
    made = jax.jit(
        lambda params: upcycle.upcycle(
            params, source.config, moe, recipe=recipe, key=key, **parameters
        )
    )(source.params())
    hf.save(tmp_path / "whole", moe, made)
    config, streamed = hf.load(tmp_path / "streamed")
    _, whole = hf.load(tmp_path / "whole")
    assert len(list((tmp_path / "streamed").glob("model-*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, streamed, whole)
    assert config.num_experts == 3


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path, monkeypatch):
    source = folders.Folder(GOLDEN / "llama")
    moe = source.config.to_moe(num_experts=2, num_experts_per_tok=1)
    monkeypatch.setattr(folders.Folder, "part", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        upcycling.upcycle_folder(
            source, tmp_path / "out", moe, recipe="naive", key=jax.random.key(0)
        )
    assert not list(tmp_path.iterdir())
