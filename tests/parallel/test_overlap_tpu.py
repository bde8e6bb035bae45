"""That XLA runs products beside an exchange of tokens, read from the schedule that it compiles."""

import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax import model
from moe_jax.model import moe
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding, xla_flags

B, T, D = 4, 2048, 1024
CONFIG = model.ModelConfig(
    vocab_size=32,
    hidden_size=D,
    intermediate_size=2 * D,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_experts=8,
    num_experts_per_tok=2,
    shared_expert_intermediate_size=2 * D,
    dtype="bfloat16",
    dispatch="capacity",
    expert_parallel="all_to_all",
)


def schedule(devices, flags) -> list[tuple[str, str]]:
    """(operation, scope) of the instructions of one sparse layer, in the order they run in."""
    mesh = meshes.make({"expert": 4}, devices)
    params = jax.eval_shape(
        lambda: jax.tree.map(
            lambda w: w[0], model.init(CONFIG, jax.random.key(0))["blocks"]["0"]["moe"]
        )
    )

    def array(shape, dtype, spec=sharding.BATCH):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    specs = sharding.layer_specs(params, "moe")
    params = jax.tree.map(lambda w, spec: array(w.shape, w.dtype, spec), params, specs)
    with jax.set_mesh(mesh):
        lowered = (
            jax.jit(lambda x, params, valid: moe.moe(x, params, valid, CONFIG, training=True)[0])
            .trace(array((B, T, D), jnp.bfloat16), params, array((B, T), bool))
            .lower(lowering_platforms=("tpu",))
        )
    text = lowered.compile(compiler_options=flags).as_text()
    entry = text[text.index("\nENTRY") :].splitlines()
    found = (
        re.match(r".* = (?:\(.*?\)|\S+) ([\w\-]+)\(.*?(?:op_name=\"(.*?)\"|$)", x) for x in entry
    )
    return [(x[1], x[2] or "") for x in found if x]


@pytest.mark.long
def test_the_shared_experts_products_run_beside_the_exchanges_of_tokens(libtpu):
    """The first and the last of the three exchanges (rows, their weights, rows back) do."""
    flags = {flag.name: flag.value for flag in xla_flags.CHIPS["v5p"].flags}
    beside, underway = [], 0
    for operation, scope in schedule(libtpu("v5p:2x2x1"), flags):
        underway += {"all-to-all-start": 1, "all-to-all-done": -1}.get(operation, 0)
        if underway and operation == "fusion" and "dot_general" in scope:
            beside.append("shared_expert" in scope)
    assert sum(beside) == 2


@pytest.mark.long
def test_without_the_flag_every_exchange_is_waited_for(libtpu):
    operations = [operation for operation, _ in schedule(libtpu("v5p:2x2x1"), {})]
    assert operations.count("all-to-all") == 3
    assert "all-to-all-start" not in operations
