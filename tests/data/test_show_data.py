"""Rows are shown as the model gets them, with what is trained between marks."""

import json
import sys

import pytest

from moe_jax.commands import show_data


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
        assert answer.strip() == f"{number}.\n]]"


def test_all_of_a_text_is_marked(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, "--row=3")
    assert "row 3: 128 of 128 tokens" in text and "128 tokens with a loss" in text
    assert text.count("[[") == text.count("-" * 20)
