"""Eight fake CPU devices, quiet libraries, and the --long option."""

import importlib.metadata
import os

# Before jax is imported: it reads these once. Most of the time of these tests is compilation, which
# unoptimised machine code makes two times shorter, and plain loops for elementwise work (a flag
# that jaxlib 0.12 has no more) three times. The HLO is optimised all the same.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long cases and full matrices too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="a long case: run with --long"))
