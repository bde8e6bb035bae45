"""The command evaluate: any model's folder on any text, without training."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from moe_jax import hf, model, stores
from moe_jax.commands import evaluate
from moe_jax.data import tokenizers
from tests import drawn
from tests.hf.test_golden import GOLDEN

CONFIG = model.ModelConfig(
    vocab_size=259,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=2,
    num_experts_per_tok=2,
)
TEXTS = {"en": "one and two are three", "ja": "一たす二は三"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, a text of two labels, and the nats of each label by a plain loop."""
    root = tmp_path_factory.mktemp("evaluate")
    params = drawn.parameters(CONFIG)
    stores.save(root / "model-0123456789", CONFIG, params)
    lines = [json.dumps({"text": text, "language": label}) for label, text in TEXTS.items()]
    (root / "text.jsonl").write_text("\n".join(lines))
    nats, apply = {}, jax.jit(model.apply, static_argnums=2)
    for label, text in TEXTS.items():
        ids = np.array([1, *tokenizers.load("bytes").encode(text), 2])
        padded = np.zeros((1, 32), np.int32)  # one shape, one compilation
        padded[0, : len(ids) - 1] = ids[:-1]
        logits_TV = apply(params, padded, CONFIG).logits_BTV[0, : len(ids) - 1]
        log_p_TV = np.asarray(jax.nn.log_softmax(logits_TV), np.float64)
        nats[label] = -np.take_along_axis(log_p_TV, ids[1:, None], axis=-1)[:, 0]
    return root, nats


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()
    return capsys.readouterr().out


def test_losses_and_counts_are_those_of_a_plain_loop(folders, monkeypatch, capsys):
    root, nats = folders
    options = f"--source={root / 'text.jsonl'}", "--sequence_length=64", "--json"
    found = json.loads(run(monkeypatch, capsys, f"--checkpoint={root / 'model'}", *options))
    everything = np.concatenate(list(nats.values()))
    num_bytes = sum(len(text.encode()) for text in TEXTS.values())
    assert found["loss"] == pytest.approx(everything.mean(), rel=1e-5)
    bits = everything.sum() / np.log(2) / num_bytes
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert (found["documents"], found["tokens"]) == (2, len(everything))
    for label, own in nats.items():
        assert found["labels"][label]["loss"] == pytest.approx(own.mean(), rel=1e-5)
        assert found["labels"][label]["documents"] == 1
    assert found["loss_interval"] is None  # both documents are in one row


def test_several_rows_have_an_interval_around_their_loss(folders, monkeypatch, capsys):
    root, _ = folders
    options = f"--source={root / 'text.jsonl'}", "--sequence_length=2", "--json"
    found = json.loads(run(monkeypatch, capsys, f"--checkpoint={root / 'model'}", *options))
    for name in ("loss", "bits_per_byte"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--max_batches=-1", "--max_batches=-1 must be at least 0"),
        ("--batch_size=0", "--batch_size=0 must be at least 1"),
        ("--num_experts_per_tok=3", "num_experts_per_tok=3 is more than num_experts=2"),
        ("--source=nowhere.txt", "evaluate.py: --source='nowhere.txt' matches no file"),
        ("--tokenizer=words", "evaluate.py: --tokenizer='words' is not a file"),
    ],
)
def test_a_mistake_is_one_line_before_the_weights_are_read(
    option, complaint, folders, monkeypatch, capsys
):
    root, _ = folders
    monkeypatch.setattr(stores, "load", None)
    options = f"--checkpoint={root / 'model'}", f"--source={root / 'text.jsonl'}", option
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, *options)
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(folders, monkeypatch, capsys):
    root, _ = folders
    small = dataclasses.replace(CONFIG, vocab_size=100)
    stores.save(root / "small", small, drawn.parameters(small))
    with pytest.raises(SystemExit, match="2"):
        run(
            monkeypatch, capsys, f"--checkpoint={root / 'small'}", f"--source={root / 'text.jsonl'}"
        )
    assert "the tokenizer has 259 ids and the model 100" in capsys.readouterr().err


def test_a_model_that_could_not_be_trained_is_evaluated(folders, monkeypatch, capsys):
    """A single weight of 1 gives the router no gradient, and evaluation needs none."""
    root, _ = folders
    top_1 = dataclasses.replace(CONFIG, num_experts_per_tok=1)
    stores.save(root / "top_1", top_1, drawn.parameters(top_1))
    options = f"--checkpoint={root / 'top_1'}", f"--source={root / 'text.jsonl'}"
    options += ("--sequence_length=64",)
    assert "text.jsonl" in run(monkeypatch, capsys, *options)


def test_the_table_has_a_line_for_each_label(folders, monkeypatch, capsys):
    root, _ = folders
    options = f"--source={root / 'text.jsonl'}", "--sequence_length=64"
    lines = run(monkeypatch, capsys, f"--checkpoint={root / 'model'}", *options).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["label", "all", "en", "ja"]


def test_a_hugging_face_folder_needs_a_text_and_a_tokenizer(folders, monkeypatch, capsys):
    root, _ = folders
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, f"--checkpoint={GOLDEN / 'llama'}")
    assert "has no text of its own; give --source=TEXT" in capsys.readouterr().err
    dense = dataclasses.replace(CONFIG, num_experts=0)
    hf.save(root / "hf", dense, drawn.parameters(dense))
    options = f"--source={root / 'text.jsonl'}", "--tokenizer=bytes", "--sequence_length=64"
    assert " 41 " in run(monkeypatch, capsys, f"--checkpoint={root / 'hf'}", *options)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("run", "it may be run-0000000000 or run_b-1111111111 or run_c"),
        ("ron_c", r"did you mean run_c\?"),
        ("other", "it is not there$"),
    ],
)
def test_a_folder_is_found_by_a_beginning_that_no_other_has(name, complaint, tmp_path):
    for folder in ("run-0000000000", "run_b-1111111111", "run_c", "alone-more"):
        (tmp_path / folder).mkdir()
    assert stores.find(str(tmp_path / "run")).name == "run-0000000000"
    assert stores.find(str(tmp_path / "alone")).name == "alone-more"
    (tmp_path / "run-0000000001").mkdir()
    complaint = complaint.replace(" or run_b", " or run-0000000001 or run_b")
    with pytest.raises(ValueError, match=complaint):
        stores.find(str(tmp_path / name))
