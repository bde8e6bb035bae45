"""The compilers know every flag of the table, and no TPU flag of it is without effect."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.parallel import xla_flags

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


def started(variable, flags, program="import jax; jax.devices()"):
    """Runs a fresh process whose compiler reads `flags` at its start."""
    environ = {**os.environ, variable: flags}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)


def test_flags_that_were_set_before_come_last_and_so_win():
    shell = f'XLA_FLAGS="--of-mine=1 --two"; {xla_flags.export("gpu")}; printenv XLA_FLAGS'
    said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert said == f"{xla_flags.CHIPS['gpu']} --of-mine=1 --two\n"


def test_xla_knows_the_gpu_flags_and_would_abort_if_not():
    flags = str(xla_flags.CHIPS["gpu"])
    assert started("XLA_FLAGS", flags).returncode == 0
    refused = started("XLA_FLAGS", f"{flags} --xla_gpu_nonesuch=1")
    assert refused.returncode and "xla_gpu_nonesuch" in refused.stderr


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
device, *_ = topologies.get_topology_desc(platform="tpu", topology_name={topology!r}).devices
sharding = jax.sharding.SingleDeviceSharding(device)
x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=sharding)
jax.jit(jnp.dot).trace(x, x).lower(lowering_platforms=("tpu",)).compile()
"""


@pytest.mark.long
@pytest.mark.parametrize(("chip", "topology"), TOPOLOGIES.items())
def test_libtpu_knows_the_flags_of_each_chip(chip, topology, libtpu):
    flag_set = xla_flags.CHIPS[chip]
    program = COMPILE.format(topology=topology)
    ended = started(flag_set.variable, str(flag_set), program)
    assert ended.returncode == 0, ended.stderr
    refused = started(flag_set.variable, f"{flag_set} --xla_tpu_nonesuch=1", program)
    assert refused.returncode and "xla_tpu_nonesuch" in refused.stderr


def gather_exchange_products_scatter(devices, rows, width):
    """Lowers the part of an expert-parallel step that the flags are for."""
    mesh = jax.sharding.Mesh(np.array(devices), ("expert",))
    spec = jax.P("expert")
    sharding = jax.sharding.NamedSharding(mesh, spec)

    def step(x_MD, w_DD):
        w_DD = jax.lax.all_gather(w_DD, "expert", axis=0, tiled=True)
        y_MD = jax.lax.all_to_all(x_MD, "expert", 0, 0, tiled=True)
        y_MD = y_MD @ w_DD + jnp.sin(x_MD @ w_DD) @ w_DD
        return y_MD, jax.lax.psum_scatter(y_MD.T @ y_MD, "expert", scatter_dimension=0, tiled=True)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=(spec, spec))
    shapes = [(rows * len(devices), width), (width, width)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    return jax.jit(mapped).trace(*arrays).lower(lowering_platforms=("tpu",))


@pytest.mark.long
@pytest.mark.parametrize(("chip", "topology"), TOPOLOGIES.items())
def test_each_tpu_flag_changes_what_is_compiled(chip, topology, libtpu):
    # On these two a limit of VMEM shows in the larger one only; v4 and tpu7x take minutes for that.
    rows, width = (4096, 2048) if chip in ("v5e", "v6e") else (512, 512)
    lowered = gather_exchange_products_scatter(libtpu(topology), rows, width)
    without = lowered.compile().as_text()
    for flag in xla_flags.CHIPS[chip].flags:
        assert lowered.compile(compiler_options={flag.name: flag.value}).as_text() != without, flag
