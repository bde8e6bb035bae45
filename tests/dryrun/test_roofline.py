"""Least times worked by hand, on slices small enough to draw."""

import dataclasses
import itertools
import types

import numpy as np
import pytest

from moe_jax.dryrun import hlo, roofline
from moe_jax.parallel import chips


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, ...]
    slice_index: int = 0


def mesh_of(shape, sizes, slices=1):
    """Chips in the order of their coordinates, laid row by row over fsdp, expert."""
    places = itertools.product(range(slices), *map(range, shape))
    devices = np.empty(np.prod(shape) * slices, object)
    devices[:] = [Device(coords, index) for index, *coords in places]
    return types.SimpleNamespace(axis_names=("fsdp", "expert"), devices=devices.reshape(sizes))


def seconds_of(topology, mesh, *rows, step_flops=0, traffic=0):
    topology = chips.topology(topology)
    work = {"step_flops": step_flops, "traffic": traffic, "collectives": rows}
    return roofline.seconds(**work, mesh=mesh, chip=topology.facts, topology=topology)


def test_gpus_pass_nvlink_inside_of_a_node_and_the_network_between_nodes():
    devices = np.array([types.SimpleNamespace(id=i) for i in range(16)]).reshape(2, 8)
    mesh = types.SimpleNamespace(axis_names=("fsdp", "expert"), devices=devices)
    inside, across = (
        hlo.Collective("all-gather", (axis,), 1, 10**9) for axis in ("expert", "fsdp")
    )
    found = seconds_of("h100:16", mesh, inside, across)
    assert found.ici == pytest.approx(7 / 8 * 1e9 / 450e9)
    assert found.dcn == pytest.approx(1 / 2 * 1e9 / 50e9)
    both = seconds_of("h100:16", mesh, hlo.Collective("all-gather", ("fsdp", "expert"), 1, 10**9))
    assert both.dcn == pytest.approx(15 / 16 * 1e9 / (8 * 50e9))  # eight adapters leave a node


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        ("all-gather", 7 / 8),  # all parts but the own one pass through
        ("reduce-scatter", 7 / 8),
        ("all-reduce", 2 * 7 / 8),  # one after the other
        ("all-to-all", 7 / 8),
        ("collective-permute", 1),
    ],
)
def test_a_group_over_three_lines_has_three_links(operation, sent):
    row = hlo.Collective(operation, ("fsdp",), 5, 10**9)
    found = seconds_of("v5p:2x2x2", mesh_of((2, 2, 2), (8, 1)), row)
    assert found.ici == pytest.approx(sent * 1e9 / (3 * 100e9))
    assert (found.compute, found.hbm, found.dcn, found.bound) == (0, 0, 0, found.ici)


def test_a_group_has_the_links_of_the_sides_that_it_spans_two_where_they_are_rings():
    mesh = mesh_of((4, 4, 4), (16, 4))
    along = {"fsdp": 4, "expert": 2}  # two rings and one
    for axis, links in along.items():
        row = hlo.Collective("collective-permute", (axis,), 1, 10**9)
        assert seconds_of("v5p:4x4x4", mesh, row).ici == pytest.approx(1e9 / (links * 100e9))
    unknown = hlo.Collective("collective-permute", ("?",), 1, 10**9)
    assert seconds_of("v5p:4x4x4", mesh, unknown).ici == pytest.approx(1e9 / (6 * 100e9))


def test_what_goes_between_slices_takes_the_other_network():
    mesh = mesh_of((2, 2), (8, 1), slices=2)
    between = hlo.Collective("all-reduce", hlo.SLICES, 1, 10**9)
    within = hlo.Collective("all-gather", ("fsdp",), 1, 10**9)
    found = seconds_of("2*v6e:2x2", mesh, between, within)
    assert found.dcn == pytest.approx(2 * 1e9 / 2 / 12.5e9)
    assert found.ici == pytest.approx(1e9 * 3 / 4 / (2 * 100e9))  # four devices, not eight


def test_the_slowest_of_products_memory_and_networks_bounds_the_step():
    found = seconds_of("v5e:2x2", mesh_of((2, 2), (4, 1)), step_flops=197e12, traffic=2 * 819e9)
    assert (found.compute, found.hbm, found.bound) == (1, 2, 2)
