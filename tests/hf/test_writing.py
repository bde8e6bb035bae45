"""A folder that is written says of its model what is true, whatever the folder beside it said."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import hf, stores
from moe_jax.hf import configs, tensors
from moe_jax.parallel import mesh as meshes
from tests.hf.test_golden import GOLDEN, loaded

FULL = "full_attention"


def parent_of(name, tmp_path, **changes):
    """A copy of a golden folder without its weights, whose config.json has `changes`."""
    folder = tmp_path / "parent"
    shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.npz"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    return folder


def written(name, tmp_path, source, **changes):
    config, params = loaded(name)
    hf.save(tmp_path / "out", dataclasses.replace(config, **changes), params, source=source)
    return json.loads((tmp_path / "out" / "config.json").read_text())


def test_only_known_keys_of_the_folder_beside_it_go_along(tmp_path):
    """The folder may hold another model of the family: deeper, quantised, looking both ways."""
    known = {"eos_token_id": [2, 5], "attention_dropout": 0.25, "use_cache": False}
    others = {
        "quantization_config": {"quant_method": "awq"},
        "layer_types": [FULL] * 32,
        "is_causal": False,
        "hidden_act": "gelu",
        "num_labels": 3,
        "transformers_version": "4.1.0",
        "auto_map": {"AutoConfig": "configuration_x.XConfig"},
    }
    values = written("llama", tmp_path, parent_of("llama", tmp_path, **known, **others))
    assert known.items() <= values.items()
    assert values.keys() & others.keys() == {"hidden_act"} and values["hidden_act"] == "silu"
    assert hf.load(tmp_path / "out")[0] == loaded("llama")[0]


def test_a_model_of_another_family_has_only_the_token_ids(tmp_path):
    changes = {"attention_dropout": 0.25, "tokenizer_class": "LlamaTokenizer"}
    values = written("llama", tmp_path, parent_of("mistral", tmp_path, **changes))
    assert values["tokenizer_class"] == "LlamaTokenizer" and "attention_dropout" not in values


@pytest.mark.parametrize("there", [("modeling_x",), ("modeling_x", "configuration_x")])
def test_code_that_auto_map_names_goes_along_whole_or_not_at_all(there, tmp_path):
    auto_map = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForCausalLM": "modeling_x.XForCausalLM",
        "AutoTokenizer": ["tokenization_x.XTokenizer", None],
    }
    folder = parent_of("skywork", tmp_path, auto_map=auto_map)
    for name in (*there, "tokenization_x", "imported_by_it"):
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name} was run')")
    values = written("skywork", tmp_path, folder)
    names = {path.stem for path in (tmp_path / "out").glob("*.py")}
    if len(there) == 2:
        assert values["auto_map"] == auto_map
        assert names == {*there, "tokenization_x", "imported_by_it"}
    else:
        assert "auto_map" not in values and not names


def test_code_of_another_repository_stays_named(tmp_path):
    auto_map = {"AutoConfig": "someone/x--configuration_x.XConfig"}
    values = written("skywork", tmp_path, parent_of("skywork", tmp_path, auto_map=auto_map))
    assert values["auto_map"] == auto_map


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
def test_a_count_is_written_in_one_spelling(name, tmp_path):
    """Both spellings, one of them carried along, disagreed after pruning."""
    spellings = {"num_experts", "num_local_experts"}
    parent = parent_of(name, tmp_path)
    values = json.loads((parent / "config.json").read_text())
    [old] = spellings & values.keys()
    [other] = spellings - {old}
    (parent / "config.json").write_text(json.dumps({**values, other: values.pop(old)}))
    values = written(name, tmp_path, parent)
    [spelling] = spellings & values.keys()
    # Transformers 4 reads these and no other.
    assert spelling == ("num_local_experts" if name == "mixtral" else "num_experts")
    assert configs.read(values).num_experts == loaded(name)[0].num_experts


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_folder_becomes_a_run_and_a_folder_in_the_dtype_it_has(dtype, tmp_path):
    """Every released model is bfloat16; its checkpoint could be written but not read."""
    config, params = loaded("llama_bf16")
    how = {"source": GOLDEN / "llama_bf16", "dtype": dtype}
    stores.save_as("orbax", tmp_path / "run", config, params, **how)
    again, of_run = stores.load(tmp_path / "run", meshes.one_device())
    stores.save_as("hf", tmp_path / "out", again, of_run, source=tmp_path / "run")
    _, found = hf.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, found, tensors.cast(params, dtype or "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype or jnp.bfloat16)}
