"""Every file that a command reads of a stranger's folder is read, or refused in one line.

By default a few examples of each; many under --long.
"""

import json
import pathlib
import shutil
import types

import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import model, strict_json
from moe_jax.config import environment
from moe_jax.data import (
    batches,
    corpus,
    prepare,
    tokenizer_files,
    tokenizer_training,
    tokenizers,
)
from moe_jax.hf import configs as hf_configs
from moe_jax.hf import safetensors
from moe_jax.training import bounds, metrics, saving
from tests.data import tokenizer_folders
from tests.fuzz import mutations
from tests.hf.test_golden import GOLDEN

CONFIG = model.ModelConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=4,
)
FAMILIES = ("llama_rope3", "gpt2", "qwen3_moe_mixed", "olmoe", "skywork", "lola", "mixtral")
TOKENIZER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("config.json", "generation_config.json"),
)
META = {
    "data": {
        "step": 3,
        "text": {"train": "a" * 64},
        "lineage": {"tokens": 5, "training_flops": 0.0, "parents": ["a"]},
        "losses": {"2": 1.5},
        "left_out": [[0, 1]],
    },
    "config": {"seed": 0},
    "leaves": {"params/w": [[2, 3], "float32"], "step": [[], "int32"]},
    "digests": {"params/w": 7, "step": 8},
}


def tensors(folder):
    for tensor in safetensors.open_folder(folder).values():
        tensor.read()


def tokenizer(folder):
    name = next(n for n in ("tokenizer.json", "tokenizer.model") if (folder / n).exists())
    read = tokenizers.load(str(folder / name))
    ids = read.prompt("a <s> é1")
    read.decode(read.encode("a <s> é1"))
    assert ids.dtype == np.int32 and ids.min() >= 0
    tokenizer_files.ends(tokenizer_files.Folder(folder))


def run_config(folder):
    stored = configs.load_json(folder)
    configs.model_of(folder)
    configs.of_stored(stored)
    configs.tokenizer_of(folder)


def manifest(folder):
    read = corpus.TokenizedCorpus.load(folder)
    assert read.num_tokens and read.bytes_per_token and read.byte_unigram_bits


def description(folder):
    meta = json.loads((folder / "meta.json").read_text())
    bounds.check_form(meta)
    data = meta["data"]
    run = types.SimpleNamespace(config=configs.default(), checkpoint=None)
    saving.Saver(folder, run, (), data.get("losses", {}))
    batches.number(9, data.get("left_out", []))
    environment.changed_versions(data.get("versions", {}))
    strict_json.text(data).encode()
    1.0 * data.get("lineage", {}).get("tokens", 0)


def rows(folder):
    for row in metrics.read(folder / "metrics.jsonl"):
        assert type(row["step"]) is int
    metrics._rows(folder / "metrics.jsonl")


def golden(name, folder):
    shutil.copytree(GOLDEN / name, folder)


def a_tokenizer(folder):
    drawn = {
        "kind": "bytes",
        "inside": ["<|end|>"],
        "added": ["<tool>"],
        "template": "<s> $A",
        "files": {
            "tokenizer_config.json": {"eos_token": "<|end|>", "add_prefix_space": False},
            "special_tokens_map.json": {"pad_token": "[PAD]"},
            "added_tokens.json": {"<|end|>": 3},
            "config.json": {"model_type": "llama", "eos_token_id": [3, 4], "bos_token_id": 1},
            "generation_config.json": {"eos_token_id": 3},
        },
    }
    tokenizer_folders.build(folder, drawn)


def a_model(folder, beside=False):
    folder.mkdir()
    trained = tokenizer_training.sentencepiece_model(["to be or not to be\n"] * 9, "bpe", 280)
    (folder / "tokenizer.model").write_bytes(trained)
    if beside:
        (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')


def a_run(folder):
    config = configs.default()
    config.model.update(vars(CONFIG))
    config.data.tokenizer = "bytes"
    folder.mkdir()
    configs.save_json(config, folder)


def a_corpus(folder):
    text = folder.parent / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} and {n}"}) + "\n" for n in range(5)))
    how = {"validation_fraction": 0.0, "cache": folder.parent / "cache"}
    made = prepare.open_corpus(str(text), "train", tokenizers.load("bytes"), **how)
    shutil.copytree(made.folder, folder)


def a_description(folder):
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps(META))


def a_log(folder):
    folder.mkdir()
    row = {"step": 2, "loss": 1.5, "router": {"load": [[0.5, 0.5]]}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)))


TARGETS = {
    "header": (lambda folder: golden("llama", folder), "model.safetensors", tensors),
    "index": (
        lambda folder: golden("mixtral_sharded", folder),
        "model.safetensors.index.json",
        tensors,
    ),
    **{
        name: (lambda folder, name=name: golden(name, folder), "config.json", hf_configs.of_folder)
        for name in (
            "llama_rope3",
            "gpt2",
            "qwen3_moe_mixed",
            "olmoe",
            "skywork",
            "lola",
            "mixtral",
        )
    },
    **{name: (a_tokenizer, name, tokenizer) for name in ("tokenizer.json", *TOKENIZER_FILES)},
    "tokenizer.model": (a_model, "tokenizer.model", tokenizer),
    "tokenizer.model with files": (
        lambda folder: a_model(folder, beside=True),
        "tokenizer.model",
        tokenizer,
    ),
    "manifest": (a_corpus, "manifest.json", manifest),
    "metrics": (a_log, "metrics.jsonl", rows),
    "run": (a_run, "config.json", run_config),
    "description": (a_description, "meta.json", description),
}


@pytest.mark.parametrize("examples", [25, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("target", TARGETS)
def test_a_file_is_read_or_refused_in_one_line(target, examples, tmp_path):
    make, name, read = TARGETS[target]
    folder: pathlib.Path = tmp_path / "folder"
    make(folder)
    read(folder)
    content = (folder / name).read_bytes()

    def check(changed: bytes) -> None:
        (folder / name).write_bytes(changed)
        try:
            read(folder)
        except ValueError as error:
            assert str(error) and len(str(error)) < 5000

    mutations.run(check, mutations.strange(content, name.endswith(".json")), examples)
