"""The allocator, in processes of their own because its settings cannot be undone."""

import subprocess
import sys

import pytest

# Numbers of page faults: of arrays as large as ones that were freed, and of their first creation.
PROGRAM = """
import resource, sys, numpy as np
from moe_jax.parallel import allocator
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(2**23, np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
getattr(allocator, sys.argv[1])()
faults()
print(faults())
"""
AN_ARRAY = 16  # pages of 2 MB, or 8,192 of 4 KB, in an array of 32 MB


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is a function of glibc")
@pytest.mark.parametrize(
    ("setting", "environment", "is_kept"),
    [
        ("keep_freed_memory", {}, True),
        ("keep_freed_memory", {"MALLOC_PERTURB_": "0"}, False),
        ("return_freed_memory", {}, False),
    ],
)
def test_freed_memory_is_used_again_or_given_back(setting, environment, is_kept, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", PROGRAM, setting]
    faults = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (faults < AN_ARRAY) == is_kept
