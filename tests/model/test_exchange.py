"""Every way of bringing tokens and experts together gives what one device gives.

On a CPU the ragged exchange is emulated, by the same offsets and sizes.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import model
from moe_jax.dryrun import hlo
from moe_jax.model import exchange, moe
from moe_jax.parallel import mesh as meshes
from moe_jax.training import balance as rules

B, T, D, E, A = 8, 16, 16, 8, 2
CONFIG = model.ModelConfig(
    vocab_size=32,
    hidden_size=D,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=E,
    num_experts_per_tok=A,
)
BIASES = dataclasses.replace(CONFIG, hidden_act="gelu", gated_mlp=False, mlp_bias=True)
MESHES = {
    "data=8": (8, 1, 1, 1),
    "fsdp=8": (1, 8, 1, 1),
    "data=2 expert=4": (2, 1, 4, 1),
    "fsdp=expert=tensor=2": (1, 2, 2, 2),
    "expert=8": (1, 1, 8, 1),
    "expert=tensor=edp=2": (1, 1, 2, 2, 2),
    "edp=8": (1, 1, 1, 1, 8),
}
VALID_BT = jnp.arange(T) < jnp.array([T, 10, T, 3, T, T, 0, T])[:, None]
LONG = pytest.mark.long


@functools.cache
def inputs(config):
    """Parameters, and inputs whose tokens go to even, skewed, and the same two experts."""
    params = model.init(config, jax.random.key(0))["blocks"]["0"]["moe"]
    params = jax.tree.map(lambda w: 8 * w[0], params)
    params["norm"] = {n: jnp.ones_like(w) / 8 for n, w in params["norm"].items()}
    even_BTD = jax.random.normal(jax.random.key(1), (B, T, D))
    toward_D = jnp.linalg.lstsq(params["router"]["kernel"].T, jnp.arange(E) == 5.0)[0]
    toward_D += 0.7 * jnp.linalg.lstsq(params["router"]["kernel"].T, jnp.arange(E) == 2.0)[0]
    toward_D *= D**0.5 / jnp.linalg.norm(toward_D)
    return params, {
        "even": even_BTD,
        "skewed": even_BTD + toward_D,
        "to two experts": 0.1 * even_BTD + 10 * toward_D,
    }


def balance(stats):
    """The balance loss of the whole batch, and so of all shards together."""
    of_layers = rules.pooled(jax.tree.map(lambda x: x[None], stats))
    how = {"scope": "layer", "divide_by_k": False, "form": "switch"}
    return rules.load_balancing(of_layers, num_experts_per_tok=A, **how).mean()


def layer(config, key=None):
    @jax.jit
    def value_and_gradients(x_BTD, params):
        def loss(x_BTD, params):
            y_BTD, stats = moe.moe(x_BTD, params, VALID_BT, config, key=key, training=True)
            return jnp.sum(jnp.sin(y_BTD) * VALID_BT[..., None]) + balance(stats), (y_BTD, stats)

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_BTD, params)
        return *out, gradients

    return value_and_gradients


@functools.cache
def alone(config):
    params, xs = inputs(config)
    one = layer(config)
    return {name: one(x_BTD, params) for name, x_BTD in xs.items()}


def close(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
        got,
        want,
    )


def mesh_of(name):
    return meshes.make(dict(zip(meshes.AXES, MESHES[name], strict=False)))


DEFAULT = {
    ("fsdp=expert=tensor=2", "ring"),
    ("fsdp=expert=tensor=2", "all_to_all"),
    ("expert=8", "all_to_all"),
    ("expert=tensor=edp=2", "ring"),
}


@pytest.mark.parametrize("config", [CONFIG, pytest.param(BIASES, marks=LONG)], ids=["", "biases"])
@pytest.mark.parametrize(
    ("mesh", "mode"),
    [
        pytest.param(mesh, mode, marks=() if (mesh, mode) in DEFAULT else LONG)
        for mesh in MESHES
        for mode in exchange.MODES
    ],
)
def test_value_gradients_and_loads_are_those_of_one_device(config, mesh, mode):
    params, xs = inputs(config)
    assert alone(CONFIG)["to two experts"][1].tokens_per_expert_E[0, [2, 5]].sum() == A * 93
    one_device = alone(config)
    with jax.set_mesh(mesh_of(mesh)):
        on_mesh = layer(dataclasses.replace(config, expert_parallel=mode))
        for name, x_BTD in xs.items():
            y_BTD, stats, gradients = on_mesh(x_BTD, params)
            want_BTD, want_stats, want = one_device[name]
            close(y_BTD[VALID_BT], want_BTD[VALID_BT])
            close(gradients, want)
            np.testing.assert_array_equal(
                stats.tokens_per_expert_E.sum(axis=0), want_stats.tokens_per_expert_E[0]
            )


@pytest.mark.parametrize(
    ("mesh", "priority"),
    [
        ("expert=8", "random"),
        *(pytest.param(*case, marks=LONG) for case in (("expert=8", "position"),)),
        *(pytest.param(mesh, "position", marks=LONG) for mesh in MESHES if mesh != "expert=8"),
    ],
)
def test_an_exchange_of_fixed_shapes_is_the_capacity_of_each_shard(mesh, priority):
    """With the weights gathered each shard drops what its own capacity does not hold."""
    params, xs = inputs(CONFIG)
    capacity = dataclasses.replace(
        CONFIG,
        dispatch="capacity",
        capacity_factor=1.0,
        min_capacity=1,
        token_priority=priority,
    )
    key = jax.random.key(3)
    with jax.set_mesh(mesh_of(mesh)):
        want = layer(capacity, key)(xs["skewed"], params)
        exchanged = dataclasses.replace(capacity, expert_parallel="all_to_all")
        got = layer(exchanged, key)(xs["skewed"], params)
    assert got[1].num_dropped.sum() > 0
    np.testing.assert_array_equal(got[1].num_dropped, want[1].num_dropped)
    close(got[0], want[0])
    close(got[2], want[2])


@pytest.mark.parametrize("mode", ["ring", "all_to_all"])
def test_no_device_gets_the_experts_of_another(mode):
    """So that the mode is what it says: weights are gathered along fsdp only."""
    params, xs = inputs(CONFIG)
    mesh = mesh_of("fsdp=expert=tensor=2")
    texts = {}
    with jax.set_mesh(mesh):
        for name in ("fsdp", mode):
            forward = functools.partial(
                moe.moe,
                valid_BT=VALID_BT,
                config=dataclasses.replace(CONFIG, expert_parallel=name),
            )
            texts[name] = jax.jit(forward).lower(xs["even"], params).compile().as_text()
    whole = (E, D, 24 // 2)  # one matrix of all experts; half of the neurons are another device's
    assert whole in hlo.buffer_shapes(texts["fsdp"])
    assert whole not in hlo.buffer_shapes(texts[mode])
    over = {c.operation for c in hlo.collectives(texts[mode], mesh.shape) if "expert" in c.axes}
    assert over == {"ring": {"all-gather", "reduce-scatter"}, "all_to_all": {"all-gather"}}[mode]


def test_offsets_of_a_ragged_exchange_by_hand():
    """Device 0 sends 2 rows to itself and 1 to the other; device 1 none and 3."""
    there = exchange.Exchange(jnp.array([[2, 1], [0, 3]]), 0)
    np.testing.assert_array_equal(there.input_offsets_XY, [[0, 2], [0, 0]])
    np.testing.assert_array_equal(there.output_offsets_XY, [[0, 0], [2, 1]])


def test_weights_are_rounded_before_they_are_gathered():
    """The value is that of one device, where each product rounds them. A gradient is the sum of
    eight parts, each rounded to the 8 bits of bfloat16, and so are the sums."""
    params, xs = inputs(CONFIG)
    config = dataclasses.replace(CONFIG, dtype="bfloat16", expert_parallel="fsdp")
    x_BTD = xs["even"].astype(jnp.bfloat16)
    want_BTD, _, (_, want) = layer(config)(x_BTD, params)
    with jax.set_mesh(mesh_of("fsdp=8")):
        on_mesh = layer(config)
        y_BTD, _, (_, got) = on_mesh(x_BTD, params)
        text = on_mesh.lower(x_BTD, params).as_text()  # XLA on CPU sends 4 bytes all the same
    valid = np.asarray(VALID_BT)
    np.testing.assert_array_equal(np.asarray(y_BTD)[valid], np.asarray(want_BTD)[valid])
    results = re.findall(r"stablehlo\.all_gather.*-> tensor<(\w+)>", text)
    of_weights = [x for x in results if x[:-4] in (f"{E}x{D}x24x", f"{E}x24x{D}x")]
    assert len(of_weights) >= 3 and all(x.endswith("bf16") for x in of_weights)
    for name, w in got["experts"].items():
        assert w.dtype == jnp.float32
        error = jnp.linalg.norm(w - want["experts"][name]) / jnp.linalg.norm(want["experts"][name])
        assert error < 4 * 2**-8
