"""Folder to folder, an expert at a time, gives what the in-memory path gives."""

import dataclasses
import itertools
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_jax import hf, stores, upcycle
from moe_jax.hf import folders, tensors
from moe_jax.upcycle import plan, streaming, transform
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
    made_of = plan.make(source.config, moe, recipe=recipe, parameters=parameters)
    stores.upcycle_folders(made_of, [source], tmp_path / "streamed", key, max_shard_bytes=60_000)
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


def of_mixture(source, **sizes):
    return dataclasses.replace(source, model_type=None, **sizes)


SIMILARITY = np.random.default_rng(0).random((1, 5, 5)) * np.ones((8, 1, 1))
OTHERS = [
    (
        *("llama", "virtual_group+drop", {"scaling": "exact"}, None),
        lambda c: c.to_moe(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=c.intermediate_size // 2
        ),
    ),
    (
        *("llama", "branch_train_mix", {}, None),
        lambda c: c.to_moe(num_experts=4, num_experts_per_tok=2),
    ),
    (
        *("mixtral", "expert_upcycling", {}, None),
        lambda c: of_mixture(c, num_experts=c.num_experts + 1),
    ),
    (
        *("mixtral", "diversify_merge", {}, {"similarity": SIMILARITY}),
        lambda c: of_mixture(c, num_experts=2),
    ),
    (*("mixtral", "merge_back", {}, None), lambda c: c.to_dense()),
    # Every second layer is dense, and stored in another dtype than the experts.
    (*("lola", "merge_back", {}, None), lambda c: c.to_dense()),
]


@pytest.mark.parametrize(
    ("name", "recipe", "parameters", "statistics", "config_of"),
    [
        pytest.param(*case, marks=pytest.mark.long if i in (0, 2) else ())
        for i, case in enumerate(OTHERS)
    ],
)
def test_several_parents_and_mixtures_stream_bitwise_too(
    name, recipe, parameters, statistics, config_of, tmp_path
):
    sources, key = [folders.Folder(GOLDEN / name)], jax.random.key(7)
    config = config_of(sources[0].config)
    if recipe == "branch_train_mix":
        other = jax.tree.map(lambda w: (w * 1.5).astype(w.dtype), sources[0].params())
        hf.save(tmp_path / "other", sources[0].config, other)
        sources.append(folders.Folder(tmp_path / "other"))
    if name == "lola":
        params = sources[0].params()
        params["blocks"]["0"]["mlp"] = tensors.cast(params["blocks"]["0"]["mlp"], "bfloat16")
        hf.save(tmp_path / "mixed", sources[0].config, params)
        sources = [folders.Folder(tmp_path / "mixed")]
    if statistics:
        L = sources[0].config.num_hidden_layers
        statistics = {n: x[:L] for n, x in statistics.items()}
    made_of = plan.make(
        sources[0].config,
        config,
        recipe=recipe,
        num_parents=len(sources),
        statistics=statistics,
        parameters=parameters,
    )
    stores.upcycle_folders(made_of, sources, tmp_path / "streamed", key)
    made = jax.jit(lambda parents: transform.execute(made_of, parents, key))(
        [source.params() for source in sources]
    )
    hf.save(tmp_path / "whole", config, made)
    loaded, streamed = hf.load(tmp_path / "streamed")
    jax.tree.map(np.testing.assert_array_equal, streamed, hf.load(tmp_path / "whole")[1])
    assert loaded.num_experts == config.num_experts


@pytest.mark.parametrize("number", [1, 2])
def test_each_parents_feed_forward_is_read_once_for_all_experts_of_it(number, monkeypatch):
    """The next expert is prefetched where it is of the same parent."""
    read, part = [], folders.Folder.part

    def counted(folder, path, row):
        read.append((id(folder), path, row))
        return part(folder, path, row)

    monkeypatch.setattr(folders.Folder, "part", counted)
    parents = [folders.Folder(GOLDEN / "llama") for _ in range(number)]
    config = parents[0].config.to_moe(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=LLAMA.intermediate_size // 2
    )
    recipe = {1: "virtual_group", 2: "divmoe"}[number]
    made_of = plan.make(parents[0].config, config, recipe=recipe, num_parents=number, parameters={})
    stream = streaming.Stream(made_of, parents, jax.random.key(0))
    for layer, expert, name in itertools.product(range(2), range(4), ("gate", "up", "down")):
        stream.part(f"blocks/0/moe/experts/{name}", (layer, expert))
    assert len(read) == len(set(read)) == 2 * number * 3


def test_parents_stored_in_other_dtypes_are_refused_before_anything_is_written(tmp_path):
    first = folders.Folder(GOLDEN / "llama")
    hf.save(tmp_path / "half", first.config, tensors.cast(first.params(), "bfloat16"))
    moe = first.config.to_moe(num_experts=2, num_experts_per_tok=1)
    parents = [first, folders.Folder(tmp_path / "half")]
    made_of = plan.make(first.config, moe, recipe="branch_train_mix", num_parents=2, parameters={})
    message = r"/half is not stored .* of .*/llama: embed/tokens is bfloat16, not float32; convert"
    with pytest.raises(ValueError, match=message):
        stores.upcycle_folders(made_of, parents, tmp_path / "out", jax.random.key(0))
    assert not (tmp_path / "out").exists()


def test_a_part_has_the_dtype_of_its_leaf(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    weights = safetensors.numpy.load_file(GOLDEN / "llama" / "model.safetensors")
    weights[name] = weights[name].astype(np.float16)
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    shutil.copyfile(GOLDEN / "llama" / "config.json", tmp_path / "config.json")
    folder = folders.Folder(tmp_path)
    leaf, part = folder.leaf("blocks/0/mlp/up"), folder.part("blocks/0/mlp/up", (1,))
    assert leaf.dtype == part.dtype == np.float32
    np.testing.assert_array_equal(leaf[1], part)


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path, monkeypatch):
    source = folders.Folder(GOLDEN / "llama")
    moe = source.config.to_moe(num_experts=2, num_experts_per_tok=1)
    made_of = plan.make(source.config, moe, recipe="naive", parameters={})
    monkeypatch.setattr(folders.Folder, "part", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stores.upcycle_folders(made_of, [source], tmp_path / "out", jax.random.key(0))
    assert not list(tmp_path.iterdir())


LLAMA = folders.Folder(GOLDEN / "llama").config


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 8192},
        {"initializer_range": 0.5, "model_type": "mistral"},
        {"num_key_value_heads": LLAMA.num_kv_heads, "head_dim": LLAMA.head_size},
        {"capacity_factor": 2.0, "num_experts_per_tok": 1},
        {"layer_types": ("full_attention",) * LLAMA.num_hidden_layers, "sliding_window": 8},
        {"dtype": "bfloat16", "remat": "none"},
    ],
)
def test_parents_may_differ_in_what_computes_nothing(changes):
    stores.check_alike({"a": LLAMA, "b": dataclasses.replace(LLAMA, **changes)})


@pytest.mark.parametrize(
    ("one", "changes", "message"),
    [
        ({}, {"rms_norm_eps": 1.0}, "rms_norm_eps is 1.0, not 0.003"),
        (
            {},
            {"rope_theta": 5.0, "qk_norm": "head"},
            "qk_norm is 'head', not 'none'; rope_theta is 5.0",
        ),
        ({}, {"sliding_window": 8}, "layer_types is (8, 8, 8), not (None, None, None)"),
        (
            {"position_embedding": "learned"},
            {"max_position_embeddings": 8192},
            "max_position_embeddings is 8192, not 64",
        ),
        (
            {"num_experts": 4, "dispatch": "capacity"},
            {"capacity_factor": 2.0},
            "capacity_factor is 2.0, not 1.25",
        ),
    ],
)
def test_the_fields_in_which_parents_differ_are_named_with_both_values(one, changes, message):
    first = dataclasses.replace(LLAMA, **one)
    with pytest.raises(ValueError) as error:
        stores.check_alike({"a": first, "b": dataclasses.replace(first, **changes)})
    assert f"b is another model than a: {message}" in str(error.value)
    assert "\n" not in str(error.value)
