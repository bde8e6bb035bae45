"""The dry run with TPU's own compiler: one slice, two, a published model, and compile time."""

import time

import pytest

from moe_jax import config as configs
from moe_jax.dryrun import hlo, topologies
from moe_jax.dryrun import report as dryrun
from moe_jax.parallel import chips

pytestmark = pytest.mark.long


def tiny(**mesh):
    config = configs.default()
    config.model.update(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        dtype="bfloat16",
        remat="full",
    )
    config.mesh.update(mesh)
    config.data.sequence_length = 1024
    config.training.batch_size = config.evaluation.batch_size = 16
    return config


def dry_run(config, name, **options):
    topology = chips.topology(name)
    return dryrun.run(configs.resolve(config), topology, topologies.devices(topology), **options)


def test_one_slice_of_every_dimension_and_two_slices(libtpu):
    one = dry_run(tiny(), "v5p:2x2x1")
    assert one.fits and one.hbm_limit_bytes == chips.CHIPS["v5p"].hbm_bytes
    assert 0.98 <= one.step_flops / one.analytic_flops <= 1.10
    assert {row.axes for row in one.collectives} == {("fsdp",)}
    assert one.roofline.dcn == 0 < one.roofline.ici
    assert 0 < one.mfu_bound < 1
    two = dry_run(tiny(data=2), "2*v5p:2x2x1")
    assert two.roofline.dcn > 0
    assert two.step_flops / two.analytic_flops == one.step_flops / one.analytic_flops
    # Gradients cross: each device sends its part, in float32.
    (between,) = (row for row in two.collectives if row.axes == hlo.SLICES)
    gradients = one.argument_bytes / 3
    assert between.operation == "all-reduce"
    assert between.bytes == pytest.approx(gradients, rel=0.1)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v6e:2x2", "tpu7x:2x2x1", "v5e:1x1"])
def test_every_chip_is_compiled_for(libtpu, name):
    topology = chips.topology(name)
    devices = topologies.devices(topology)
    assert {device.device_kind for device in devices} == {topology.facts.device_kind}
    assert len(devices) == {"v5e:1x1": 1, "tpu7x:2x2x1": 8}.get(name, 4)


def test_a_shape_that_the_chip_does_not_come_in_is_refused(libtpu):
    with pytest.raises(ValueError, match="v5p does not come in that shape"):
        topologies.devices(chips.topology("v5p:3x3x1"))


def test_what_does_not_fit_is_a_report_not_an_error(libtpu):
    config = tiny()
    config.model.update(hidden_size=4096, intermediate_size=16384, num_attention_heads=32)
    config.training.batch_size = config.evaluation.batch_size = 128
    config.model.remat = "none"
    report = dry_run(config, "v5e:2x2")
    assert report.fits is False
    assert report.hbm_peak_bytes > report.hbm_limit_bytes > report.argument_bytes


def test_mixtral_8x7b_fits_sixteen_v5p_and_executes_what_is_due(libtpu):
    """MaxText 0.2.5 needs 60.04 GB for the same batch and float32 state."""
    config = configs.load("configs/mixtral/8x7b.py")
    report = dry_run(config, "v5p:2x2x4")
    assert report.fits
    assert report.argument_bytes < 36e9
    assert report.hbm_peak_bytes < 55e9
    assert 0.99 <= report.step_flops / report.analytic_flops <= 1.10


def test_the_time_to_compile_does_not_grow_with_depth(libtpu):
    """28 layers against 2, for 256 chips, in processor time: 1 but for what is not in the scan."""
    seconds = {}
    for layers in (2, 28):
        changes = {"model.num_hidden_layers": layers}
        config = configs.load("configs/drop_upcycling/moe.py:8x3.7b", changes)
        began = time.process_time()
        dry_run(config, "v5p:8x8x4")
        seconds[layers] = time.process_time() - began
    print(f"compiled in {seconds[2]:.0f} and {seconds[28]:.0f} s of processor time")
    assert seconds[28] <= 1.3 * seconds[2]
