"""The device mesh: five axes, any of which may be 1.

  data    replicates parameters
  fsdp    shards parameters
  expert  shards experts over devices with different tokens
  tensor  shards heads and neurons, including those of experts
  edp     shards heads and dense neurons, and shards experts over devices with the same tokens

The first three shard the batch. Skywork-MoE (arXiv 2406.06563, §4) compares experts sharded over
the data-parallel devices (EP: expert=N), experts sharded over the tensor-parallel devices (its
expert data parallelism, EDP: edp=N), and the neurons of each expert sharded over the latter (ETP:
tensor=N).
"""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

AXES = ("data", "fsdp", "expert", "tensor", "edp")


def axis_sizes(sizes: dict[str, int], num_devices: int) -> dict[str, int]:
    """The sizes, 1 if absent, with a -1 replaced so that their product is the number of devices.

    Raises: ValueError for an unknown axis, for more than one -1, or for a product that cannot fit.
    """
    if unknown := sizes.keys() - set(AXES):
        raise ValueError(f"mesh axis {unknown.pop()!r} is unknown; the axes are {', '.join(AXES)}")
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {shown}: an axis is at least 1, or -1 to fill")
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh {shown}: only one axis may be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and num_devices % fixed == 0:
        return {a: num_devices // fixed if size == -1 else size for a, size in sizes.items()}
    if fixed != num_devices:
        raise ValueError(
            f"mesh {shown} does not fit {num_devices} device(s); "
            f"the axes must multiply to {num_devices}, or set one of them to -1"
        )
    return sizes


def make(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh over all devices, or over those given; `axis_sizes` describes `sizes`.

    Several slices of TPUs, between which the network is slow, are placed along one axis: `data`, or
    `fsdp` if data is 1.

    Raises: ValueError if the sizes do not fit the devices, their slices or their torus.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(sizes, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    try:
        if slices == 1:
            return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=devices)
        outer = "fsdp" if sizes["data"] == 1 else "data"
        if sizes[outer] % slices:
            raise ValueError(
                f"mesh {outer}={sizes[outer]} is not divisible by the {slices} slices, which lie "
                f"along it; use a multiple of {slices}"
            )
        between = {axis: slices if axis == outer else 1 for axis in AXES}
        within = [sizes[axis] // between[axis] for axis in AXES]
        grid = mesh_utils.create_hybrid_device_mesh(within, tuple(between.values()), devices)
    except NotImplementedError:
        shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"mesh {shown} cannot be laid over the torus of {len(devices) // slices} chips; "
            "use axes that are products of its sides"
        ) from None
    return jax.sharding.Mesh(grid, AXES, axis_types=auto)


def first_slice(mesh: jax.sharding.Mesh) -> np.ndarray:
    """The devices of one TPU slice, in the mesh's order; all devices if there is only one slice."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
    places = np.nonzero(slices == slices.flat[0])
    return mesh.devices[np.ix_(*map(np.unique, places))]


def one_device() -> jax.sharding.Mesh:
    """The mesh for a command that uses one device."""
    return make({}, jax.devices()[:1])


def under(mesh: jax.sharding.Mesh, function):
    """`function`, with `mesh` set only during its calls: Orbax has bugs under a set mesh."""

    @functools.wraps(function)
    def call(*arguments):
        with jax.set_mesh(mesh):
            return function(*arguments)

    return call
