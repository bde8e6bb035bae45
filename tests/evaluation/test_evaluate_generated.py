"""evaluate --generated: the likelihoods of a tiny model by a plain loop, and the whole command."""

import functools
import json
import sys

import jax
import numpy as np
import pytest

from moe_jax import model, stores
from moe_jax.commands import evaluate, generate
from moe_jax.data import tokenizers
from moe_jax.evaluation import likelihood, text_metrics
from moe_jax.parallel import mesh
from tests import drawn

CONFIG = model.ModelConfig(
    vocab_size=259,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=2,
    num_experts_per_tok=2,
)
apply = jax.jit(model.apply, static_argnums=2)
PAIRS = [("To insert ", "a table"), ("", "a table"), ("ab", ""), ("", "日本")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated") / "model"
    params = drawn.parameters(CONFIG)
    stores.save(folder, CONFIG, params)
    return folder


def by_hand(params, context, text):
    """(log-probability, tokens) of a text, one token after the other."""
    bytes_of = tokenizers.load("bytes").encode
    ids, n = [1, *bytes_of(context), *bytes_of(text)], len(bytes_of(text))
    padded = np.zeros((1, 32), np.int32)  # one shape to compile; no token sees a later one
    padded[0, : len(ids)] = ids
    log_p_TV = np.asarray(jax.nn.log_softmax(apply(params, padded, CONFIG).logits_BTV[0]))
    last = range(len(ids) - n, len(ids))
    return float(sum(log_p_TV[i - 1, ids[i]] for i in last)), n


def test_scores_of_texts_after_their_contexts_are_those_of_a_plain_loop(folder):
    subject = stores.subject(str(folder))
    calls = []
    score = likelihood.under(lambda: calls.append(1) or subject)
    found = score(PAIRS)
    expected = [by_hand(subject.params, *pair) for pair in PAIRS]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert score(PAIRS[:2]) == found[:2] and len(calls) == 1  # nothing is scored twice
    # In windows of 4 tokens, the last of which looks back: it ends with three tokens of context.
    ids = tokenizers.load("bytes").encode("a table")
    windows = likelihood.token_pairs(subject.tokenizer, "ab", "a table", 4)
    assert [part.continuation.tolist() for part in windows] == [list(ids[:4]), list(ids[4:])]
    assert windows[0].context.tolist() == [1, *tokenizers.load("bytes").encode("ab")]
    assert windows[1].context.tolist() == list(ids[2:4])


def run(monkeypatch, capsys, command, *options):
    monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", *map(str, options)])
    command.main()
    return capsys.readouterr()


def test_texts_that_generate_writes_are_measured_twice_the_same(
    folder, tmp_path, monkeypatch, capsys
):
    # One model, so one compilation, in all its parts.
    monkeypatch.setattr(stores, "subject", functools.cache(stores.subject))
    texts, training = tmp_path / "texts.jsonl", tmp_path / "training.txt"
    training.write_text("To insert a table, click on it.\n")
    own = f"--checkpoint={folder}"
    options = "--prompt=To insert ", "--prompt=a", "--num_tokens=6", "--temperature=1"
    run(monkeypatch, capsys, generate, own, *options, "--samples=2", f"--output={texts}")
    lines = [json.loads(line) for line in texts.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["To insert ", "To insert ", "a", "a"]
    printed = run(monkeypatch, capsys, generate, own, *options, "--seed=1").out
    assert printed == "".join(f"{lines[i]['prompt']}{lines[i]['text']}\n" for i in (1, 3))

    given = f"--second={folder}", f"--judge={folder}", f"--training_text={training}", own
    measured = [
        run(monkeypatch, capsys, evaluate, f"--generated={texts}", *given, "--json").out
        for _ in range(2)
    ]
    assert measured[0] == measured[1]
    report = json.loads(measured[0])
    assert list(report["metrics"]) == list(text_metrics.METRICS) and not report["not_measured"]
    pairs = [(line["prompt"], line["text"]) for line in lines]
    params = stores.load(stores.find(str(folder)), mesh.one_device())[1]
    nats, tokens = np.sum([by_hand(params, *pair) for pair in pairs], axis=0)
    num_bytes = sum(len(text.encode()) for _, text in pairs)
    for who in ("self", "second"):
        found = report["metrics"][f"{who}_perplexity"]["value"]
        assert found == pytest.approx(np.exp(-nats / tokens), rel=1e-5)
        bits = report["metrics"][f"{who}_bits_per_byte"]["value"]
        assert bits == pytest.approx(-nats / np.log(2) / num_bytes, rel=1e-5)


def test_empty_texts_have_null_for_what_is_undefined(tmp_path, monkeypatch, capsys):
    texts = tmp_path / "texts.jsonl"
    lines = [{"text": ""}, {"text": "", "label": "other \x1b[31m"}]
    texts.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(stores, "load", None)
    report = json.loads(run(monkeypatch, capsys, evaluate, f"--generated={texts}", "--json").out)
    assert report["metrics"]["distinct_1"]["value"] is None
    assert report["metrics"]["seq_rep_2"] == {"value": None, "interval": None, "texts": 0}
    assert report["metrics"]["empty"]["value"] == 1
    assert "self_perplexity" in report["not_measured"]
    table = run(monkeypatch, capsys, evaluate, f"--generated={texts}").out
    assert "undefined" in table and "needs --judge" in table and "\x1b" not in table


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--metrics=self_blue"], "did you mean 'self_bleu'"),
        (["--metrics=novelty_5"], "needs --training_text"),
        (["--training_text=nowhere.txt"], "--training_text='nowhere.txt' matches no file"),
        (["--second=nowhere"], "neither a Hugging Face folder nor a run"),
        (["--judge_scale=10,1"], "two rising numbers"),
        (["--judge_template=nowhere.txt"], "nowhere.txt"),
        (["--items=a.jsonl"], "two measurements"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_read(
    options, complaint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(stores, "load", None)
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}')
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, evaluate, f"--generated={tmp_path / 'texts.jsonl'}", *options)
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--samples=2"], "always gives the same text"),
        (["--samples=0"], "at least 1"),
        (["--output=nowhere/texts.jsonl"], "its folder does not exist"),
    ],
)
def test_options_of_generate_that_cannot_be_are_refused_first(
    options, complaint, monkeypatch, capsys
):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, generate, "--checkpoint=nowhere", "--prompt=a", *options)
    assert complaint in capsys.readouterr().err
