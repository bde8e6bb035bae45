"""Eight fake CPU devices, quiet libraries, the --long option, and TPU's compiler for who asks."""

import fcntl
import functools
import gc
import importlib.metadata
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

# Before jax is imported: it reads these once. Most of the time of these tests is compilation, which
# unoptimised machine code makes two times shorter, and plain loops for elementwise work (a flag
# that jaxlib 0.12 has no more) three times. The HLO is optimised all the same.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    # LLVM gets a program in one part, not in 32: the other worker has the other core.
    FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]
    FLAGS += ["--xla_llvm_disable_expensive_passes=true"]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "agg")
# A program that one process has compiled is read by the others: this one, pytest-xdist's workers
# and the commands that tests start. The folder is new in each run of the tests.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="moe_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    # Else a folder of XLA's GPU caches is in the key, and no two folders share a program.
    os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

import jax  # noqa: E402 - after the flags are set
import pytest  # noqa: E402 - after the flags are set
from jax.experimental import topologies  # noqa: E402 - after the flags are set

from moe_jax import stopping  # noqa: E402 - after the flags are set
from moe_jax.parallel import allocator  # noqa: E402 - after the flags are set


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long cases and full matrices too")


def pytest_collection_finish():
    """Objects of imported modules stay; searching them for garbage took 0.5 of 8.7 s of a run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="a long case: run with --long"))


@pytest.fixture(scope="module", autouse=True)
def _room_for_compiled_code():
    """XLA:CPU crashes where a process may map no more memory: Linux's default is 65530 maps."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def libtpu():
    """Devices of a TPU topology to compile for, with no TPU here: `libtpu("v5p:2x2x1")`.

    The compiler is the libtpu that the installed jax pins (another one crashes or lies), kept in
    the user's cache. Skips where it cannot be had.
    """
    pins = (r.split(";")[0].strip() for r in importlib.metadata.requires("jax"))
    pin = next(r for r in pins if r.startswith("libtpu=="))
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe_jax"
    folder = cache / pin.replace("==", "-").removesuffix(".*")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "libtpu.lock").open("w") as lock:  # the other workers of pytest-xdist wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as new:
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", pin]
                pip += ["--target", f"{new}/libtpu"]
                done = subprocess.run(pip, capture_output=True, text=True)
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    pytest.skip(f"no {pin}, the TPU compiler of this jax: {reason}")
                os.rename(f"{new}/libtpu", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_LIBRARY_PATH", str(folder / "libtpu" / "libtpu.so"))
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # else it waits for a cloud's metadata server
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by several processes, each with no TPU
        yield functools.cache(
            lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        )


@pytest.fixture(autouse=True)
def _same_allocator(monkeypatch):
    """A command that a test calls would change it for all tests of this process."""
    monkeypatch.setattr(allocator, "_set", lambda parameters: None)


@pytest.fixture(autouse=True)
def _own_signals():
    """A command that a test calls may leave its handlers behind, and a library's failure."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    stopping._abandoned.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def heard():
    """Signals that stop a program are not ignored, as they are in a shell's background."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
