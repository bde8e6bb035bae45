"""Which of an op's implementations runs: named, or chosen by platform and installed version."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping

import jax


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way of computing an op. `unavailable` gives the reason why it cannot be had, or ""."""

    function: Callable
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    unavailable: Callable[[str], str] = lambda platform: ""


def platform() -> str:
    """That of the mesh, which may be a TPU's while a CPU compiles for it; else the default's."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def compute_capability() -> tuple[int, int] | None:
    """Of the NVIDIA GPU that runs this process's arrays, (9, 0) for an H100; None without one."""
    device = jax.devices()[0]
    if not device.device_kind.startswith("NVIDIA"):
        return None
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)


def choose(op: str, name: str, table: Mapping[str, Implementation]) -> Callable:
    """The function of implementation `name`; of "auto" the first of the table that can run.

    What "auto" chose is said once on stderr.

    Raises: ValueError for an unknown name, or one that cannot run here.
    """
    here = platform()
    if name != "auto":
        if name not in table:
            known = ", ".join(map(repr, ("auto", *table)))
            raise ValueError(f"{op} implementation={name!r} is unknown; use one of {known}")
        if reason := why_not(table[name], here):
            raise ValueError(f"{op} implementation={name!r} {reason}; use 'auto'")
        return table[name].function
    name = pick(table, here)
    _say_once(op, name, here)
    return table[name].function


def pick(table: Mapping[str, Implementation], here: str) -> str:
    """The first that can run on platform `here`."""
    return next(name for name in table if not why_not(table[name], here))


def why_not(implementation: Implementation, here: str) -> str:
    """The reason why it cannot run on platform `here`, or ""."""
    if here not in implementation.platforms:
        return f"runs on {' and '.join(implementation.platforms)}, not on {here}"
    return implementation.unavailable(here)


@functools.cache
def _say_once(op: str, name: str, here: str) -> None:
    print(f"{op}: {name} on {here}", file=sys.stderr)
