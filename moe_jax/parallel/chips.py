"""Specifications of each kind of TPU and GPU, and the names of their slices.

All numbers are per device as jax counts devices: a chip, or half a chip of TPU7x. They come from
the chips' pages at https://cloud.google.com/tpu/docs ("v4", "v5e", "v5p", "v6e", "tpu7x"): bfloat16
peak, HBM bandwidth, both directions of all inter-chip links (ICI), and the data center network
(DCN) between slices. The memory is what libtpu 0.0.42 leaves to a program.

The numbers of GPUs come from NVIDIA's data sheets (SXM modules, dense bfloat16). For a GPU, a link
is all of NVLink in one direction, and the data center network is one adapter per GPU, with 200
Gbit/s for A100 and 400 Gbit/s for the others.
"""

import dataclasses
import math
import re

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    device_kind: str  # prefix of jax's device_kind; match "TPU v5 lite" before "TPU v5"
    hbm_bytes: int
    flops: float  # peak FLOP/s of bfloat16 matrix products
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s of one link to a neighbour, in one direction
    dcn_bandwidth: float  # bytes/s in one direction
    dimensions: int  # dimensions of the torus
    config_name: str = "default"  # libtpu's name; "megacore": a chip's two cores are one device
    accelerator: str = ""  # prefix of Google Cloud's accelerator types: "v5p-" for "v5p-16"
    counted: int = 1  # what an accelerator type counts for each chip: 2 if it counts cores, else 1
    node: int = 0  # number of GPUs joined by NVLink; 0 for a TPU

    def wraps(self, shape: tuple[int, ...], side: int) -> bool:
        """True if a side of the slice is a ring, False if it is a line.

        In three dimensions all sides are rings if the slice consists of whole 4x4x4 cubes; in two
        dimensions a side of 16 is a ring.
        """
        if self.dimensions == 2:
            return shape[side] == 16
        return all(size % 4 == 0 for size in shape) and len(shape) == 3


CHIPS = {
    # The page of v4 does not state ICI and DCN: assumed are 2400 Gbit/s in one direction (JAX's
    # scaling book), and 200 Gbit/s for the four chips of a host, as for v5p.
    "v4": Chip("TPU v4", int(30.75 * GiB), 275e12, 1200e9, 50e9, 6.25e9, 3, "megacore", "v4-", 2),
    "v5e": Chip(
        "TPU v5 lite", int(15.75 * GiB), 197e12, 819e9, 50e9, 3.125e9, 2, accelerator="v5litepod-"
    ),
    "v5p": Chip("TPU v5", int(95.74 * GiB), 459e12, 2765e9, 100e9, 6.25e9, 3, "default", "v5p-", 2),
    "v6e": Chip(
        "TPU v6 lite", int(31.25 * GiB), 918e12, 1638e9, 100e9, 12.5e9, 2, accelerator="v6e-"
    ),
    "tpu7x": Chip("TPU7x", int(94.75 * GiB), 1153.5e12, 3690e9, 50e9, 6.25e9, 3),
    "a100": Chip("NVIDIA A100", 80 * 10**9, 312e12, 2039e9, 300e9, 25e9, 1, node=8),
    "h100": Chip("NVIDIA H100", 80 * 10**9, 989e12, 3350e9, 450e9, 50e9, 1, node=8),
    "h200": Chip("NVIDIA H200", 141 * 10**9, 989e12, 4800e9, 450e9, 50e9, 1, node=8),
    "b200": Chip("NVIDIA B200", 180 * 10**9, 2250e12, 8000e9, 900e9, 50e9, 1, node=8),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices, each a block of chips of `shape`; for chip "cpu", fake devices in a row."""

    name: str
    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def facts(self) -> Chip | None:
        return CHIPS.get(self.chip)

    @property
    def compiles_here(self) -> bool:
        """True if fake CPU devices replace it: for CPUs, and for GPUs as an estimate."""
        return self.facts is None or self.facts.node > 0

    @property
    def title(self) -> str:
        """The name, with Google Cloud's accelerator type for such a slice."""
        if self.facts is None or not self.facts.accelerator:
            return self.name
        number = math.prod(self.shape) * self.facts.counted
        slices = f"{self.slices}*" if self.slices > 1 else ""
        return f"{self.name} ({slices}{self.facts.accelerator}{number})"


def topology(name: str) -> Topology:
    """The topology named "v5p:2x2x4", "2*v5p:2x2x4" (two such slices), "h100:8" or "cpu:8" (fake
    CPUs), or by Google Cloud's accelerator type, such as "v5p-32" for "v5p:2x2x4".

    Raises: ValueError for any other name.
    """
    name = _by_shape(name)
    found = re.fullmatch(r"(?:([1-9]\d*)\*)?(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if not found:
        raise ValueError(
            f"topology {name!r} is not like v5p:2x2x4, v5p-32, 2*v5p:2x2x4, h100:8 or cpu:8"
        )
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
    if slices and dimensions == 1:
        raise ValueError(f"topology {name!r}: {chip} has no slices; use {chip}:{shape[0]}")
    return Topology(name, chip, shape, int(slices or 1))


def _by_shape(name: str) -> str:
    """Replaces an accelerator type by a name with its default shape on Google Cloud."""
    found = re.fullmatch(r"(\d+\*)?(\w+-)(\d+)", name)
    chips = [c for c, row in CHIPS.items() if found and found[2] in (row.accelerator, f"{c}-")]
    if not found or not chips or not CHIPS[chips[0]].accelerator:
        return name
    chip = CHIPS[chips[0]]
    shape = [1, 2, 2] if chip.dimensions == 3 else [1, 1]
    while math.prod(shape) * chip.counted < int(found[3]):
        shape = sorted((2 * min(shape), *sorted(shape)[1:]))
    if math.prod(shape) * chip.counted != int(found[3]):
        raise ValueError(f"topology {name!r} is no size of {chips[0]}; sizes are powers of 2")
    sides = shape[::-1] if math.prod(shape) == 4 and chip.dimensions == 3 else shape
    return f"{found[1] or ''}{chips[0]}:{'x'.join(map(str, sides))}"
