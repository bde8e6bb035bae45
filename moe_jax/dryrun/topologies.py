"""Devices that this machine does not have, as targets for compilation."""

import fnmatch
import importlib.metadata
import os
import pathlib
import sys

import jax
from jax.experimental import topologies

from moe_jax.parallel import chips

# libtpu reads these when it is loaded. With them it does not query a cloud's metadata server, does
# not warn, and lets other processes load it too, because no TPU is used.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(topology: chips.Topology) -> list[jax.Device]:
    """The devices of a TPU topology, which can only compile, or fake CPU devices, which also run.

    The first call for CPUs must come before anything else uses jax's devices.

    Raises: ValueError if libtpu is missing or is not the version of the installed jax, and for a
      shape that the chip does not come in.
    """
    if topology.compiles_here or topology.facts is None:
        return _fake(topology.shape[0])
    check_libtpu()
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    shape = (*topology.shape, 1)[:3]
    hosts = tuple(min(side, most) for side, most in zip(shape, (2, 2, 1), strict=True))
    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{topology.chip}:{'x'.join(map(str, topology.shape))}",
            chip_config_name=topology.facts.config_name,
            chips_per_host_bounds=hosts,
            **options,
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"topology {topology.name!r}: {topology.chip} does not come in that shape; use one of "
            f"2x2, 2x4, 4x4, 4x8, … (x1, x2, x4, … of a chip of three dimensions): {reason}"
        ) from None


def _fake(number: int) -> list[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:  # jax has already created its CPU devices
        pass
    here = jax.devices("cpu")
    if len(here) < number:
        raise ValueError(
            f"topology 'cpu:{number}': jax has only {len(here)} CPU device(s) in this process; "
            "ask for them before anything else uses jax"
        )
    return here[:number]


def check_libtpu() -> None:
    """Raises: ValueError if libtpu is not the version that jax pins: others crash or mislead."""
    path = os.environ.get("TPU_LIBRARY_PATH")
    places = [str(pathlib.Path(path).parents[1])] if path else sys.path
    there = importlib.metadata.distributions(name="libtpu", path=places)
    found = next((distribution.version for distribution in there), None)
    version, own = importlib.metadata.version("jax"), own_libtpu()
    fix = f"pip install 'jax[tpu]=={version}'"
    if found is None:
        raise ValueError(f"libtpu, the compiler of TPUs, is not installed; {fix}")
    if not fnmatch.fnmatchcase(found, own):
        raise ValueError(f"libtpu {found} is not jax {version}'s own, {own}; {fix}")


def own_libtpu() -> str:
    """The version of libtpu that the installed jax pins; it may end in ".*"."""
    pins = (pin.split(";")[0].strip() for pin in importlib.metadata.requires("jax") or [])
    return next(pin.removeprefix("libtpu==") for pin in pins if pin.startswith("libtpu=="))
