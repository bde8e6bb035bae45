"""Decoding compiled ahead of time for TPUs: which experts are copied, and from where."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax import model
from moe_jax.dryrun import hlo_text
from moe_jax.evaluation import generate
from moe_jax.evaluation.sampling import GREEDY, Sampling
from moe_jax.ops import host_memory, implementations
from moe_jax.parallel import mesh as meshes
from tests.ops.test_stacks import copies_of_a_layer

E, D, F = 8, 512, 1024


def small_mixture():
    return model.ModelConfig(
        vocab_size=2048,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_experts=E,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )


def drawing(array):
    key = jax.eval_shape(lambda: jax.random.key(0))
    settings = (array((), jnp.asarray(x).dtype) for x in GREEDY)
    return generate._Drawing(array(key.shape, key.dtype), Sampling(*settings))


@pytest.mark.long
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("rows", [1, 64])
def test_no_layer_of_experts_is_copied_out_of_its_stack(libtpu, topology, rows):
    config = small_mixture()
    mesh = meshes.make({}, libtpu(topology)[:1])
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    params = jax.tree.map(lambda x: array(x.shape, jnp.bfloat16), shapes)
    arguments = (
        *(params, array((rows, 128), jnp.int32), array((rows,), jnp.int32)),
        drawing(array),
    )
    with jax.set_mesh(mesh):
        traced = generate._continue.trace(*arguments, config=config, num_tokens=128)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert re.search("custom_call_target=.tpu_custom_call", text)  # megablox
    for shape in ((E, D, F), (E, F, D)):
        assert not copies_of_a_layer(text, shape, "bf16")


@pytest.mark.long
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_experts_in_the_hosts_memory_are_sent_as_the_tokens_choose_them(
    libtpu, topology, monkeypatch
):
    """Generation has no mesh, by which the kernels would know the chip, so the test says it."""
    monkeypatch.setattr(implementations, "platform", lambda: "tpu")
    chip = libtpu(topology)[0]
    config, L = small_mixture(), 6

    def array(shape, dtype, kind="device"):
        place = jax.sharding.SingleDeviceSharding(chip, memory_kind=kind)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    params = jax.tree.map(lambda x: array(x.shape, jnp.bfloat16), shapes)
    experts = params["blocks"]["0"]["moe"]["experts"]
    params["blocks"]["0"]["moe"]["experts"] = {
        name: host_memory.HostExperts(
            array((L * E, *x.shape[2:]), jnp.bfloat16, host_memory.KIND),
            array((L,), jnp.int32),
            matrices=x.shape[1:],
        )
        for name, x in experts.items()
    }
    arguments = (
        *(params, array((1, 128), jnp.int32), array((1,), jnp.int32)),
        drawing(array),
    )
    traced = generate._continue.trace(*arguments, config=config, num_tokens=128)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    of_layer = 2 * 3 * E * D * F  # bytes
    assert memory.host_argument_size_in_bytes >= L * of_layer
    on_chip = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    others = sum(2 * x.size for x in jax.tree.leaves(shapes)) - L * of_layer
    assert on_chip < others + 2 * of_layer  # a prompt's tokens may choose all experts of a layer
    # A new token's two experts are sent one by one, by copies that the program can wait for later.
    for shape, number in (((1, D, F), 2 * 2), ((1, F, D), 2)):
        sent = rf"bf16\[{','.join(map(str, shape))}\]\S*, \S+ dynamic-slice-start\("
        assert len(re.findall(sent, text)) == number
    # No array of all experts lies on the chip, and it is sent what is due and not a byte more: the
    # experts of each layer for the prompt, and the two of each of 127 tokens.
    places = re.findall(rf"bf16\[{L * E},(?:{D},{F}|{F},{D})\]{{([^}}]*)}}", text)
    assert places and all(place.endswith("S(5)") for place in places)
    bytes_sent = hlo_text.Module(text).total(
        lambda _, i: {"sent": sum(i.sizes[1:])} if i.operation == "dynamic-slice-start" else {}
    )["sent"]
    numbers = 4 * 4 * 3 * (L + 127 * L * 2)  # each copy's results have four indices beside the data
    assert bytes_sent - numbers == of_layer // E * (L * E + 127 * L * 2)
