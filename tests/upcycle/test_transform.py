"""The whole tree: what is copied, what is made, and what the result does not depend on."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe_jax import model, upcycle
from moe_jax.model.config import DENSE, MOE
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding

PARENT = model.ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=38,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    remat="none",
)
SPARSE = PARENT.to_moe(num_experts=4, num_experts_per_tok=2)
MIXED = dataclasses.replace(SPARSE, layers=(DENSE, MOE, DENSE, MOE, DENSE))
MIXED_SLOTS = {"0": (0,), "1": (1, 3), "2": (2, 4)}  # dense, then (sparse, dense) twice
MORE = dataclasses.replace(SPARSE, num_experts=6)
KEY = jax.random.key(3)
PAPER = {"ratio": 0.25}  # floor(0.25 * 38) = 9
RELEASED = {"ratio": 0.25, "index_sharing": "per_matrix", "permute_neurons": True}
long = pytest.mark.long


@functools.cache
def parent():
    """No two leaves or layers alike (norms too), large enough for the FFNs to matter."""
    shapes = jax.eval_shape(functools.partial(model.init, PARENT), jax.random.key(0))
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: (draw(size=leaf.shape) * 0.4).astype(leaf.dtype), shapes)


def transform(moe_config, recipe, **parameters):
    return functools.partial(
        upcycle.upcycle,
        config=PARENT,
        moe_config=moe_config,
        recipe=recipe,
        key=KEY,
        **parameters,
    )


@functools.cache
def upcycled(moe_config, recipe, **parameters):
    return jax.jit(transform(moe_config, recipe, **parameters))(parent())


@functools.cache
def upcycled_eagerly(**parameters):
    """Six experts in all layers: other results are compared with this."""
    return transform(MORE, "drop", **parameters)(parent())


def assert_bitwise_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params):
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 8), 0, PARENT.vocab_size)
    return model.apply(params, tokens_BT, config).logits_BTV


@pytest.mark.parametrize(
    "moe_config",
    [pytest.param(MIXED, id="mixed"), pytest.param(SPARSE, id="all sparse", marks=long)],
)
def test_naive_upcycling_preserves_logits(moe_config):
    """The weights of equal experts sum to one, so the mixture is the FFN itself."""
    dense = logits(PARENT, parent())
    np.testing.assert_allclose(
        logits(moe_config, upcycled(moe_config, "naive")), dense, rtol=1e-5, atol=1e-5
    )


def test_the_logits_depend_on_the_experts():
    """So that the equality above says something."""
    redrawn = logits(MIXED, upcycled(MIXED, "drop", **PAPER))
    assert np.abs(redrawn - logits(PARENT, parent())).max() > 0.1


def test_ratio_zero_is_naive_upcycling():
    assert_bitwise_equal(upcycled(MIXED, "drop", ratio=0.0), upcycled(MIXED, "naive"))


def test_each_layer_is_made_of_its_own_dense_layer():
    blocks, old = upcycled(MIXED, "naive")["blocks"], parent()["blocks"]["0"]
    assert set(blocks) == set(MIXED_SLOTS)
    for slot, layers in MIXED_SLOTS.items():
        of_layers = jax.tree.map(lambda w, layers=layers: np.asarray(w)[list(layers)], old)
        if MIXED.layers[layers[0]] == DENSE:
            assert_bitwise_equal(blocks[slot], of_layers)
            continue
        assert set(blocks[slot]) == {"attention", "moe"}
        moe, mlp = blocks[slot]["moe"], of_layers["mlp"]
        assert_bitwise_equal(blocks[slot]["attention"], of_layers["attention"])
        assert_bitwise_equal(moe["norm"], mlp["norm"])
        for name in ("gate", "up", "down"):
            copies = np.broadcast_to(mlp[name][:, None], moe["experts"][name].shape)
            np.testing.assert_array_equal(moe["experts"][name], copies)
        assert moe["router"]["kernel"].shape == (len(layers), 16, 4)


def test_only_feed_forward_layers_change_and_no_two_experts_are_alike():
    made, old = (jax.tree.map(np.asarray, p) for p in (upcycled_eagerly(**PAPER), parent()))
    shapes = jax.eval_shape(functools.partial(model.init, MORE), jax.random.key(0))
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, shapes)
    for name in ("embed", "unembed", "final_norm"):
        assert_bitwise_equal(made[name], old[name])
    block, old_block = made["blocks"]["0"], old["blocks"]["0"]
    assert_bitwise_equal(block["attention"], old_block["attention"])
    assert_bitwise_equal(block["moe"]["norm"], old_block["mlp"]["norm"])
    # The new neurons and their values differ in every expert of every layer.
    experts = PARENT.num_hidden_layers * MORE.num_experts
    for name, axis_of_neurons in (("gate", 3), ("up", 3), ("down", 2)):
        new_LEDF = np.moveaxis(block["moe"]["experts"][name], axis_of_neurons, 3)
        old_L1DF = np.moveaxis(old_block["mlp"][name][:, None], axis_of_neurons, 3)
        changed_LEDF = new_LEDF != old_L1DF
        np.testing.assert_array_equal(changed_LEDF.any(axis=2).sum(axis=2), 9)
        chosen = changed_LEDF.any(axis=2).reshape(experts, -1)
        assert len(np.unique(chosen, axis=0)) == experts
        values = new_LEDF[changed_LEDF]
        assert len(np.unique(values)) > 0.99 * values.size
    kernels = block["moe"]["router"]["kernel"]
    assert len(np.unique(kernels)) > 0.99 * kernels.size


def first_experts(params, number):
    """The tree of a model that has only the first of the experts."""
    moe = params["blocks"]["0"]["moe"]
    moe = {
        **moe,
        "router": {"kernel": moe["router"]["kernel"][..., :number]},
        "experts": jax.tree.map(lambda w: w[:, :number], moe["experts"]),
    }
    return {**params, "blocks": {"0": {**params["blocks"]["0"], "moe": moe}}}


def test_an_expert_does_not_depend_on_compilation_nor_on_which_other_layers_are_sparse():
    somewhere = upcycled(MIXED, "drop", **PAPER)["blocks"]["1"]["moe"]
    everywhere = first_experts(upcycled_eagerly(**PAPER), 4)["blocks"]["0"]["moe"]
    of_layers = jax.tree.map(lambda w: np.asarray(w)[list(MIXED_SLOTS["1"])], everywhere)
    assert_bitwise_equal(somewhere, of_layers)


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        pytest.param((1, 8, 1, 1), RELEASED, id="fsdp=8-released"),
        pytest.param((1, 2, 2, 2), PAPER, id="fsdp=expert=tensor=2-paper"),
        pytest.param((1, 8, 1, 1), PAPER, id="fsdp=8-paper", marks=long),
        pytest.param((1, 2, 2, 2), RELEASED, id="fsdp=expert=tensor=2-released", marks=long),
        pytest.param((2, 1, 4, 1), RELEASED, id="data=2-expert=4-released", marks=long),
        pytest.param((1, 2, 2, 1, 2), RELEASED, id="fsdp=expert=edp=2-released", marks=long),
        pytest.param(None, PAPER, id="no mesh-paper", marks=long),
        pytest.param(None, RELEASED, id="no mesh-released", marks=long),
    ],
)
def test_no_bit_depends_on_mesh_or_compilation_or_number_of_experts(sizes, parameters):
    """Compiled and sharded with four experts, against eagerly on one device with six."""
    create = transform(SPARSE, "drop", **parameters)
    if sizes is None:
        made = jax.jit(create)(parent())
    else:
        mesh = meshes.make(dict(zip(meshes.AXES, sizes, strict=False)))
        with jax.set_mesh(mesh):
            params = jax.device_put(parent(), sharding.shardings(parent(), mesh))
            expected = sharding.shardings(jax.eval_shape(create, params), mesh)
            made = jax.jit(create, out_shardings=expected)(params)
    assert_bitwise_equal(made, first_experts(upcycled_eagerly(**parameters), 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"recipe": "drp"},
            "recipe='drp' is unknown: did you mean 'drop'. Use one of naive",
        ),
        ({"recipe": "naive", "ratio": 0.5}, "recipe 'naive' has no parameter 'ratio'"),
        ({"ration": 0.5}, "no parameter 'ration'; it takes ratio, index_sharing, permute"),
        ({"ratio": 1.5}, "ratio=1.5 .* use a value from 0 to 1"),
        ({"ratio": -0.1}, "ratio=-0.1 .* use a value from 0 to 1"),
        ({"ratio": float("nan")}, "ratio=nan .* use a value from 0 to 1"),
        ({"index_sharing": "row"}, "index_sharing='row' is unknown; use one of neuron, per_matrix"),
        ({"router": "ones"}, "router='ones' is unknown; use one of normal, centred_uniform"),
        ({"config": SPARSE}, "needs a dense parent; this one has num_experts=4"),
        ({"router": "copied"}, "needs a mixture to copy from"),
        ({"router": "centroids"}, "needs the statistic 'centroids'"),
        ({"recipe": "prune"}, "recipe 'prune' needs a mixture to be made of"),
        ({"config": MIXED}, "needs a dense parent; this one has num_experts=4"),
        ({"moe_config": PARENT}, "no sparse layer; set num_experts"),
        (
            {"moe_config": dataclasses.replace(SPARSE, hidden_size=32)},
            "hidden_size=32 differs from the parent's 16; use 16",
        ),
        (
            {"moe_config": dataclasses.replace(SPARSE, tie_word_embeddings=True)},
            "tie_word_embeddings=True differs from the parent's False",
        ),
        (
            {"moe_config": dataclasses.replace(SPARSE, moe_intermediate_size=19)},
            "moe_intermediate_size=19 differs from the parent's intermediate_size=38",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, message):
    arguments = {"config": PARENT, "moe_config": SPARSE, "key": KEY, **arguments}
    with pytest.raises(ValueError, match=message) as error:
        upcycle.upcycle(parent(), **arguments)
    assert "\n" not in str(error.value)


def test_experts_that_the_mesh_cannot_divide_are_refused_in_one_line():
    mesh = meshes.make({"data": 1, "fsdp": 1, "expert": 8, "tensor": 1})
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="num_experts=4 is not divis") as error:
        jax.eval_shape(transform(SPARSE, "naive"), parent())
    assert "set config.mesh.expert to a divisor of 4" in str(error.value)
    assert "\n" not in str(error.value)
