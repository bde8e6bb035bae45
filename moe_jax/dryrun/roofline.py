"""Lower bounds for a step's time on chips: compute, memory and the two networks, each separately.

If they overlapped perfectly, the step would take as long as the slowest of the four.
"""

import dataclasses
import math

import jax
import numpy as np

from moe_jax.dryrun import hlo
from moe_jax.parallel import chips
from moe_jax.parallel import mesh as meshes


def sent(row: hlo.Collective, n: int) -> float:
    """Bytes that each device sends if the n devices of a group use a ring algorithm."""
    if row.operation == "collective-permute":
        return row.bytes
    return (2 if row.operation == "all-reduce" else 1) * row.bytes * (n - 1) / n


@dataclasses.dataclass(frozen=True)
class Seconds:
    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def bound(self) -> float:
        return max(dataclasses.astuple(self))


def links(
    grid: np.ndarray, axes: tuple[int, ...], chip: chips.Chip, topology: chips.Topology
) -> int:
    """The number of a device's links along the sides of the torus that a group along these axes
    spans. For a GPU it is 1 within a node, which NVLink joins, and 0 for a group of several nodes.

    Args:
      grid: the devices of a slice, arranged like the mesh.
      axes: indices of the mesh's axes.
    """
    group = tuple(slice(None) if axis in axes else 0 for axis in range(grid.ndim))
    if chip.node:
        return members_of_node(grid, axes, chip) == np.size(grid[group])
    coords = [device.coords for device in np.ravel(grid[group])]
    spanned = np.flatnonzero(np.ptp(coords, axis=0) > 0).tolist()
    return sum(1 + chip.wraps(topology.shape, side) for side in spanned)


def members_of_node(grid: np.ndarray, axes: tuple[int, ...], chip: chips.Chip) -> int:
    """The number of GPUs that a group along these axes has in one node."""
    group = tuple(slice(None) if axis in axes else 0 for axis in range(grid.ndim))
    nodes = [device.id // chip.node for device in np.ravel(grid[group])]
    return nodes.count(nodes[0])


def seconds(
    *,
    step_flops: float,
    traffic: float,
    collectives: tuple[hlo.Collective, ...],
    mesh: jax.sharding.Mesh,
    chip: chips.Chip,
    topology: chips.Topology,
) -> Seconds:
    """Each of the four lower bounds for one step; all arguments are per device.

    Args:
      traffic: bytes to and from HBM.
      collectives: the step's collectives; they are assumed never to overlap, even along different
        axes.
    """
    grid, ici, dcn = meshes.first_slice(mesh), 0.0, 0.0
    for row in collectives:
        if row.axes == hlo.SLICES:
            dcn += sent(row, topology.slices) / chip.dcn_bandwidth
            continue
        names = mesh.axis_names if row.axes == ("?",) else row.axes
        axes = tuple(mesh.axis_names.index(name) for name in names)
        if number := links(grid, axes, chip, topology):  # 0 between the cores of one chip
            size = math.prod(grid.shape[axis] for axis in axes)
            ici += sent(row, size) / (number * chip.link_bandwidth)
        elif chip.node:  # each GPU of a group has its own network adapter to other nodes
            size = math.prod(grid.shape[axis] for axis in axes)
            adapters = members_of_node(grid, axes, chip)
            dcn += sent(row, size) / (adapters * chip.dcn_bandwidth)
    return Seconds(step_flops / chip.flops, traffic / chip.hbm_bandwidth, ici, dcn)
