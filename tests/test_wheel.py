"""`pip install` gives every command from any folder, and all data that the code reads."""

import os
import pathlib
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DATA = (".xz", ".md", ".typed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves its folders beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "moe_jax", source / "moe_jax")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--quiet", f"--wheel-dir={folder}", source], check=True)
    return next(folder.glob("moe_jax-*.whl"))


@pytest.fixture(scope="module")
def programs(wheel):
    """The folder of programs of an environment that has this wheel and sees our other packages."""
    folder = wheel.parent / "environment"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", wheel], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    # No .pth file of theirs is read, so that an editable moe_jax stays out.
    theirs = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "theirs.pth").write_text("\n".join(theirs))
    return python.parent


def run(programs, *command):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(programs / command[0]), *command[1:]]
    return subprocess.run(
        command, cwd=programs.parent, env=environment, capture_output=True, text=True
    )


def test_the_wheel_holds_every_file_of_the_package(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = [p for p in (ROOT / "moe_jax").rglob("*") if p.suffix in (".py", *DATA)]
    assert {p.relative_to(ROOT).as_posix() for p in files} <= packed
    assert {suffix for p in files if (suffix := p.suffix) in DATA} == set(DATA)


def test_a_command_runs_from_another_folder(programs):
    where = run(programs, "python", "-c", "import moe_jax; print(moe_jax.__file__)")
    assert pathlib.Path(where.stdout).is_relative_to(programs.parent)
    explained = run(programs, "moe_jax", "upcycle", "--help")
    assert explained.returncode == 0, explained.stderr
    assert explained.stdout.startswith("usage: moe_jax upcycle [-h] --source DIR")


def test_the_commands_that_a_sweep_lists_can_be_copied(programs):
    config = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    listed = run(programs, "moe_jax", "sweep", "--list", config, "--workdir=runs")
    assert listed.returncode == 0, listed.stderr
    command = listed.stdout.splitlines()[0].split()[5:]
    assert command[:4] == ["python", "-m", "moe_jax", "train"]
    refused = run(programs, *command, "--config.seed=-1")
    assert refused.returncode == 2
    assert refused.stderr == "moe_jax train: config.seed=-1 must not be negative\n"
