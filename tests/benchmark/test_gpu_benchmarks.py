"""The script for an accelerator: each benchmark once, and a failure costs no other one."""

import os
import pathlib
import re
import subprocess

from moe_jax.benchmark import cases

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "gpu_benchmarks.sh"
PYTHON = """#!/bin/sh
case "$*" in *moe_layer*) echo no memory >&2; exit 1;; esac
echo "$*"
"""


def test_every_benchmark_is_run_though_one_fails(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    command = ["bash", SCRIPT, tmp_path / "found"]
    environment = {**os.environ, "PYTHON": str(python), "REPEATS": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "moe_layer failed" in done.stderr and "no memory" in done.stderr
    names = re.search(r"BENCHMARKS:-([\w ]+)", SCRIPT.read_text())[1].split()
    assert set(names) <= set(cases.BENCHMARKS) and "full_step" in names
    for name in set(names) - {"moe_layer"}:
        line = (tmp_path / "found" / f"{name}.json").read_text()
        assert line == f"scripts/benchmark.py {name} --json --repeats=3\n"
    assert not (tmp_path / "found" / "moe_layer.json").exists()
    limit = re.search(r"LIMIT:-(\d+)", SCRIPT.read_text())[1]
    assert len(names) * int(limit) <= 600  # seconds
