"""The tokenizer of a Hugging Face folder is that of Transformers, whichever file names a token."""

import collections
import json
import pathlib

import pytest

from moe_jax.data import tokenizers
from tests.data import tokenizer_folders

RECORDED = json.loads(tokenizer_folders.GOLDEN.read_text())


def check(folder, drawn, theirs):
    ours = tokenizers.load(str(tokenizer_folders.build(folder, drawn)))
    prompts = [ours.prompt(prompt).tolist() for prompt in tokenizer_folders.PROMPTS]
    assert prompts == theirs["prompts"]
    assert [ours.decode(ids) for ids in (*prompts, *drawn["decoded"])] == theirs["texts"]
    # A generation_config.json without ends lets Transformers never end; here others name them.
    others = drawn["files"]["config.json"].get("eos_token_id") or [ours.eos_id]
    others = others if isinstance(others, list) else [others]
    assert list(ours.end_ids) == (theirs["ends"] or others)
    names = drawn["files"].get("tokenizer_config.json", {})
    if "added_tokens_decoder" not in names:
        names = names | drawn["files"].get("special_tokens_map.json", {})
    for role, own in (("bos", ours.bos_id), ("eos", ours.eos_id)):
        assert not names.get(f"{role}_token") or own == theirs[role]
    ids = [i for prompt in tokenizer_folders.PROMPTS for i in ours.encode(prompt)]
    assert max(*ids, ours.bos_id, ours.eos_id) < ours.vocab_size


@pytest.mark.parametrize("seed", range(len(RECORDED)))
def test_ids_texts_and_ends_are_those_recorded_of_transformers(seed, tmp_path):
    check(tmp_path, tokenizer_folders.draw(seed), RECORDED[seed])


def test_the_recorded_folders_are_of_every_kind_and_name_ends_in_each_of_the_four_files():
    drawn = [tokenizer_folders.draw(seed) for seed in range(len(RECORDED))]
    assert {d["kind"] for d in drawn} == set(tokenizer_folders.KINDS)
    for file, key in {
        "generation_config.json": "eos_token_id",
        "config.json": "eos_token_id",
        "tokenizer_config.json": "eos_token",
        "special_tokens_map.json": "eos_token",
    }.items():
        values = [d["files"].get(file, {}).get(key) for d in drawn]
        assert len({type(value) for value in values}) >= 3  # absent, one, and a list or an object
    assert sum("added_tokens.json" in d["files"] for d in drawn) > 10


@pytest.mark.long
def test_folders_drawn_anew_are_read_as_transformers_reads_them(tmp_path):
    pytest.importorskip("transformers", minversion="5.24", reason="needs pip install transformers")
    for seed in range(500):
        drawn, folder = tokenizer_folders.draw(seed), tmp_path / str(seed)
        tokenizer_folders.build(folder, drawn)
        theirs = tokenizer_folders.of_transformers(folder, drawn)
        assert seed >= len(RECORDED) or theirs == RECORDED[seed]
        check(folder, drawn, theirs)


@pytest.mark.parametrize("name", ["lstrip", "rstrip", "single_word", "normalized", "special"])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_an_added_token_of_other_properties_makes_another_fingerprint(kind, name, tmp_path):
    """The token is found elsewhere in a text, so the tokenizers must not share cached rows."""
    drawn = tokenizer_folders.draw(0) | {"kind": kind, "inside": [], "added": []}
    drawn |= {"model": "bpe", "prefix": False}  # with a prefix no token is normalized
    prints = []
    for value in (False, True):
        number = tokenizer_folders.vocabulary_size(kind, [])
        token = {"content": "<tool>", "special": True, "normalized": False, name: value}
        listed = {"added_tokens_decoder": {str(number): token}, "eos_token": "</s>"}
        files = {"tokenizer_config.json": listed, "config.json": {"model_type": "llama"}}
        folder = tmp_path / str(value)
        path = tokenizer_folders.build(folder, drawn | {"files": files})
        prints.append(tokenizers.load(str(path)).fingerprint)
    assert prints[0] != prints[1]


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_a_byte_order_mark_before_any_file_changes_nothing(seed, tmp_path):
    drawn = tokenizer_folders.draw(seed)
    path = tokenizer_folders.build(tmp_path, drawn)
    for file in tmp_path.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    marked = tokenizers.load(str(path))
    for prompt, ids in zip(tokenizer_folders.PROMPTS, RECORDED[seed]["prompts"], strict=True):
        assert marked.prompt(prompt).tolist() == ids


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_every_file_is_read_once(kind, tmp_path, monkeypatch):
    drawn = tokenizer_folders.draw(0) | {"kind": kind, "files": {"config.json": {"model_type": ""}}}
    path = tokenizer_folders.build(tmp_path, drawn)
    counts = collections.Counter()
    for read in (pathlib.Path.read_text, pathlib.Path.read_bytes):

        def counted(self, read=read, **how):
            counts[self.name] += 1
            return read(self, **how)

        monkeypatch.setattr(pathlib.Path, read.__name__, counted)
    tokenizers.load(str(path))
    assert counts["config.json"] == counts[path.name] == 1 and set(counts.values()) == {1}
