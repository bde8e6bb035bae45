"""The least time that a step can take on TPUs: products, memory and networks, each by itself.

What overlaps perfectly takes as long as the slowest of the four.
"""

import dataclasses
import math

import jax
import numpy as np

from moe_jax.dryrun import hlo
from moe_jax.parallel import chips
from moe_jax.parallel import mesh as meshes

# Bytes that leave a device, by what `hlo.Collective.bytes` counts, if all n devices pass parts
# round a ring.
SENT = {
    "all-gather": lambda size, n: size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1) / n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "ragged-all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}


@dataclasses.dataclass(frozen=True)
class Seconds:
    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def bound(self) -> float:
        return max(dataclasses.astuple(self))


def links(grid: np.ndarray, axes: tuple[int, ...], topology: chips.Topology) -> int:
    """Links of a device along the sides of the torus that a group along these axes spans.

    Args: grid: the devices of a slice, as in the mesh; the axes are numbered as there.
    """
    place = tuple(slice(None) if axis in axes else 0 for axis in range(grid.ndim))
    coords = [device.coords for device in np.ravel(grid[place])]
    spanned = np.flatnonzero(np.ptp(coords, axis=0) > 0).tolist()
    return sum(2 if topology.facts.wraps(topology.shape, side) else 1 for side in spanned)


def ici_seconds(row: hlo.Collective, size: int, links: int, chip: chips.Chip) -> float:
    """The time of a collective in groups of `size` devices: none between the cores of a chip."""
    if not links:
        return 0.0
    return SENT[row.operation](row.bytes, size) / (links * chip.link_bandwidth)


def dcn_seconds(row: hlo.Collective, slices: int, chip: chips.Chip) -> float:
    return SENT[row.operation](row.bytes, slices) / chip.dcn_bandwidth


def seconds(
    *,
    step_flops: float,
    traffic: float,
    collectives: tuple[hlo.Collective, ...],
    mesh: jax.sharding.Mesh,
    topology: chips.Topology,
) -> Seconds:
    """The time of one step by each of the four; all of one device.

    Args: traffic: bytes to and from HBM. Collectives wait for each other, even along other axes.
    """
    chip, grid = topology.facts, meshes.first_slice(mesh)
    ici = dcn = 0.0
    for row in collectives:
        if row.axes == hlo.SLICES:
            dcn += dcn_seconds(row, topology.slices, chip)
            continue
        names = mesh.axis_names if row.axes == ("?",) else row.axes
        axes = tuple(mesh.axis_names.index(name) for name in names)
        size = math.prod(grid.shape[axis] for axis in axes)
        ici += ici_seconds(row, size, links(grid, axes, topology), chip)
    return Seconds(step_flops / chip.flops, traffic / chip.hbm_bandwidth, ici, dcn)
