"""The figures of each kind of TPU, and the names of their slices.

A figure is that of one device as jax counts them: a chip, but half a chip of TPU7x. They come from
the chips' pages at https://cloud.google.com/tpu/docs ("v4", "v5e", "v5p", "v6e", "tpu7x"): bfloat16
peak, HBM bandwidth, both directions of all inter-chip links (ICI), and the data center network
(DCN) between slices. The memory is what libtpu 0.0.42 leaves to a program.
"""

import dataclasses
import re

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    device_kind: str  # how jax's name of it begins: look for "TPU v5 lite" before "TPU v5"
    hbm_bytes: int
    flops: float  # bfloat16 products, FLOP/s
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s of one link to a neighbour, in one direction
    dcn_bandwidth: float  # bytes/s in one direction
    dimensions: int  # of the torus
    config_name: str = "default"  # libtpu's; "megacore": the two cores of a chip are one device

    def wraps(self, shape: tuple[int, ...], side: int) -> bool:
        """True if a side of the slice is a ring, not a line.

        In three dimensions all sides are rings from 4x4x4 on, if the cubes are whole; in two
        dimensions a side of 16 is.
        """
        if self.dimensions == 2:
            return shape[side] == 16
        return all(size % 4 == 0 for size in shape) and len(shape) == 3


CHIPS = {
    # The page of v4 lacks ICI and DCN: 2400 Gbit/s in one direction (JAX's scaling book), and 200
    # Gbit/s for the four chips of a host, as for v5p.
    "v4": Chip("TPU v4", int(30.75 * GiB), 275e12, 1200e9, 50e9, 6.25e9, 3, "megacore"),
    "v5e": Chip("TPU v5 lite", int(15.75 * GiB), 197e12, 819e9, 50e9, 3.125e9, 2),
    "v5p": Chip("TPU v5", int(95.74 * GiB), 459e12, 2765e9, 100e9, 6.25e9, 3),
    "v6e": Chip("TPU v6 lite", int(31.25 * GiB), 918e12, 1638e9, 100e9, 12.5e9, 2),
    "tpu7x": Chip("TPU7x", int(94.75 * GiB), 1153.5e12, 3690e9, 50e9, 6.25e9, 3),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices of chips in a block of `shape`; of chip "cpu", fake devices in a row."""

    name: str
    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def facts(self) -> Chip | None:
        return CHIPS.get(self.chip)


def topology(name: str) -> Topology:
    """The topology named "v5p:2x2x4", "2*v5p:2x2x4" (two such slices) or "cpu:8" (fake CPUs).

    Raises: ValueError for a name that is none.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)\*)?(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if not found:
        raise ValueError(f"topology {name!r} is not like v5p:2x2x4, 2*v5p:2x2x4 or cpu:8")
    slices, chip, sides = found.groups()
    shape = tuple(map(int, sides.split("x")))
    if chip != "cpu" and chip not in CHIPS:
        known = ", ".join(("cpu", *CHIPS))
        raise ValueError(f"topology {name!r}: unknown chip {chip}; use one of {known}")
    dimensions = 1 if chip == "cpu" else CHIPS[chip].dimensions
    if len(shape) != dimensions:
        like = "x".join("2" * dimensions) if dimensions > 1 else "8"
        raise ValueError(
            f"topology {name!r}: {chip} has {dimensions} dimension(s); for example {chip}:{like}"
        )
    if chip == "cpu" and slices:
        raise ValueError(f"topology {name!r}: fake devices have no slices; use cpu:{shape[0]}")
    return Topology(name, chip, shape, int(slices or 1))
