"""Decoding compiled ahead of time for TPUs: no layer of experts is copied."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax import model
from moe_jax.evaluation import generate
from moe_jax.parallel import mesh as meshes
from tests.ops.test_stacks import copies_of_a_layer

E, D, F = 8, 512, 1024


@pytest.mark.long
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("rows", [1, 64])
def test_no_layer_of_experts_is_copied_out_of_its_stack(libtpu, topology, rows):
    config = model.ModelConfig(
        vocab_size=2048,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_experts=E,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )
    mesh = meshes.make({}, libtpu(topology)[:1])
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    params = jax.tree.map(lambda x: array(x.shape, jnp.bfloat16), shapes)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (
        *(params, array((rows, 128), jnp.int32), array((rows,), jnp.int32)),
        *(array(key.shape, key.dtype), array((), jnp.float32), array((), jnp.float32)),
    )
    with jax.set_mesh(mesh):
        traced = generate._continue.trace(*arguments, config=config, num_tokens=128)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert re.search("custom_call_target=.tpu_custom_call", text)  # megablox
    for shape in ((E, D, F), (E, F, D)):
        assert not copies_of_a_layer(text, shape, "bf16")
