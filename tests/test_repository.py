"""The repository as a whole: lint, configs, sizes."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from moe_jax import config as configs

ROOT = pathlib.Path(__file__).parents[1]
CONFIG_FILES = sorted((ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(command):
    ended = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_is_valid_short_and_says_its_command(path):
    # Two are for a model of one's own: tests/config/test_parents.py gives them one.
    own = {"model.preset": "quickstart", "init.upcycle.recipe": ""}
    own = own if path.parent == ROOT / "configs" else {}
    configs.resolve(configs.load(str(path), own))
    spec = importlib.util.spec_from_file_location("config_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert str(path.relative_to(ROOT)) in module.__doc__
    assert len(path.read_text().splitlines()) <= 100


def test_every_package_is_installed_and_every_script_explains_itself():
    folders = {path.parent for path in (ROOT / "moe_jax").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)
    for script in sorted((ROOT / "scripts").glob("*.py")):
        command = ROOT / "moe_jax" / "commands" / script.name
        assert "Examples:\n  python scripts/" + script.name in command.read_text(), script


def test_the_generated_parts_of_the_pages_are_those_of_the_code():
    command = [sys.executable, "scripts/write_docs.py", "--check"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
