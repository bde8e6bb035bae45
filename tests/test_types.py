"""The package's type hints hold: mypy, as pyproject.toml sets it up, finds no error."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_the_type_checker_finds_no_error():
    command = [sys.executable, "-m", "mypy", "--no-error-summary"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
