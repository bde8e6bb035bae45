"""A folder of other names or dtypes of tensors is read as Transformers reads it, or refused."""

import json
import re
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as oracle

from moe_jax import command_line, hf, stores, tree
from moe_jax.hf import folders, tensors, writing
from moe_jax.upcycle import plan
from tests.hf.test_golden import GOLDEN, loaded


def changed(name, tmp_path, change=lambda name, x: (name, x), **keys):
    """A copy of a golden folder whose tensors and config.json are changed.

    `change` gives a tensor's new name and value, or None to leave it out.
    """
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("*.npz"))
    old = oracle.load_file(folder / "model.safetensors")
    new = dict(filter(None, (change(name, x) for name, x in old.items())))
    oracle.save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | keys))
    return folder


def without_head(name, x):
    return None if name == "lm_head.weight" else (name, x)


def refusal(folder):
    with pytest.raises(tensors.MismatchError) as error:
        hf.load(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


HALVES = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("odd", [*HALVES, np.dtype(np.float32)], ids=str)
def test_one_layer_in_another_dtype_keeps_every_value(name, odd, tmp_path):
    """A merge of two finetunes, or a conversion that was started twice."""
    other = HALVES[odd == HALVES[0]]

    def change(tensor, x):
        return tensor, x.astype(odd if re.search(r"\.1\.", tensor) else other)

    folder = changed(name, tmp_path, change)
    config, params = hf.load(folder)
    for path, leaf in tree.flatten(params).items():
        assert leaf.dtype == (np.float32 if path.startswith("blocks/") else other), path
    hf.save(tmp_path / "out", config, params)
    _, again = hf.load(tmp_path / "out")
    stored = {n: t.astype(np.float32) for n, t in map(change, *zip(*raw(name), strict=True))}
    for found in (hf.load(changed(name, tmp_path / "all", lambda n, _: (n, stored[n])))[1], again):
        jax.tree.map(np.testing.assert_array_equal, found, params)


def raw(name):
    return oracle.load_file(GOLDEN / name / "model.safetensors").items()


def test_weights_of_whole_numbers_are_refused(tmp_path):
    def change(name, x):
        return name, x.astype(np.int8) if name.endswith("1.mlp.up_proj.weight") else x

    message = refusal(changed("llama", tmp_path, change))
    assert "model.layers.1.mlp.up_proj.weight is stored as int8" in message


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral_stacked", "nemotron", "gpt2"])
def test_a_tied_model_saved_without_its_head_may_lack_the_prefix(name, tmp_path):
    tied = {"tie_word_embeddings": True}
    _, want = hf.load(changed(name, tmp_path / "usual", without_head, **tied))

    def bare(name, x):
        return without_head(re.sub(r"^(model|transformer)\.", "", name), x)

    _, params = hf.load(changed(name, tmp_path / "bare", bare, **tied))
    jax.tree.map(np.testing.assert_array_equal, params, want)


def inside(name):
    """The names of a sharded module, each of whose blocks is wrapped."""
    return re.sub(r"layers\.(\d+)\.", r"_fsdp_wrapped_module.layers.\1._fsdp_wrapped_module.", name)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: f"_orig_mod.{name}", "21 names of tensors have '_orig_mod.'"),
        (lambda name: f"module.{name}", "have 'module.'"),
        (lambda name: f"module._orig_mod.{name}", "have 'module._orig_mod.'"),
        (lambda name: f"base_model.model.{name}", "have 'base_model.model.'"),
        (lambda name: f"model.{name}", "have 'model.'"),
        (inside, "have '_fsdp_wrapped_module.'"),
        (lambda name: name.removeprefix("model."), "20 names of tensors lack 'model.'"),
        (lambda name: re.sub("^model", "module", name), "have 'module.' and lack 'model.'"),
    ],
)
def test_a_prefix_is_named_with_an_example(rename, message, tmp_path):
    """Transformers 4.57.6 finds no tensor of these names either, or calls the file corrupted."""
    found = refusal(changed("llama_rope3", tmp_path, lambda name, x: (rename(name), x)))
    assert message in found and "is missing" not in found
    assert re.search(r"such as (\S+) for (\S+);", found)


def test_a_head_beside_names_without_a_prefix_is_refused(tmp_path):
    def change(name, x):
        return name.removeprefix("transformer."), x

    folder = changed("gpt2", tmp_path, change)
    [(name, embedding)] = [(n, x) for n, x in raw("gpt2") if n.endswith("wte.weight")]
    both = oracle.load_file(folder / "model.safetensors") | {"lm_head.weight": embedding}
    oracle.save_file(both, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"lack 'transformer.', such as h.0.attn.c_attn.bias for {name[:12]}" in refusal(folder)


def test_the_calls_that_look_for_a_prefix_grow_as_the_number_of_names():
    """A file of the experts of a large model has 100,000 names."""

    def calls(number):
        wanted = {f"model.layers.{i}.weight" for i in range(number)}
        found = {f"layers.{i + number}.other.weight" for i in range(number)}
        count = 0

        def profile(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            tensors._renamed(found, wanted)
        finally:
            sys.setprofile(None)
        return count

    assert calls(400) < 2.5 * calls(200)


def test_what_a_file_holds_is_shown_beside_what_it_lacks(tmp_path):
    message = refusal(changed("llama", tmp_path, lambda name, x: (name.replace("proj", "lin"), x)))
    assert "_proj.weight is missing" in message and "_lin.weight is not part of" in message


def test_values_beyond_a_dtype_are_counted_by_tensor(tmp_path):
    """float16 ends at 65504; weights of 1e5 exist in released bfloat16 models."""
    config, params = loaded("llama")
    params = jax.tree.map(np.array, params)
    params["blocks"]["0"]["mlp"]["down"][1, 2:4, 0] = 1e5, -7e4
    params["final_norm"]["scale"][0] = np.inf  # that is no value that is lost
    params["embed"]["tokens"][0, 0] = 65504
    named = r"2 values are beyond the largest of float16, 65504: 2 of "
    with pytest.raises(
        ValueError, match=named + r"model\.layers\.1\.mlp\.down_proj\.weight; choose"
    ):
        hf.save(tmp_path / "half", config, params, dtype="float16")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=named + "blocks/0/mlp/down; choose"):
        tensors.cast(params, "float16")
    hf.save(tmp_path / "brain", config, params, dtype="bfloat16")
    assert set(folders.Folder(tmp_path / "brain").dtypes().values()) == {HALVES[1]}


def test_values_beyond_a_dtype_are_held_to_the_dtype_of_their_own_tensor(tmp_path):
    """An upcycled folder has its parent's dtypes, which may differ from leaf to leaf."""
    config, params = loaded("llama")
    leaves = tree.flatten(jax.tree.map(np.array, params))
    leaves["final_norm/scale"][0] = 1e5
    dtypes = {path: np.dtype(np.float32) for path in leaves}
    dtypes["final_norm/scale"] = HALVES[0]
    message = r"1 values are beyond the largest of float16, 65504: 1 of model\.norm\.weight"
    with pytest.raises(ValueError, match=message):
        writing.write(tmp_path / "out", config, dtypes, lambda part: leaves[part.path][part.row])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named_with_their_tensor_and_number(dtype, value, tmp_path):
    source = folders.Folder(GOLDEN / "llama")
    params = tensors.cast(source.params(), dtype)
    params["blocks"]["0"]["mlp"]["up"][1, 2, 3:5] = value
    hf.save(tmp_path / "model", source.config, params)
    message = r"2 values of model.layers.1.mlp.up_proj.weight are not finite"
    folder = folders.Folder(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        folder.params()
    with pytest.raises(ValueError, match=message):
        hf.load(tmp_path / "model")
    config = source.config.to_moe(num_experts=2, num_experts_per_tok=2)
    made_of = plan.make(source.config, config, recipe="naive", num_parents=1, parameters={})
    with pytest.raises(ValueError, match=message):
        stores.upcycle_folders(made_of, [folder], tmp_path / "moe", jax.random.key(0))
    assert not (tmp_path / "moe").exists()


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_local_experts", "head_dim")


@pytest.mark.parametrize("keys", [(name,) for name in SIZES] + [SIZES])
def test_sizes_that_the_files_do_not_hold_are_refused_before_memory_is_taken(keys, tmp_path):
    largest = {name: 2**31 - 2 for name in keys}
    folder = changed("mixtral", tmp_path, **largest)
    before = command_line.peak_memory()
    assert re.search(r" is \[.*\], not \[|make [\d,]+ tensors, but", refusal(folder))
    assert float(command_line.peak_memory()[:-3]) < float(before[:-3]) + 0.5
    folder = changed("llama", tmp_path, num_hidden_layers=257)
    with pytest.raises(ValueError, match="num_hidden_layers=257 must be a whole number"):
        hf.load(folder)
