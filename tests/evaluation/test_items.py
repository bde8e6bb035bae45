"""Files of items: what is refused, measures worked by hand, and the command on a tiny model."""

import json

import numpy as np
import pytest

from moe_jax import stores
from moe_jax.data import tokenizers
from moe_jax.evaluation import answers, items, multiple_choice, scoring, short_answers
from tests import drawn
from tests.evaluation.test_evaluate import CONFIG, run
from tests.hf.test_golden import GOLDEN

CHOICE = {"context": "a", "choices": ["b", "cd"], "answer": 1, "label": "x"}
SHORT = {"prompt": "a", "answers": ["b"]}


def write(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def test_items_are_read_in_order(tmp_path):
    kind, found = items.read(write(tmp_path / "items", CHOICE, "", {**CHOICE, "answer": 0}))
    assert kind.name == "multiple choice"
    assert found == [
        multiple_choice.Item("a", ("b", "cd"), 1, "x"),
        multiple_choice.Item("a", ("b", "cd"), 0, "x"),
    ]
    kind, found = items.read(write(tmp_path / "items", SHORT))
    assert (kind.name, found) == ("short answers", [short_answers.Item("a", ("b",))])


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({**CHOICE, "answer": 2}, "'answer' is 2; use the index of one of the 2 choices, 0 to 1"),
        ({**CHOICE, "answer": -1}, "'answer' is -1"),
        ({**CHOICE, "answer": True}, "'answer' is True"),
        ({**CHOICE, "answer": "b"}, "'answer' is 'b'"),
        ({**CHOICE, "choices": ["b", ""]}, "choice 1 is empty"),
        ({**CHOICE, "choices": ["b"]}, "'choices' has 1 texts; give at least 2"),
        ({**CHOICE, "choices": "bc"}, "'choices' must be a list of texts"),
        ({**CHOICE, "context": 3}, "'context' must be a text, not 3"),
        (SHORT, "'choices' must be a list of texts, not None"),
        ("[1]", "it is not a JSON object"),
        ("{", "Expecting property name"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(line, complaint, tmp_path):
    path = write(tmp_path / "items", CHOICE, "", line)
    with pytest.raises(ValueError, match="items, line 3: ") as error:
        items.read(path)
    assert complaint in str(error.value)


def test_a_file_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no lines"):
        items.read(write(tmp_path / "items", ""))
    with pytest.raises(ValueError, match="line 1: it has none of 'choices', 'answers'"):
        items.read(write(tmp_path / "items", {"text": "a"}))
    with pytest.raises(ValueError, match="is not a file"):
        items.read(tmp_path / "none")


def test_the_three_accuracies_by_hand():
    """−4 nats for one byte and token, −6 for three bytes in two tokens: each divisor decides."""
    nats = {" b": (-4.0, 1), " céd": (-6.0, 2)}  # 2 bytes: −2 per byte; 5 bytes: −1.2; −3 per token
    tokenizer = tokenizers.load("bytes")

    def score(pairs):
        found = [nats[tokenizer.decode(pair.continuation)] for pair in pairs]
        return [
            scoring.Score(value, tokens, False, i % 2) for i, (value, tokens) in enumerate(found)
        ]

    one = multiple_choice.Item("a", tuple(nats), 0)
    found = multiple_choice.evaluate([one], tokenizer, score)
    assert {name: values.tolist() for name, values in found.values.items()} == {
        "accuracy": [1],
        "accuracy_per_byte": [0],
        "accuracy_per_token": [0],
    }
    assert found.facts == {"chance": 0.5, "contexts_cut": 1}


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [
        ("Paris", "paris.", 1, 1),
        (" The  Hague\n", "the hague", 1, 1),
        ("ＡＢＣ", "abc", 1, 1),  # full width
        ("東京", "東京都", 0, 0.8),  # 2 · 2 / (2 + 3)
        ("aab", "abb", 0, 2 / 3),  # one a and one b in common: 2 · 2 / 6
        ("a b", "ab", 0, 1),
        ("", "a", 0, 0),
        ("", "!", 1, 1),
        ("xyz", "abc", 0, 0),
    ],
)
def test_exact_match_and_character_f1_by_hand(answer, right, exact, f1):
    assert short_answers.exact_match(answer, right) == exact
    assert short_answers.character_f1(answer, right) == pytest.approx(f1)
    assert short_answers.character_f1(right, answer) == pytest.approx(f1)


def test_the_nearest_right_answer_counts():
    given = [answers.Answer("東京", np.array([]), 0), answers.Answer("x", np.array([]), 3)]
    two = [short_answers.Item("", ("大阪", "東京都")), short_answers.Item("", ("x",), "l")]
    found = short_answers.evaluate(two, lambda prompts: given)
    assert found.values["exact_match"].tolist() == [0, 1]
    assert found.values["character_f1"].tolist() == [pytest.approx(0.8), 1]
    assert found.facts == {"contexts_cut": 1} and found.labels == ("", "l")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models, and items of both kinds."""
    root = tmp_path_factory.mktemp("items")
    for name, seed in (("model", 0), ("other", 1)):
        stores.save(root / name, CONFIG, drawn.parameters(CONFIG, seed))
    draw = np.random.default_rng(0).integers
    choices = [
        {
            "context": f"item {n}",
            "choices": [" one", " two words", " three"],
            "answer": int(draw(3)),
            "label": "ab"[n % 2],
        }
        for n in range(20)
    ]
    write(root / "choices.jsonl", *choices)
    write(root / "short.jsonl", {"prompt": "one, ", "answers": ["two"]}, {**SHORT, "label": "a"})
    return root


def test_the_command_reports_accuracies_and_the_comparison(folders, monkeypatch, capsys):
    options = f"--checkpoint={folders / 'model'}", f"--items={folders / 'choices.jsonl'}"
    both = *options, f"--compare={folders / 'other'}"
    found = json.loads(run(monkeypatch, capsys, *both, "--json"))
    first, second = found["models"]
    row = found["comparison"]["accuracy"]
    assert row["difference"] == pytest.approx(first["accuracy"] - second["accuracy"])
    assert row["n"] == 20 and row["interval"][0] <= row["difference"] <= row["interval"][1]
    assert first["chance"] == pytest.approx(1 / 3)
    assert first["labels"]["a"]["n"] == 10
    shown = items.text(found)
    assert "chance: 0.333" in shown and "minus" in shown and "McNemar" in shown


def test_the_command_reports_short_answers(folders, monkeypatch, capsys):
    options = f"--checkpoint={folders / 'model'}", f"--items={folders / 'short.jsonl'}"
    found = json.loads(run(monkeypatch, capsys, *options, "--json", "--num_tokens=4"))
    [own] = found["models"]
    assert own["n"] == 2 and own["measures"] == ["exact_match", "character_f1"]
    low, high = own["labels"]["a"]["exact_match_interval"]
    assert low == 0 and high > 0.7  # one wrong answer says little


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        (["--items=none.jsonl"], "none.jsonl is not a file"),
        (["--items=a", "--tasks=b"], "--items and --tasks are two measurements; give one"),
        (["--compare=a"], "--compare does nothing without --items; leave it out"),
        (["--items=a", "--max_batches=2"], "--max_batches does nothing with --items"),
        (["--items=a", "--limit=2"], "--limit does nothing without --tasks"),
        (["--items=a", "--compare=GOLDEN"], "has no tokenizer.json or tokenizer.model"),
        (["--items=a", "--compare=BROKEN"], "config.json"),
    ],
)
def test_a_mistake_is_one_line_before_the_weights_are_read(
    extra, complaint, folders, monkeypatch, capsys
):
    monkeypatch.setattr(stores, "load", None)
    (folders / "broken").mkdir(exist_ok=True)
    (folders / "broken" / "config.json").write_text("{")
    named = {"GOLDEN": str(GOLDEN / "mixtral"), "BROKEN": str(folders / "broken")}
    for name, path in named.items():
        extra = [option.replace(name, path) for option in extra]
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, f"--checkpoint={folders / 'model'}", *extra)
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
