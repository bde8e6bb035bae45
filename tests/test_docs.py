"""The pages: links lead somewhere, code runs, and commands have the options that they are given."""

import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from moe_jax import config as configs
from moe_jax.analysis import measures
from moe_jax.data import sources
from moe_jax.evaluation import evaluators
from moe_jax.model import router
from moe_jax.training import balance, objective
from moe_jax.upcycle import recipes

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
MOST_LINES = {"README.md": 150, "CHANGELOG.md": 1000}
TABLES = (
    router.ROUTERS,
    recipes.RECIPES,
    sources.SOURCES,
    objective.OBJECTIVES,
    evaluators.EVALUATORS,
    measures.MEASURES,
    balance.RULES,
)


def blocks(page: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command line of the pages, once, its continued lines as one."""
    found = [b.replace("\\\n", " ") for page in PAGES for b in blocks(page, "bash")]
    lines = (line.partition("  #")[0].strip() for block in found for line in block.splitlines())
    return sorted({" ".join(line.split()) for line in lines if line and not line.startswith("#")})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in known, target
    assert len(text.splitlines()) <= MOST_LINES.get(page.name, 200)


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "docs" / "architecture.md", "python"))))
def test_each_way_to_add_a_member_adds_one_row_to_a_table(number, monkeypatch):
    code = blocks(ROOT / "docs" / "architecture.md", "python")[number]
    assert len([line for line in code.splitlines() if line]) <= 10
    before = [dict(table) for table in TABLES]
    try:
        exec(compile(code, "docs/architecture.md", "exec"), {})
        new = [set(table) - set(old) for table, old in zip(TABLES, before, strict=True)]
        assert sum(map(len, new)) == 1
    finally:
        for table, old in zip(TABLES, before, strict=True):
            for name in set(table) - set(old):
                del table[name]


def test_the_python_of_the_readme_runs():
    [code] = blocks(ROOT / "README.md", "python")
    namespace: dict = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["out"].logits_BTV.shape[:2] == namespace["tokens_BT"].shape


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_exists_with_its_options(command):
    words = shlex.split(command)
    while "=" in words[0]:  # environment variables
        words = words[1:]
    match words:
        case ["python", script, *arguments] if script.startswith("scripts/"):
            name = pathlib.Path(script).stem
        case ["moe_jax", name, *arguments]:
            pass
        case ["bash" | "sbatch", *arguments]:
            [script] = [word for word in arguments if word.startswith("scripts/")]
            assert (ROOT / script).is_file()
            return
        case [program, *_]:
            assert program in ("source", "pip", "git", "ls")
            return
    shown = help_of(name)
    of_config = [a for a in arguments if a.startswith("--config.")]
    keys = configs.reading.kinds()
    for argument in of_config:
        key = argument.partition("=")[0].removeprefix("--config.")
        assert key in keys, argument
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("--") and not option.startswith(
            ("--config.", "--recipe.", "--model.")
        ):
            assert re.search(rf"{option}\b", shown), f"{name} has no {option}"
    files = [a.removeprefix("--config=").partition(":")[0] for a in arguments if "--config=" in a]
    assert all((ROOT / file).is_file() for file in files if file != "FILE")


@functools.cache
def help_of(name: str) -> str:
    end = subprocess.run(
        [sys.executable, "-m", "moe_jax", name, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        cwd=ROOT,
        timeout=120,
    )
    assert end.returncode == 0, end.stderr
    return end.stdout
