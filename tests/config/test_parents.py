"""A run takes from its parent what its config leaves out: model, tokenizer, length of rows."""

import dataclasses
import json

import jax
import pytest
import sentencepiece
import tokenizers as library

from moe_jax import config as configs
from moe_jax import hf, model, stores
from moe_jax.config import environment, machine
from moe_jax.data import tokenizers
from moe_jax.model import comparison

CONFIG = model.ModelConfig(
    vocab_size=300,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
)
SOURCES = ("folder", "run")
# A folder has no tokenizer of bytes, and a run always has one.
PAIRS = [("folder", kind) for kind in ("json", "sentencepiece", "none")]
PAIRS += [("run", kind) for kind in ("json", "sentencepiece", "bytes")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A parent of each kind with a tokenizer of each kind; a folder may have none."""
    root = tmp_path_factory.mktemp("parents")
    words = library.models.WordLevel({"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<unk>": 4}, "<unk>")
    library.Tokenizer(words).save(str(root / "words.json"))
    text = root / "text.txt"
    text.write_text("one and two are three, three and four are seven\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(root / "pieces"), vocab_size=20, minloglevel=2
    )
    params = jax.jit(lambda: model.init(CONFIG, jax.random.key(0)))()
    files = {"json": root / "words.json", "sentencepiece": root / "pieces.model"}
    usual = {"json": "tokenizer.json", "sentencepiece": "tokenizer.model"}
    for source, kind in PAIRS:
        if source == "run":
            stores.save(root / f"run-{kind}", CONFIG, params, tokenizer=str(files.get(kind, kind)))
            continue
        hf.save(root / f"folder-{kind}", CONFIG, params)
        if kind in files:
            (root / f"folder-{kind}" / usual[kind]).write_bytes(files[kind].read_bytes())
    return root


def config_of(source, **keys):
    config = configs.default()
    config.init.source = str(source)
    config.mesh.fsdp = 1
    config.mesh.data = -1
    config.update_from_flattened_dict(keys)
    return config


@pytest.mark.parametrize(("source", "kind"), PAIRS)
def test_a_tokenizer_that_is_left_out_is_the_sources_own_or_an_error(root, source, kind):
    folder = root / f"{source}-{kind}"
    if kind == "none":
        with pytest.raises(configs.ConfigError, match="tokenizer is not set, and .* has no token"):
            configs.resolve(config_of(folder))
        return
    run = configs.resolve(config_of(folder))
    own = {"bytes": "bytes", "json": root / "words.json", "sentencepiece": root / "pieces.model"}
    expected = tokenizers.load(configs.tokenizer_of(folder)).fingerprint
    assert tokenizers.load(run.data.tokenizer).fingerprint == expected
    if source == "run":
        assert expected == tokenizers.load(str(own[kind])).fingerprint
    environment.validate_environment(run, 8)


@pytest.mark.parametrize("source", SOURCES)
def test_another_tokenizer_than_the_sources_is_refused_unless_it_is_asked_for(root, source):
    folder = root / f"{source}-json"
    run = configs.resolve(config_of(folder, **{"data.tokenizer": "bytes"}))
    with pytest.raises(configs.ConfigError, match="'bytes' is not the tokenizer of .*leave it out"):
        environment.validate_environment(run, 8)
    both = {"data.tokenizer": "bytes", "data.other_tokenizer": True}
    environment.validate_environment(configs.resolve(config_of(folder, **both)), 8)


@pytest.mark.parametrize("source", SOURCES)
def test_the_model_and_the_rows_are_the_sources(root, source):
    run = configs.resolve(config_of(root / f"{source}-json", **{"data.sequence_length": 0}))
    assert run.data.sequence_length == 64
    assert comparison.in_force(run.model) == comparison.in_force(CONFIG)
    recipe = {"init.upcycle.recipe": "drop", "model.num_experts": 4}
    sparse = configs.resolve(config_of(root / f"{source}-json", **recipe)).model
    expected = dataclasses.replace(CONFIG, num_experts=4)
    assert comparison.in_force(sparse) == comparison.in_force(expected)


def test_what_a_run_stores_needs_no_parent(root, tmp_path):
    """Its config.json holds what came from the parent, which may be gone later."""
    run = configs.resolve(config_of(root / "folder-json", **{"data.sequence_length": 0}))
    configs.save_json(run.config, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model"]["hidden_size"] == 8 and stored["data"]["sequence_length"] == 64
    stored["init"]["source"] = "gone"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert configs.of_stored(configs.load_json(tmp_path)).model == run.model


def test_a_run_without_a_source_has_bytes():
    config = configs.default()
    config.model.preset = "quickstart"
    assert configs.resolve(config).data.tokenizer == "bytes"


def test_a_source_that_is_not_there_is_named_with_the_way_to_fetch_it():
    with pytest.raises(configs.ConfigError, match="hf download org/name --local-dir"):
        configs.resolve(config_of("org/name"))


@pytest.mark.parametrize("name", ["continue", "upcycle"])
def test_the_configs_for_a_model_of_ones_own_need_a_source_and_a_text(root, name):
    with pytest.raises(configs.ConfigError, match="lacks .* leave the model to config.init"):
        configs.resolve(configs.load(f"configs/{name}.py"))
    config = configs.load(f"configs/{name}.py", {"init.source": str(root / "run-bytes")})
    run = configs.resolve(config)
    assert (run.model.num_experts, run.data.tokenizer) == (8 * (name == "upcycle"), "bytes")
    with pytest.raises(configs.ConfigError, match="data.source is not set"):
        environment.validate_environment(run, 8)


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ("9.0\n9.0", "bfloat16"),
        ("9.0\n7.5", "float32"),
        ("", "float32"),
        ("Failed to initialize NVML", "float32"),
    ],
)
def test_auto_is_bfloat16_on_gpus_that_have_units_for_it(said, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{said}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert machine.dtype_here() == dtype
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert machine.dtype_here() == dtype
    assert machine.has_accelerator()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert machine.dtype_here() == "float32"
    assert not machine.has_accelerator()


def test_a_mixture_that_becomes_dense_is_as_wide_as_an_expert(tmp_path):
    sparse = CONFIG.to_moe(
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=4, norm_topk_prob=False
    )
    stores.save(tmp_path / "moe", sparse, jax.jit(lambda: model.init(sparse, jax.random.key(0)))())
    keys = {"init.upcycle.recipe": "merge_back", "model.num_experts": 0}
    dense = configs.resolve(config_of(tmp_path / "moe", **keys)).model
    assert (dense.num_experts, dense.intermediate_size, dense.layers) == (0, 4, None)


def test_a_model_that_only_its_training_is_refused_for_is_still_a_parent(tmp_path):
    """What `upcycle.py` may write, other commands read: `resolve` asks more, of what is trained."""
    top_1 = CONFIG.to_moe(num_experts=2, num_experts_per_tok=1)
    short = dataclasses.replace(CONFIG, position_embedding="learned", max_position_embeddings=16)
    for name, config in (("top_1", top_1), ("short", short)):
        params = jax.jit(lambda config=config: model.init(config, jax.random.key(0)))()
        stores.save(tmp_path / name, config, params)
        found = configs.model_of(tmp_path / name)
        assert comparison.in_force(found) == comparison.in_force(config)
