"""The pages: links lead somewhere, code runs, and commands have the options that they are given.

`test_docs_run.py` executes the commands.
"""

import ast
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
from moe_jax.evaluation import evaluators, text_metrics
from moe_jax.model import router
from moe_jax.training import backends, balance, objective
from moe_jax.upcycle import recipes
from tests import pages

ROOT = pathlib.Path(__file__).parents[1]
GAP = "…"  # what stands for a value in a line of the page of errors
MOST_LINES = {"README.md": 150, "CHANGELOG.md": 1000}
# These are generated. The page of results has a part for each study.
MOST_LINES |= {"published_configs.md": 400, "configuration.md": 400, "results.md": 1000}
TABLES = (
    router.ROUTERS,
    recipes.RECIPES,
    sources.SOURCES,
    objective.OBJECTIVES,
    evaluators.EVALUATORS,
    text_metrics.METRICS,
    measures.MEASURES,
    balance.RULES,
    backends.BACKENDS,
)


def commands() -> list[str]:
    """Every shell command of the pages, once."""
    every = (command for page in pages.WITH_COMMANDS for command in pages.commands(page))
    return sorted({text for language, text in every if language == "bash"})


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
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


@pytest.mark.parametrize(
    "number", range(len(pages.blocks(ROOT / "docs" / "architecture.md", "python")))
)
def test_each_way_to_add_a_member_adds_one_row_to_a_table(number, monkeypatch):
    code = pages.blocks(ROOT / "docs" / "architecture.md", "python")[number]
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
    [code] = pages.blocks(ROOT / "README.md", "python")
    namespace: dict = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["out"].logits_BTV.shape[:2] == namespace["tokens_BT"].shape


def texts_of_the_code() -> str:
    """All strings of the package, with a gap in the place of each value that they show."""
    found = []
    for path in (ROOT / "moe_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", GAP) for part in node.values)
                found.append("".join(p if isinstance(p, str) else GAP for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_lines_that_the_page_of_errors_explains_are_those_of_the_code():
    rows = [line for line in (ROOT / "docs" / "faq.md").read_text().splitlines() if GAP in line]
    lines = [line for row in rows for line in re.findall(f"`([^`]*{GAP}[^`]*)`", row.split("|")[1])]
    assert len(lines) >= 10
    code = texts_of_the_code()
    for line in lines:
        pieces = [piece.strip() for piece in line.split(GAP) if len(piece.strip()) > 4]
        assert pieces and all(piece in code for piece in pieces), line


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
            known = ("source", "pip", "git", "tensorboard", "hf", "wget", "grep", "for", "done")
            assert program in known
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
