"""A stranger's workdir through the commands: one line each, and nothing is written outside."""

import json
import os
import pathlib
import shutil
import sys

import jax
import pytest

from moe_jax import model, stores
from moe_jax.commands import collect_statistics, convert, evaluate, generate, train, upcycle
from tests.hf.test_beside import DRAWN, tokenizer_folders

CONFIG = model.ModelConfig(
    vocab_size=400,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
)
TRAINING = """
from moe_jax import config as configs

def get_config():
    config = configs.default()
    config.init.source = SOURCE
    config.data.update(source=TEXT, cache_dir=CACHE, sequence_length=8)
    config.training.num_steps = 1
    return config
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strange")
    tokenizer = tokenizer_folders.build(folder / "files", DRAWN)
    params = jax.jit(lambda: model.init(CONFIG, jax.random.key(0)))()
    stores.save(folder / "run", CONFIG, params, tokenizer=str(tokenizer))
    return folder / "run"


@pytest.fixture
def run(saved, tmp_path):
    (tmp_path / "secret.txt").write_text("secret " * 9000)
    (tmp_path / "checkpoints").mkdir()
    return shutil.copytree(saved, tmp_path / "theirs" / "run")


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): path.read_bytes() for path in files if "theirs" not in path.parts}


def arguments(command, run):
    outside = run.parents[1]
    made = f"--output={run.parent / 'made'}"
    if command is train:
        names = {"SOURCE": run, "TEXT": outside / "secret.txt", "CACHE": run.parent / "cache"}
        text = TRAINING
        for name, path in names.items():
            text = text.replace(name, repr(str(path)))
        (run.parent / "config.py").write_text(text)
        return f"--config={run.parent / 'config.py'}", f"--workdir={run.parent / 'child'}"
    return {
        evaluate: (f"--checkpoint={run}", "--source=" + str(outside / "secret.txt")),
        generate: (f"--checkpoint={run}", "--prompt=a", "--num_tokens=1"),
        convert: (f"--source={run}", "--to=hf", made),
        upcycle: (f"--source={run}", "--recipe=naive", "--num_experts=2", made),
        collect_statistics: (f"--source={run}", f"--text={outside / 'secret.txt'}", made),
    }[command]


def forged(section, **values):
    def forge(run):
        path = run / "config.json"
        config = json.loads(path.read_text())
        config[section] |= values
        path.write_text(json.dumps(config))

    return forge


def linked(name, target):
    def link(run):
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(run.parents[1] / target)

    return link


def written(name, text):
    return lambda run: (run / name).write_text(text)


def piped(name):
    def pipe(run):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return pipe


COMMANDS = (train, evaluate, generate, convert, upcycle, collect_statistics)
WITH_TOKENIZER = (train, evaluate, generate, collect_statistics)
CASES = {
    "link to a lock": (linked(".lock", "secret.txt"), COMMANDS),
    "link to a config": (linked("config.json", "secret.txt"), COMMANDS),
    "link to checkpoints": (linked("checkpoints", "checkpoints"), COMMANDS),
    "link to a step": (linked("checkpoints/0", "checkpoints"), COMMANDS[1:]),
    "link to a tokenizer": (linked("tokenizer", "checkpoints"), COMMANDS),
    "link to nothing": (linked("metrics.jsonl", "nothing"), COMMANDS),
    "pipe": (piped("config.json"), COMMANDS),
    "another pipe": (piped("tokenizer/tokenizer.json"), COMMANDS),
    "deep config": (written("config.json", '{"a":' * 100_000), COMMANDS),
    "config of another form": (written("config.json", '{"model": 3}'), COMMANDS),
    "escapes": (forged("checkpoint", directory="/nowhere/\x1b[2J\x9b31m"), (train, evaluate)),
    "more escapes": (forged("model", hidden_act="\x1b[2J\u202e"), (evaluate, generate)),
    "many layers": (forged("model", num_hidden_layers=10**9), COMMANDS),
    "many ids": (forged("model", vocab_size=2**31 - 1, hidden_size=2**20), COMMANDS[1:]),
    "deep tokenizer": (written("tokenizer/tokenizer.json", "[" * 100_000), WITH_TOKENIZER),
    "damaged settings": (written("tokenizer/tokenizer_config.json", "["), WITH_TOKENIZER),
}


@pytest.mark.parametrize(
    ("case", "command"),
    [
        pytest.param(case, command, id=f"{case}-{command.__name__.rpartition('.')[2]}")
        for case, (_, commands) in CASES.items()
        for command in commands
    ],
)
def test_a_strange_workdir_is_one_line(case, command, run, monkeypatch, capfd):
    CASES[case][0](run)
    before = contents(run.parents[1])
    name = f"{command.__name__.rpartition('.')[2]}.py"
    monkeypatch.setattr(sys, "argv", [name, *arguments(command, run)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(run.parent / "home"))
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit, match="^2$"):
        command.main()
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith(name)]
    assert len(error) == 1 and "Traceback" not in error[0] and error[0].isprintable()
    assert contents(run.parents[1]) == before
    assert not (run.parent / "made").exists()
    assert not (run.parent / "child" / "config.json").exists()


def test_the_workdir_as_it_was_saved_is_read(run, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["convert.py", *arguments(convert, run)])
    convert.main()
    assert (run.parent / "made" / "tokenizer.json").exists()
