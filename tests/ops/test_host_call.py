"""Numpy functions inside of compiled programs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import host_call


def _sums(inputs, outputs):
    for x, y in zip(inputs, outputs, strict=True):
        assert x.flags.c_contiguous
        np.cumsum(x, out=y)


def _failing(inputs, outputs):
    raise ValueError("no such thing")


host_call.register("moe_jax_test_sums", _sums)
host_call.register("moe_jax_test_failing", _failing)


def called(name, *arrays):
    return host_call.call(f"moe_jax_test_{name}", arrays, *arrays, flops=0)


@pytest.mark.parametrize("sizes", [(3,), (5, 2), (1, 0, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_it_reads_and_writes_the_arrays_of_the_program(sizes, dtype):
    arrays = [jnp.arange(size).astype(dtype) + 1 for size in sizes]
    found = jax.jit(lambda *arrays: called("sums", *(2 * x for x in arrays)))(*arrays)
    for array, sums in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(sums, np.cumsum(2 * np.asarray(array)))
        assert sums.dtype == dtype


def test_what_goes_wrong_in_it_is_raised_with_its_words():
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such thing"):
        jax.block_until_ready(jax.jit(lambda x: called("failing", x))(jnp.ones(2)))


def test_all_devices_may_call_at_the_same_time():
    number = jax.device_count()
    mesh = jax.make_mesh((number,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    x = np.arange(number * 1000, dtype=np.int32).reshape(number, 1000)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=jax.P("all"), out_specs=jax.P("all"), check_vma=False)
    def sums(x):
        for _ in range(20):
            (y,) = called("sums", x[0] % 1000)
            x = y[None]
        return x

    found = sums(x)
    for _ in range(20):
        x = np.cumsum(x % 1000, axis=1)
    np.testing.assert_array_equal(found, x)


PROGRAM = """
import time
import jax, jax.numpy as jnp
from moe_jax.ops import host_call

def sleep(inputs, outputs):
    time.sleep(0.02)
    outputs[0][...] = inputs[0]

host_call.register("moe_jax_test_sleep", sleep)

@jax.jit
def steps(x):
    def step(_, x):
        return host_call.call("moe_jax_test_sleep", [x], x, flops=0)[0] @ x
    return jax.lax.fori_loop(0, 100, step, x)

x = steps(jnp.eye(500))
assert not x.is_ready()
"""


def test_a_program_ends_that_leaves_its_last_steps_to_themselves():
    """The interpreter waits for what is on its way; else the next call would wait for it."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
