"""Rows are shown as the model gets them, with what is trained between marks."""

import json
import sys

import pytest
import tokenizers as hf_tokenizers

from moe_jax.commands import show_data
from moe_jax.data import tokenizers


@pytest.fixture
def talks(tmp_path, monkeypatch):
    """The flags of a config for forty conversations."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with open(tmp_path / "talks.jsonl", "w") as file:
        for n in range(40):
            turns = {"prompt": f"{n}?", "completion": f"{n}."}
            file.write(json.dumps(turns) + "\n")
    source = f"--config.data.source={tmp_path / 'talks.jsonl'}"
    return [source, "--config.data.conversations=True"]


def shown(monkeypatch, capsys, *options):
    arguments = ["--config=configs/quickstart.py", *options]
    monkeypatch.setattr(sys, "argv", ["show_data.py", *arguments])
    show_data.main()
    return capsys.readouterr().out


def test_a_run_says_that_concat_cuts_conversations(talks, monkeypatch, capsys):
    arguments = ["show_data.py", "--config=configs/quickstart.py", *talks]
    for packing, cuts in (("concat", True), ("best_fit", False)):
        monkeypatch.setattr(sys, "argv", [*arguments, f"--config.data.packing={packing}"])
        show_data.main()
        assert ("concat cuts conversations" in capsys.readouterr().err) == cuts


def test_the_answers_of_conversations_are_marked(talks, monkeypatch, capsys):
    text = shown(monkeypatch, capsys, *talks, "--rows=2", "--config.data.packing=best_fit")
    rows = text.split("row ")[1:]
    assert len(rows) == 2
    for document in text.split("-" * 20)[:-1]:
        prompt, _, answer = document.partition("[[")
        number = prompt.split("user:\n")[1].split("?")[0]
        assert answer.strip() == f"{number}.</s>\n]]"  # one sees that the turn's end is trained
        assert prompt.endswith(f"user:\n{number}?</s>\nassistant:\n")


def test_all_of_a_text_is_marked(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, "--row=3")
    assert "row 3: 128 of 128 tokens" in text and "128 tokens with a loss" in text
    assert text.count("[[") == text.count("-" * 20)


def test_special_tokens_stand_where_they_are(tmp_path):
    """A template's tokens of a Hugging Face tokenizer, also some in a row and at the ends."""
    made = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE({c: i for i, c in enumerate("ab")}, []))
    made.add_special_tokens(["<|im_end|>", "<s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = tokenizers.load(str(tmp_path / "tokenizer.json"))
    text = "<s>a<|im_end|><|im_end|>b<s>"
    ids = tokenizer.with_offsets(text)[0]
    assert show_data._decoded(ids, tokenizer) == text
