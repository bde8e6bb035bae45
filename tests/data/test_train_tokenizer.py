"""The command train_tokenizer: what it trains on, what it prints, and what it refuses."""

import json
import pathlib
import runpy
import sys

import pytest

from moe_jax import config as configs
from moe_jax.data import tokenizer_training, tokenizers
from tests.data.test_tiktoken_files import RANKS, lines_of
from tests.data.test_tokenizers import LINES

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "train_tokenizer.py"


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the script in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def trained_on(monkeypatch):
    """The texts that a tokenizer is trained on."""
    seen = []

    def train(texts, *arguments, train=tokenizer_training.train, **options):
        seen.extend(texts)
        train(seen, *arguments, **options)

    monkeypatch.setattr(tokenizer_training, "train", train)
    return seen


def write(name, records):
    path = pathlib.Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("kind", ["bpe", "byte_bpe"])
def test_it_trains_without_held_out_text_and_measures_each_label_on_it(kind, command, trained_on):
    both = [("en", LINES[0] * 3), ("ru", LINES[2] * 3)]
    write(
        "text/train.jsonl",
        [{"text": f"{i} {t}", "language": n} for i in range(40) for n, t in both],
    )
    held_out = [(name, f"{i} {text}") for i in range(3) for name, text in both]
    write("text/validation.jsonl", [{"text": text, "language": name} for name, text in held_out])
    given = ("--source=text", "--vocab_size=310", f"--kind={kind}", "--output=my own")
    status, output, errors = command(*given)
    assert (status, errors) == (0, "")
    assert len(trained_on) == 80
    tokenizer = tokenizers.load("my own")
    head, english, russian, every, last = output.splitlines()
    assert head.split() == ["held-out", "characters/token", "bytes/token", "tokens"]
    for row, names in ((english, ["en"]), (russian, ["ru"]), (every, ["en", "ru"])):
        texts = [text for name, text in held_out if name in names]
        number = sum(len(tokenizer.encode(text)) + 1 for text in texts)
        sizes = len("".join(texts)), len("".join(texts).encode())
        assert row.split()[1:] == [*(f"{size / number:.2f}" for size in sizes), str(number)]
    assert last == (
        "my own: 310 tokens; use --config.data.tokenizer='my own' --config.model.vocab_size=384"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--characters=ru=4000"], {"ru": (3500, 4500)}),
        (["--characters=12000", "--alpha=0"], {"en": (5200, 6800), "ru": (5200, 6800)}),
        (["--characters=12000", "--alpha=1"], {"en": (9800, 11800), "ru": (800, 1700)}),
    ],
)
def test_a_sample_is_taken_by_label(options, expected, command, trained_on):
    records = [{"text": f"{i:09}", "language": "en"} for i in range(10_000)]
    records += [{"text": f"{i:08}Ж", "language": "ru"} for i in range(1000)]
    write("text/train.jsonl", records)
    status, _, errors = command("--source=text", "--vocab_size=271", "--output=own", *options)
    assert (status, errors) == (0, "")
    taken = {"ru": sum(9 for t in trained_on if "Ж" in t)}
    taken["en"] = sum(map(len, trained_on)) - taken["ru"]
    for label, (least, most) in ({"en": (0, 0), "ru": (0, 0)} | expected).items():
        assert least <= taken[label] <= most, (label, taken)


def test_it_converts_a_vocabulary_of_tiktoken_which_a_run_then_uses(command):
    pathlib.Path("own.tiktoken").write_bytes(b"\n".join(lines_of(RANKS)))
    write("a.jsonl", [{"text": "a house"}] * 3)
    given = ("--tiktoken=own.tiktoken", "--pattern=o200k", "--source=a.jsonl", "--output=own")
    status, output, errors = command(*given)
    assert (status, errors, output.splitlines()[0]) == (0, "", "no held-out text")
    assert f"own: {len(RANKS) + 1} tokens; use --config.data.tokenizer=own" in output
    config = configs.default()
    config.model.preset = "quickstart"
    config.data.tokenizer = "own"
    assert configs.resolve(config).data.tokenizer == str(pathlib.Path("own", "tokenizer.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=full"], "full exists; choose another output or remove it"),
        (["--source=missing"], "--source='missing' matches no file"),
        (["--source=bad.jsonl"], "--source: bad.jsonl:1 is not a JSON obj"),
        (["--source=a.txt"], "vocab_size=4096 cannot be trained on this text"),
        (["--source=a.txt", "--vocab_size=9"], "vocab_size=9 is less than 261"),
        (["--source=a.txt", "--kind=word"], "--kind='word' is unknown"),
        (["--source=a.txt", "--characters=fr=9"], "--characters: no text is labelled 'fr'"),
        (["--source=a.txt", "--characters=1e6"], "--characters=1e6 is not a whole number; use"),
        (["--source=a.txt", "--characters=-5"], "--characters=-5 is not a number from 0"),
        (["--source=a.txt", "--alpha=-1"], "--alpha=-1.0 is not a number from 0"),
        (["--source=a.txt", "--alpha=nan"], "--alpha=nan is not a number from 0"),
        (["--source=a.txt", "--characters=fr=x"], "--characters=fr=x: use NAME=N,NAME=N with"),
        (["--source=a.txt", "--max_piece_length=8"], "--max_piece_length=8: use NAME=N,NAME=N"),
        (["--source=a.txt", "--vocab_multiple=0"], "--vocab_multiple=0 is not a number from 1"),
        (["--tiktoken=a.txt"], "--tiktoken and --pattern belong together; give both or neither"),
        (["--source=a.txt", "--tiktoken=a.txt", "--pattern=qwen"], "a.txt:1 is not a token in"),
        (["--source=a.txt", "--tiktoken=no", "--pattern=qwen"], "--tiktoken=no is not a file"),
        (["--source=a.txt", "--alpha=0.3"], "--alpha=0.3 does nothing without --characters=N"),
        (
            ["--source=a.txt", "--kind=byte_bpe", "--max_piece_length=CJK=3"],
            "--max_piece_length does nothing with --kind=byte_bpe",
        ),
    ],
)
def test_it_says_in_one_line_what_is_wrong_and_writes_nothing(command, arguments, message):
    pathlib.Path("full").mkdir()
    pathlib.Path("full", "mine").touch()
    pathlib.Path("a.txt").write_text("".join(LINES))
    pathlib.Path("bad.jsonl").write_text("text\n")
    before = sorted(pathlib.Path().iterdir())
    status, output, errors = command("--output=own", *arguments)
    assert (status, output) == (2, "")
    assert errors.startswith(f"train_tokenizer.py: {message}") and errors.count("\n") == 1
    assert sorted(path for path in pathlib.Path().iterdir() if path.name != "cache") == before
