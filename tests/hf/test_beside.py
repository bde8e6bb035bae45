"""The files beside the weights go along: folder to run and back, upcycled, trained from."""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as library

from moe_jax import cards, hf, model, stores, train, tree
from moe_jax import config as configs
from moe_jax.commands import convert, generate, upcycle
from moe_jax.data import tokenizer_training, tokenizers
from moe_jax.hf import beside
from moe_jax.parallel import mesh
from tests.data import tokenizer_folders

MARK = "<|im_end|>"
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": [3, 4], "pad_token_id": 2}
DRAWN = {
    "kind": "bytes",
    "inside": [MARK, "<tool>"],
    "added": [],
    "template": "<s> $A",
    "files": {
        "tokenizer_config.json": {"eos_token": MARK, "chat_template": "{{ messages }}"},
        "special_tokens_map.json": {"pad_token": "[PAD]"},
        "added_tokens.json": {MARK: 3},
        "config.json": {},
        "generation_config.json": {"eos_token_id": [3, 4], "temperature": 0.5},
    },
}


def following(chain: list[int], vocab_size: int) -> tuple[model.ModelConfig, dict]:
    """A model whose likeliest next token is the next of the chain: its layer adds nothing."""
    config = model.ModelConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        model_type="llama",
    )
    leaves = tree.flatten(jax.device_get(model.init(config, jax.random.key(0))))
    leaves["blocks/0/attention/wo"] = jnp.zeros_like(leaves["blocks/0/attention/wo"])
    leaves["blocks/0/mlp/down"] = jnp.zeros_like(leaves["blocks/0/mlp/down"])
    tokens_VD = np.random.default_rng(0).standard_normal((vocab_size, 64)).astype(np.float32)
    unembed_DV = np.zeros((64, vocab_size), np.float32)
    for token, next_token in zip(chain, [*chain[1:], chain[-1]], strict=True):
        unembed_DV[:, next_token] += tokens_VD[token]
    return config, tree.unflatten(leaves | {"embed/tokens": tokens_VD, "unembed": unembed_DV})


@pytest.fixture
def folder(tmp_path):
    """A folder whose model goes on from "a" with "b", <tool>, "c"; <tool> ends a text."""
    path = tmp_path / "folder"
    tokenizer = tokenizers.load(str(tokenizer_folders.build(tmp_path / "files", DRAWN)))
    a, b, c = tokenizer.encode("abc")
    config, params = following([int(a), int(b), 4, int(c)], tokenizer.vocab_size)
    hf.save(path, config, params)
    values = json.loads((path / "config.json").read_text()) | TOKEN_IDS
    tokenizer_folders.build(path, DRAWN | {"files": DRAWN["files"] | {"config.json": values}})
    (path / "chat_template.jinja").write_text("{{ messages[0] }}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    return path


def contents(path: pathlib.Path) -> dict[str, bytes]:
    """The files beside the weights of a folder, and the page that the command wrote."""
    own = ("config.json", "model.safetensors", cards.NAME)
    kept = [file for file in path.rglob("*") if file.is_file() and file.name not in own]
    return {str(file.relative_to(path)): file.read_bytes() for file in kept}


def converted(source: pathlib.Path, output: pathlib.Path, to: str) -> pathlib.Path:
    options = {"dtype": None, "dropless": False, "allow_nonfinite": False}
    convert.run(argparse.Namespace(source=str(source), output=output, to=to, **options))
    return output


def generated(checkpoint: pathlib.Path) -> list[str]:
    options = {"num_tokens": 5, "seed": 0, "tokenizer": None}
    options |= dict.fromkeys(generate.SAMPLING)
    options |= {"checkpoint": str(checkpoint), "allow_nonfinite": False, "offload": None}
    texts = generate.run(argparse.Namespace(prompt=["a"], samples=1, **options))
    return [text.whole for text in texts]


def test_a_folder_a_run_and_a_folder_again_have_the_same_files_and_token_ids(folder, tmp_path):
    run = converted(folder, tmp_path / "run", "orbax")
    run = run.rename(tmp_path / "moved")  # with all that belongs to it
    again = converted(run, tmp_path / "again", "hf")
    copied = converted(folder, tmp_path / "copied", "hf")
    assert len(contents(folder)) == 7
    assert contents(again) == contents(copied) == contents(folder)
    for path in (again, copied):
        values = json.loads((path / "config.json").read_text())
        assert {name: values[name] for name in TOKEN_IDS} == TOKEN_IDS
    assert [generated(path) for path in (folder, run, again)] == [["ab"]] * 3


def test_a_run_that_was_trained_from_a_folder_goes_back_with_its_files(folder, tmp_path):
    text, run = tmp_path / "text", tmp_path / "run"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"{i} ab ba\n" * 20)
    config = configs.default()
    config.init.source = str(folder)
    tokenizer = str(folder / "tokenizer.json")
    config.data.update(source=str(text), tokenizer=tokenizer, validation_fraction=0.5)
    config.data.update(sequence_length=8, cache_dir=str(tmp_path / "cache"))
    config.training.update(num_steps=1, batch_size=8)
    config.evaluation.update(batch_size=8, max_batches=1, final_max_batches=1, prompts=())
    config.optimizer.learning_rate = 1e-9
    (folder / cards.NAME).write_text("---\ntags: [moe_jax]\n---\n\nMade of moonlight.\n")
    train.run(configs.resolve(config), run)
    expected = contents(folder)
    (folder / cards.NAME).write_text("---\ntags: [moe_jax]\n---\n\nNot of this model.\n")
    (folder / "tokenizer.json").unlink()
    again = converted(run, tmp_path / "again", "hf")
    assert contents(again) == expected
    assert json.loads((again / "config.json").read_text())["eos_token_id"] == [3, 4]
    assert generated(run) == generated(again) == ["ab"]
    page, result = (again / cards.NAME).read_text(), json.loads((run / "result.json").read_text())
    assert f"| parent | `{folder.name}` |" in page and "| training | 1 steps, 64 tokens |" in page
    assert f"{result['bits_per_byte']:.4f} bits/byte" in page
    assert page.endswith("## `folder`\n\nMade of moonlight.\n")
    for other in ({"steps": 2}, {"bits_per_byte": None}):  # of another step, or not finite
        (run / "result.json").write_text(json.dumps(result | other))
        model_config = configs.model_of(run)
        assert "held-out text" not in cards.of_conversion(
            model_config, configs.source_of(str(run)), ["convert"]
        )


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_an_upcycled_model_keeps_the_files_beside_its_parent(folder, to, tmp_path):
    arguments = argparse.Namespace(
        source=str(folder),
        output=tmp_path / "moe",
        to=to,
        recipe="naive",
        num_experts=2,
        num_experts_per_tok=1,
        granularity=1,
        router="",
        statistics=None,
        seed=0,
        allow_nonfinite=False,
    )
    upcycle.run(arguments, {}, {})
    made = tmp_path / "moe"
    for row in (
        "parent | `folder`",
        "seed | 0",
        "recipe | `naive` (",
        "before training | equal to",
    ):
        assert f"| {row}" in (made / cards.NAME).read_text()
    copied = (converted(made, tmp_path / "copied", "hf") / cards.NAME).read_text()
    assert copied.index("converted from `moe`") < copied.index("| recipe | `naive` (")
    path = tmp_path / "moe" / ("tokenizer" if to == "orbax" else "")
    assert contents(path) == contents(folder)


def trained():
    return tokenizer_training.sentencepiece_model(["to be or not to be\n"] * 9, "bpe", 280)


def test_a_tokenizer_that_a_run_trained_encodes_prompts_alike_in_a_folder(tmp_path):
    own = tmp_path / "files" / "own.model"
    own.parent.mkdir()
    (own.parent / "tokenizer.json").write_text("{}")  # another's
    own.write_bytes(trained())
    before = tokenizers.load(str(own))
    config, params = following([4, 5], 280)
    stores.save(tmp_path / "run", config, params, tokenizer=str(own))
    path = converted(tmp_path / "run", tmp_path / "folder", "hf")
    after = tokenizers.load(configs.tokenizer_of(path))
    for text in ("to be  not", " Ж\n\tor"):
        np.testing.assert_array_equal(after.prompt(text), before.prompt(text))
        assert after.decode(after.prompt(text)) == text
    ids = [(t.bos_id, t.eos_id, t.pad_id, t.vocab_size) for t in (before, after)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("used", ["tokenizer.json", "tokenizer.model"])
def test_a_run_keeps_both_files_of_a_tokenizer_and_goes_on_with_the_one_it_used(used, tmp_path):
    source = tokenizer_folders.build(tmp_path / "files", DRAWN | {"files": {}}).parent
    (source / "tokenizer.model").write_bytes(trained())
    expected = contents(source)
    config, params = following([4, 5], 300)
    how = {"tokenizer": str(source / used), "source": source}
    stores.save(tmp_path / "run", config, params, **how)
    assert contents(tmp_path / "run" / "tokenizer") == expected
    own = tokenizers.load(configs.tokenizer_of(tmp_path / "run"))
    assert own.fingerprint == tokenizers.load(str(source / used)).fingerprint
    # No file is added that would change how the tokenizer.json is read.
    assert contents(converted(tmp_path / "run", tmp_path / "folder", "hf")) == expected


def test_a_run_keeps_a_trained_folder_whole_and_exports_it(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    texts = ["to be or not to be\n"] * 9
    tokenizer_training.train(texts, own, kind="bpe", vocab_size=280)
    config, params = following([4, 5], 280)
    stores.save(tmp_path / "run", config, params, tokenizer=str(own / "tokenizer.json"))
    path = converted(tmp_path / "run", tmp_path / "folder", "hf")
    for folder in (tmp_path / "run", path):
        kept = tokenizers.load(configs.tokenizer_of(folder))
        assert kept.fingerprint == tokenizers.load(str(own)).fingerprint and kept._twin
    expected = {file.name: file.read_bytes() for file in own.iterdir()}
    assert {name: (path / name).read_bytes() for name in expected} == expected
    theirs = library.Tokenizer.from_file(str(path / "tokenizer.json"))
    assert theirs.encode("to be").ids == kept.prompt("to be").tolist()


def test_a_run_whose_tokenizer_is_gone_says_so(tmp_path, capsys):
    stores.save(tmp_path / "run", *following([4, 5], 280), tokenizer="gone/own.model")
    converted(tmp_path / "run", tmp_path / "folder", "hf")
    assert "keeps no tokenizer, and gone/own.model, which" in capsys.readouterr().err


def test_a_path_in_the_config_of_a_run_leads_to_no_file(tmp_path, capsys):
    """The person who wrote the config may not be the one whose files these are."""
    (tmp_path / "secret.model").write_text("secret")
    stores.save(tmp_path / "run", *following([4, 5], 280))
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    values["data"]["tokenizer"] = str(tmp_path / "secret.model")
    path.write_text(json.dumps(values))
    for to in ("hf", "orbax"):
        made = converted(tmp_path / "run", tmp_path / to, to)
        assert "secret" not in {file.read_text(errors="replace") for file in made.rglob("*.model")}
        assert not list(made.rglob("tokenizer*"))
    with pytest.raises(ValueError, match="give it yourself, by --tokenizer"):
        generated(tmp_path / "run")


def test_a_link_out_of_a_folder_is_no_file_beside_its_weights(folder, tmp_path):
    (folder / "chat_template.json").symlink_to(tmp_path / "files" / "tokenizer.json")
    with pytest.raises(ValueError, match="chat_template.json is a link out of its folder"):
        beside.tokenizer_in(folder)
    with pytest.raises(ValueError, match="chat_template.json is a link out of its folder"):
        converted(folder, tmp_path / "run", "orbax")
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_not_that_of_the_checkpoint_is_refused_with_its_fields(folder, tmp_path):
    run = converted(folder, tmp_path / "run", "orbax")
    path = run / "config.json"
    values = json.loads(path.read_text())
    values["model"]["rope_theta"] = 5e5
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is of another model .*rope_theta is 500000.0"):
        stores.load(run, mesh.one_device())
