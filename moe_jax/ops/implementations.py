"""Chooses an op's implementation: by name, or by platform and installed version."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax

from moe_jax import spelling


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op; `unavailable` returns the reason why it cannot run, or ""."""

    function: Callable
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    unavailable: Callable[[str], str] = lambda platform: ""


Row = TypeVar("Row", bound=Implementation)


def platform() -> str:
    """The mesh's platform (a CPU may compile for a TPU), or else the default backend's."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def compute_capability() -> tuple[int, int] | None:
    """The compute capability of this process's NVIDIA GPU, (9, 0) for an H100; None without one."""
    device = jax.devices()[0]
    if not device.device_kind.startswith("NVIDIA"):
        return None
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)


def choose(
    op: str, name: str, table: Mapping[str, Row], refuses: Callable[[Row], str] = lambda row: ""
) -> Row:
    """The table's row `name`; for "auto" the first row that can run, printed once on stderr.

    Args: refuses: returns the reason why a row cannot work with the given arrays, or "".

    Raises: ValueError for an unknown name, or for one that cannot run here.
    """
    here = platform()
    if name == "auto":
        name = next(n for n, row in table.items() if not (why_not(row, here) or refuses(row)))
        say_once(f"{op}: {name} on {here}")
    elif name not in table:
        raise ValueError(spelling.unknown(f"{op} implementation", name, ("auto", *table)))
    elif reason := why_not(table[name], here) or refuses(table[name]):
        raise ValueError(f"{op} implementation={name!r} {reason}; use 'auto'")
    return table[name]


def pick(table: Mapping[str, Implementation], here: str) -> str:
    """The name of the first row that can run on platform `here`."""
    return next(name for name in table if not why_not(table[name], here))


def why_not(implementation: Implementation, here: str) -> str:
    """The reason why `implementation` cannot run on platform `here`, or ""."""
    if here not in implementation.platforms:
        return f"runs on {' and '.join(implementation.platforms)}, not on {here}"
    return implementation.unavailable(here)


@functools.cache
def say_once(line: str) -> None:
    print(line, file=sys.stderr)
