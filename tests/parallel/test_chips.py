"""Names of topologies, and which of their sides are rings."""

import pytest

from moe_jax.parallel import chips


def test_a_name_says_slices_chip_and_shape():
    assert chips.topology("v5p:2x2x4") == chips.Topology("v5p:2x2x4", "v5p", (2, 2, 4))
    assert chips.topology("3*v6e:4x8") == chips.Topology("3*v6e:4x8", "v6e", (4, 8), 3)
    fake = chips.topology("cpu:8")
    assert (fake.shape, fake.facts) == ((8,), None)


@pytest.mark.parametrize(
    ("accelerator", "shape"),
    [
        ("v4-8", "v4:2x2x1"),
        ("v5p-16", "v5p:2x2x2"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-512", "v5p:4x8x8"),
        ("v5litepod-8", "v5e:2x4"),
        ("v6e-256", "v6e:16x16"),
        ("2*v5p-32", "2*v5p:2x2x4"),
    ],
)
def test_an_accelerator_type_is_the_slice_that_google_cloud_rents_under_it(accelerator, shape):
    found = chips.topology(accelerator)
    assert found == chips.topology(shape) and found.title == f"{shape} ({accelerator})"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("v5p", "is not like v5p:2x2x4"),
        ("v5p:2x0x2", "is not like v5p:2x2x4"),
        ("0*v5p:2x2x2", "is not like v5p:2x2x4"),
        ("v9:8", "unknown chip v9; use one of cpu, v4, v5e, v5p, v6e, tpu7x, a100, h100"),
        ("v5p-12", "'v5p-12' is no size of v5p; sizes are powers of 2"),
        ("tpu7x-8", "is not like v5p:2x2x4, v5p-32"),
        ("v5e:2x2x2", "v5e has 2 dimension.* for example v5e:2x2$"),
        ("v5p:4x4", "v5p has 3 dimension.* for example v5p:2x2x2$"),
        ("cpu:2x2", "cpu has 1 dimension.* for example cpu:8$"),
        ("2*cpu:4", "cpu has no slices; use cpu:4"),
        ("2*h100:8", "h100 has no slices; use h100:8"),
    ],
)
def test_what_is_no_topology_is_refused(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        chips.topology(name)


def test_sides_are_rings_in_whole_cubes_and_across_a_whole_pod():
    v5p, v5e = chips.CHIPS["v5p"], chips.CHIPS["v5e"]
    assert all(v5p.wraps((4, 4, 8), side) for side in range(3))
    assert not any(v5p.wraps((2, 4, 4), side) for side in range(3))
    assert v5e.wraps((8, 16), 1) and not v5e.wraps((8, 16), 0)


def test_a_chips_links_add_up_to_the_published_bandwidth():
    """GB/s of all links of a chip in both directions: of v5e, v5p, v6e and (two devices) TPU7x."""
    for name, published, devices in (("v5e", 400, 1), ("v5p", 1200, 1), ("v6e", 800, 1)) + (
        ("tpu7x", 1200, 2),
    ):
        chip = chips.CHIPS[name]
        links = 2 * chip.dimensions
        assert devices * links * 2 * chip.link_bandwidth == published * 1e9
