"""The run that nothing disturbs, and the figures that are printed after the tests."""

import itertools
import operator
import os
import time

import pytest

from moe_jax import files
from tests.faults import runs

FIGURE = "figure"


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    """One for all workers of pytest-xdist, with the text, the caches and the unbroken run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults"
    with files.alone(folder.with_name("faults.lock")):
        if not folder.exists():
            folder.mkdir()
            path = runs.write_config(folder)
            began = time.monotonic()
            runs.finish(path, folder / "unbroken")
            (folder / "seconds").write_text(str(time.monotonic() - began))
    return folder / "config.py"


@pytest.fixture(scope="session")
def unbroken(config_file):
    """The workdir of a whole run, with all its checkpoints, and its seconds."""
    folder = config_file.parent
    return folder / "unbroken", float((folder / "seconds").read_text())


@pytest.fixture
def figure(record_property):
    """Adds numbers to a line that is printed after all tests; figure("flips", detected=3)."""
    return lambda line, **numbers: record_property(FIGURE, (line, numbers))


def pytest_terminal_summary(terminalreporter):
    """Sums over tests; of a number whose name begins with "most", the largest."""
    lines: dict[str, dict] = {}
    for report in itertools.chain(*terminalreporter.stats.values()):
        for name, value in getattr(report, "user_properties", ()):
            if name == FIGURE and report.when == "call":
                line, numbers = value
                total = lines.setdefault(line, {})
                for key, number in numbers.items():
                    add = max if key.startswith("most") else operator.add
                    total[key] = add(total.get(key, 0), number)
    if lines:
        terminalreporter.section("figures")
        for line, numbers in lines.items():
            shown = ", ".join(f"{number:g} {key}" for key, number in numbers.items())
            terminalreporter.write_line(f"{line}: {shown}")
