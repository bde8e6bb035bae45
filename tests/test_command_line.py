"""A command is found by its name, speaks by the name that was typed, and refuses in one line."""

import argparse
import importlib
import os
import pathlib
import subprocess
import sys

import pytest

import moe_jax.__main__ as entry
from moe_jax import command_line

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_alone_it_lists_every_command_with_the_first_line_of_its_file(monkeypatch, capsys):
    printed = []
    for arguments in (["moe_jax"], ["moe_jax", "--help"]):
        monkeypatch.setattr(sys, "argv", arguments)
        entry.main()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert set(entry.FILES) == scripts
    for name in scripts:
        first_line = (ROOT / "moe_jax" / "commands" / f"{name}.py").read_text().splitlines()[0]
        assert any(
            line.split(maxsplit=1) == [name, first_line.strip('"')]
            for line in printed[0].splitlines()
        ), name


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("upcyle", "no command 'upcyle'; did you mean upcycle? (moe_jax --help lists all)"),
        ("benchmarks", "no command 'benchmarks'; did you mean benchmark? (moe_jax --help lists"),
        ("xyzzy", "no command 'xyzzy' (moe_jax --help lists all)"),
    ],
)
def test_a_misspelt_command_is_answered_with_the_nearest_and_exit_status_2(
    typed, answer, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["moe_jax", typed, "--help"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moe_jax: {answer}")


@pytest.mark.parametrize(
    ("start", "program", "shown"),
    [
        (["-m", "moe_jax", "xla_flags"], "moe_jax xla_flags", "  moe_jax xla_flags v5p"),
        ([ROOT / "scripts" / "xla_flags.py"], "xla_flags.py", "  python scripts/xla_flags.py v5p"),
    ],
)
def test_a_program_has_the_name_that_was_typed(start, program, shown):
    mistake = run(*start, "v99", cwd=ROOT)
    assert mistake.returncode == 2
    assert mistake.stderr.startswith(f"{program}: chip='v99' is unknown; use one of v4")
    explained = run(*start, "--help", cwd=ROOT).stdout
    assert explained.startswith(f"usage: {program} [-h]")
    assert any(line.startswith(shown) for line in explained.splitlines())


@pytest.mark.parametrize("name", entry.FILES)
def test_every_option_is_explained_with_its_default(name, monkeypatch):
    class Parsed(Exception):
        pass

    def parse(parser, *_):
        raise Parsed(parser)

    monkeypatch.setattr(sys, "argv", [f"moe_jax {name}"])
    monkeypatch.setattr(command_line.Parser, "parse_known_args", parse)
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(f"moe_jax.commands.{name}").main()
    for action in parsed.value.args[0]._actions:
        assert action.help, action.option_strings
        if action.default not in (None, "", argparse.SUPPRESS) and action.nargs != 0:
            assert f"(default: {action.default})" in action.help


def test_a_command_starts_another_in_the_way_in_which_it_was_started(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["moe_jax sweep"])
    assert command_line.command("train") == ["python", "-m", "moe_jax", "train"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["scripts/sweep.py"])
    assert command_line.command("train") == ["python", "scripts/train.py"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "sweep.py")])
    monkeypatch.chdir(tmp_path)
    assert command_line.command("train") == ["python", str(ROOT / "scripts" / "train.py")]


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (ValueError("two\n  lines"), 2, "toy: two lines\n"),
        (FileNotFoundError(2, "Not there", "a.txt"), 2, "toy: [Errno 2] Not there: 'a.txt'\n"),
        (ValueError("\x1b[2J of a stranger"), 2, "toy: \\x1b[2J of a stranger\n"),
        (
            PermissionError(13, "Denied", "a.txt"),
            2,
            "toy: [Errno 13] Denied: 'a.txt'; give yourself the permission, or choose another "
            "path\n",
        ),
    ],
)
def test_a_mistake_ends_in_one_line(raised, status, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy"])
    parser = command_line.Parser("A toy.")
    with pytest.raises(SystemExit) as ended, parser.refusing():
        raise raised
    assert (ended.value.code, capsys.readouterr().err) == (status, line)


def test_what_is_no_mistake_of_the_person_keeps_its_traceback(monkeypatch):
    parser = command_line.Parser("A toy.")
    with pytest.raises(TypeError), parser.refusing():
        raise TypeError("a bug")
    with pytest.raises(ValueError), parser.refusing((OSError,)):
        raise ValueError("a bug")


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("train", ["--workdir=none", "--config.training.num_stepz=1"]),
        ("dryrun", ["--topology=cpu:8", "--config.training.num_stepz=1"]),
        ("sweep", ["--workdir=none", "--max_parallel=0"]),
    ],
)
def test_a_mistake_is_answered_before_what_a_run_needs_is_imported(name, others):
    start = ["-X", "importtime", "-m", "moe_jax", name, "--config=configs/quickstart.py"]
    ended = run(*start, *others, cwd=ROOT)
    assert ended.returncode == 2
    *imported, answer = ended.stderr.splitlines()
    assert answer.startswith(f"moe_jax {name}: ")
    imported = {line.rpartition("|")[2].strip() for line in imported}
    assert "moe_jax.config" in imported
    assert not {"flax", "grain", "jax.experimental.pallas", "matplotlib", "optax"} & imported
    assert not {"moe_jax.train", "moe_jax.dryrun", "moe_jax.report.page"} & imported


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_backend_that_is_not_there_is_named_in_one_line(platform, tmp_path):
    command = ["train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    done = run(f"scripts/{command[0]}", *command[1:], cwd=ROOT, env=environment)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"train.py: JAX_PLATFORMS={platform}: this machine has no such device")
    assert "Traceback" not in done.stderr
