"""The published configs have the published constants, or say what they do instead."""

import pathlib
import re

import pytest

from moe_jax.config import published

ROWS = list(published.rows())
CONFIGS = published.ROOT / "configs"
FILES = sorted(p for p in CONFIGS.glob("*/*.py") if p.parent.name != "sweeps")
DIFFERS = "Differs from the paper:"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.config} {row.constant}")
def test_a_constant_is_the_published_one_or_its_row_says_what_differs(row):
    assert row.agrees != bool(row.differs), f"{row.here} here, {row.published} published"
    assert row.source


def test_every_published_config_has_rows_and_a_key_that_is_not_there_is_no_constant():
    assert {CONFIGS / row.config.split(":")[0] for row in ROWS} == set(FILES)
    misspelt = [row for row in ROWS if "." in row.constant and row.here == published.NOT_HERE]
    assert not misspelt


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_lists_what_differs_from_the_paper(path: pathlib.Path):
    """Each deviation of the table is named, in a paragraph of its own."""
    docstring = " ".join(path.read_text(encoding="utf-8").split('"""')[1].split())
    assert docstring.count(DIFFERS) == 1
    listed = docstring.split(DIFFERS)[1].lower()
    name = path.relative_to(CONFIGS).as_posix()
    for row in ROWS:
        if row.differs and row.config.split(":")[0] == name:
            words = re.findall(r"[a-z]+", row.constant.rpartition(".")[2].replace("_", " "))
            assert any(word[:6] in listed for word in words if len(word) > 3), row.constant
