"""Every recipe of the registry: its promise of step 0, its experts, and the places where it runs.

Bitwise comparisons are between eager on one device and compiled on eight, sharded.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import model, upcycle
from moe_jax.dryrun import hlo
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding
from moe_jax.upcycle import explanation, mixing, recipes

DENSE = model.ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    remat="none",
)
EIGHT = DENSE.to_moe(num_experts=8, num_experts_per_tok=2)
SHARDS = DENSE.to_moe(num_experts=8, num_experts_per_tok=4, moe_intermediate_size=8)
PARTLY = dataclasses.replace(EIGHT, layers=("dense", "moe"), moe_intermediate_size=8)
KEY = jax.random.key(3)


def draw(*shape):
    return np.random.default_rng(sum(shape)).random(shape)


def symmetric(x_LPP):
    return x_LPP + x_LPP.swapaxes(1, 2)


STATISTICS = {
    "load": draw(2, 8),
    "utility": draw(2, 8) + 0.1,
    "similarity": symmetric(draw(2, 8, 8)),
}
# Recipe -> (parent's config, config, parameters, parents).
CASES = {
    "naive": (DENSE, EIGHT, {}, 1),
    "noise": (DENSE, EIGHT, {}, 1),
    "drop": (DENSE, EIGHT, {"ratio": 0.25}, 1),
    "virtual_group": (DENSE, SHARDS, {"scaling": "exact"}, 1),
    "virtual_group+drop": (DENSE, SHARDS, {}, 1),
    "branch_train_mix": (DENSE, EIGHT, {}, 4),
    "bam": (DENSE, dataclasses.replace(EIGHT, num_attention_experts=2), {}, 2),
    "skywork": (DENSE, EIGHT, {}, 2),
    "divmoe": (
        DENSE,
        dataclasses.replace(SHARDS, router="group_topk", num_expert_groups=4),
        {},
        2,
    ),
    "llama_moe": (
        DENSE,
        DENSE.to_moe(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, router="noisy_topk"
        ),
        {},
        1,
    ),
    "moe_ct": (DENSE, dataclasses.replace(EIGHT, shared_expert_intermediate_size=32), {}, 1),
    "svd_residual": (DENSE, EIGHT, {}, 1),
    "expert_upcycling": (EIGHT, dataclasses.replace(EIGHT, num_experts=12), {}, 1),
    "prune": (EIGHT, dataclasses.replace(EIGHT, num_experts=4), {}, 1),
    "diversify_merge": (EIGHT, dataclasses.replace(EIGHT, num_experts=4), {}, 1),
    "merge_back": (EIGHT, DENSE, {}, 1),
}
IN_SHORT = ("virtual_group+drop", "branch_train_mix", "bam", "llama_moe", "diversify_merge")


def some(names, default):
    return [n if n in default else pytest.param(n, marks=pytest.mark.long) for n in names]


@functools.cache
def parents_of(config, number):
    """No two leaves or layers alike, large enough for the feed-forwards to matter."""
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    normal = np.random.default_rng(0).normal
    return [
        jax.tree.map(lambda leaf: (normal(size=leaf.shape) * 0.4).astype(np.float32), shapes)
        for _ in range(number)
    ]


def transform(name):
    source, config, parameters, _ = CASES[name]
    return functools.partial(
        upcycle.upcycle,
        config=source,
        moe_config=config,
        recipe=name,
        key=KEY,
        statistics=STATISTICS if source.num_experts else None,
        **parameters,
    )


@functools.cache
def made(name):
    source, _, _, number = CASES[name]
    return jax.tree.map(np.asarray, transform(name)(parents_of(source, number)))


def test_every_recipe_has_a_case():
    assert set(CASES) == set(recipes.RECIPES)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_explained_with_all_that_it_takes(name):
    recipe, text = recipes.RECIPES[name], explanation.explained(name)
    head, *rows = text.splitlines()
    assert inspect.getdoc(recipe.make) and len(head) > len(f"{name}: ")
    assert all(row == row.rstrip() and len(row.split()) > 1 for row in rows if row != "    none")
    for of in (recipe.statistics, recipe.optional, recipe.defaults):
        assert all(word in text for word in of)
    assert recipe.defaults or rows[-1] == "    none"


def test_the_statistics_that_a_recipe_uses_are_explained():
    said = {name: explanation.explained(name) for name in recipes.RECIPES}
    assert "--statistics: similarity (needed), load (if given)" in said["diversify_merge"]
    assert "--statistics: neurons (for partition=statistics)" in said["llama_moe"]
    assert "--statistics: none" in said["naive"] and "router    none" in said["merge_back"]


@pytest.mark.parametrize("name", some(CASES, IN_SHORT))
def test_the_result_is_a_tree_of_its_config_and_no_bit_depends_on_the_mesh(name):
    source, config, _, number = CASES[name]
    want = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    assert jax.tree.map(jnp.shape, made(name)) == jax.tree.map(jnp.shape, want)
    mesh = meshes.make({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        parents = parents_of(source, number)
        parents = jax.device_put(parents, [sharding.shardings(p, mesh) for p in parents])
        out = sharding.shardings(want, mesh)
        on_mesh = jax.jit(transform(name), out_shardings=out)(parents)
    jax.tree.map(np.testing.assert_array_equal, on_mesh, made(name))


@pytest.mark.parametrize("name", some(("noise", "svd_residual", "virtual_group+drop"), ("noise",)))
def test_an_expert_does_not_depend_on_how_many_others_there_are(name):
    source, config, parameters, _ = CASES[name]
    more = dataclasses.replace(config, num_experts=12)
    parents = parents_of(source, 1)
    router = "normal"  # a virtual group's scale, too, depends on their number when softmaxed first
    few, many = (
        upcycle.upcycle(parents, source, c, recipe=name, key=KEY, router=router, **parameters)
        for c in (config, more)
    )
    few, many = (p["blocks"]["0"]["moe"] for p in (few, many))
    for leaf, w in few["experts"].items():
        np.testing.assert_array_equal(w, many["experts"][leaf][:, :8])
    np.testing.assert_array_equal(few["router"]["kernel"], many["router"]["kernel"][:, :, :8])


@pytest.mark.parametrize("name", some(("drop", "branch_train_mix", "diversify_merge"), ("drop",)))
def test_no_more_than_one_dense_layer_is_whole_on_a_device(name):
    """Compiled: gathers are of single matrices, and temporaries do not grow with the model."""
    source, config, parameters, number = CASES[name]
    mesh = meshes.make({"data": 1, "fsdp": 4, "expert": 2, "tensor": 1})
    temporaries = []
    for depth, times in ((2, 1), (4, 2)):
        big, small = (
            dataclasses.replace(c, num_hidden_layers=depth, num_experts=times * c.num_experts)
            for c in (source, config)
        )
        statistics = {"similarity": symmetric(draw(depth, *2 * [times * 8]))}
        create = functools.partial(
            upcycle.upcycle,
            config=big,
            moe_config=small,
            recipe=name,
            key=KEY,
            statistics=statistics if source.num_experts else None,
            **parameters,
        )
        shapes = jax.eval_shape(functools.partial(model.init, big), jax.random.key(0))
        out = jax.eval_shape(create, number * [shapes])
        with jax.set_mesh(mesh):
            compiled = (
                jax.jit(create, out_shardings=sharding.shardings(out, mesh))
                .lower(number * [sharding.abstract(shapes, mesh)])
                .compile()
            )
        matrix = 4 * source.hidden_size * source.intermediate_size
        for collective in hlo.collectives(compiled.as_text(), mesh.shape):
            assert collective.bytes <= collective.count * matrix, collective
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    # Were the two additional layers whole at a time, this is what they alone would add.
    assert temporaries[1] - temporaries[0] < 2 * number * 3 * matrix


# The parts of experts -----------------------------------------------------------------------------


def experts_of(name):
    return made(name)["blocks"]["0"]["moe"]["experts"]


def test_virtual_groups_are_whole_feed_forwards_and_chosen_whole():
    _, config, _, _ = CASES["virtual_group"]
    [params] = parents_of(DENSE, 1)
    old = params["blocks"]["0"]["mlp"]
    new = upcycle.upcycle(params, DENSE, config, recipe="virtual_group", scaling="none", key=KEY)[
        "blocks"
    ]["0"]["moe"]
    G = 4
    for i in range(8):
        own = slice(8 * (i % G), 8 * (i % G) + 8)  # expert i holds shard i mod G
        np.testing.assert_array_equal(new["experts"]["gate"][:, i], old["gate"][:, :, own])
        np.testing.assert_array_equal(new["experts"]["up"][:, i], old["up"][:, :, own])
        np.testing.assert_array_equal(new["experts"]["down"][:, i], old["down"][:, own])
    kernel_LDE = np.asarray(new["router"]["kernel"])
    groups = kernel_LDE.reshape(2, 16, 2, G)
    assert (groups == groups[..., :1]).all() and (groups[:, :, 0] != groups[:, :, 1]).any()
    tokens_BT = jax.random.randint(jax.random.key(1), (4, 32), 0, 32)
    params = {**params, "blocks": {"0": {**params["blocks"]["0"], "moe": new}}}
    del params["blocks"]["0"]["mlp"]
    routing = model.apply(params, tokens_BT, config, return_routing=True).router.routing
    chosen = np.sort(np.asarray(routing.expert_index_MA), axis=-1)
    assert ((chosen == np.arange(4)) | (chosen == np.arange(4, 8))).all()
    assert len(np.unique(chosen[..., 0])) == 2


def test_llama_moe_gives_each_neuron_to_one_expert_and_scales_the_output():
    new = experts_of("llama_moe")
    old = parents_of(DENSE, 1)[0]["blocks"]["0"]["mlp"]
    for layer in range(2):
        up_FD = new["up"][layer].transpose(0, 2, 1).reshape(32, 16)
        order = [np.flatnonzero((old["up"][layer].T == row).all(axis=1)).item() for row in up_FD]
        assert sorted(order) == list(range(32)) and order != sorted(order)
        down_FD = new["down"][layer].reshape(32, 16)
        np.testing.assert_allclose(down_FD, 4 / 2 * old["down"][layer][order], rtol=1e-6)
    router = made("llama_moe")["blocks"]["0"]["moe"]["router"]
    assert not router["kernel"].any() and not router["noise"].any()


def test_given_neurons_go_to_the_experts_that_they_are_given_to():
    neurons = np.arange(32).reshape(4, 8)[::-1] * np.ones((2, 1, 1), int)
    source, config, _, _ = CASES["llama_moe"]
    [params] = parents_of(DENSE, 1)
    new = upcycle.upcycle(
        params,
        source,
        config,
        recipe="llama_moe",
        partition="statistics",
        statistics={"neurons": neurons},
        key=KEY,
    )["blocks"]["0"]["moe"]["experts"]
    old = params["blocks"]["0"]["mlp"]
    np.testing.assert_array_equal(new["up"][:, 0], old["up"][:, :, 24:])
    np.testing.assert_array_equal(new["up"][:, 3], old["up"][:, :, :8])


def test_several_parents_are_dealt_out_in_order_and_their_rest_is_averaged_or_the_lasts():
    four, two = parents_of(DENSE, 4), parents_of(DENSE, 2)
    new = experts_of("branch_train_mix")
    for e in range(8):
        old = four[e // 2]["blocks"]["0"]["mlp"]
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(new[name][:, e], old[name])
    mean = np.mean([p["embed"]["tokens"] for p in four], axis=0)
    np.testing.assert_allclose(made("branch_train_mix")["embed"]["tokens"], mean, atol=1e-6)
    np.testing.assert_array_equal(made("skywork")["embed"]["tokens"], two[1]["embed"]["tokens"])
    attention = made("bam")["blocks"]["0"]["attention"]
    for e in range(2):
        np.testing.assert_array_equal(
            attention["experts"]["wq"][:, e], two[e]["blocks"]["0"]["attention"]["wq"]
        )


def test_pruning_keeps_the_most_used_and_copying_repeats_the_most_useful():
    [old] = parents_of(EIGHT, 1)
    old = old["blocks"]["0"]["moe"]
    for layer in range(2):
        kept = np.sort(np.argsort(-STATISTICS["load"][layer])[:4])
        np.testing.assert_array_equal(
            experts_of("prune")["up"][layer], old["experts"]["up"][layer, kept]
        )
        pruned = made("prune")["blocks"]["0"]["moe"]["router"]["kernel"]
        np.testing.assert_array_equal(pruned[layer], old["router"]["kernel"][layer][:, kept])
        share_EP = mixing.duplicated(8, 12, STATISTICS["utility"][layer])
        source = share_EP.argmax(axis=1)
        np.testing.assert_array_equal(source[:8], np.arange(8))
        wider = made("expert_upcycling")["blocks"]["0"]["moe"]
        np.testing.assert_array_equal(
            wider["experts"]["up"][layer], old["experts"]["up"][layer, source]
        )
        kernel = wider["router"]["kernel"][layer]
        np.testing.assert_array_equal(kernel[:, :8], old["router"]["kernel"][layer])
        np.testing.assert_array_equal(kernel, old["router"]["kernel"][layer][:, source])


def test_the_most_useful_expert_is_copied_three_times_then_the_next():
    """As the authors' package has it; when all have three copies it begins again."""
    utility = np.array([4.0, 6.0, 1.0])
    source = mixing.duplicated(3, 16, utility).argmax(axis=1)
    np.testing.assert_array_equal(source[3:], [1, 1, 1, 0, 0, 0, 2, 2, 2, 1, 1, 1, 0])
    in_turn = mixing.duplicated(3, 7).argmax(axis=1)
    np.testing.assert_array_equal(in_turn, [0, 1, 2, 0, 1, 2, 0])


def test_noise_on_copies_is_in_units_of_the_biases_or_columns_deviation():
    """By default on selection biases alone, of 0.01 times their deviation."""
    biased = dataclasses.replace(EIGHT, router="sigmoid_topk")
    wider = dataclasses.replace(biased, num_experts=1024)
    [old] = parents_of(biased, 1)
    old = old["blocks"]["0"]["moe"]["router"]
    for noise, ratio_of in (
        ({}, {"bias": 0.01, "kernel": 0.0}),
        ({"bias_noise": 0.0, "router_noise": 0.1}, {"bias": 0.0, "kernel": 0.1}),
    ):
        new = upcycle.upcycle(
            *parents_of(biased, 1), biased, wider, recipe="expert_upcycling", key=KEY, **noise
        )["blocks"]["0"]["moe"]["router"]
        for name, ratio in ratio_of.items():
            moved = new[name] - np.tile(old[name], 128)
            assert not moved[..., :8].any()
            unit = old[name].std(axis=-1, ddof=1, keepdims=True)
            if name == "kernel":
                unit = np.tile(old[name].std(axis=1, keepdims=True), 127)
            sizes = (moved[..., 8:] / unit).std(axis=-1)
            np.testing.assert_allclose(sizes, ratio, rtol=0.15)


def test_a_gate_of_two_layers_begins_as_pytorch_does():
    """Uniform up to 1/sqrt of each layer's inputs, the noise zero: LLaMA-MoE's code (mlp gate)."""
    [dense] = parents_of(DENSE, 1)
    config = DENSE.to_moe(
        num_experts=32,
        num_experts_per_tok=2,
        moe_intermediate_size=1,
        router="noisy_topk_mlp",
    )
    made = upcycle.upcycle(
        dense, DENSE, config, recipe="llama_moe", router="torch_linear", key=KEY
    )["blocks"]["0"]["moe"]["router"]
    assert not np.any(made["noise"])
    for name, fan_in in (("kernel", 16), ("output", 32)):
        w = np.asarray(made[name]) * np.sqrt(fan_in)
        assert 0.98 < np.abs(w).max() <= 1 and w.std() == pytest.approx(1 / np.sqrt(3), rel=0.05)
        assert (w[0] != w[1]).all()
    assert made["output"].shape == (2, 32, 32)


def test_groups_are_of_the_most_similar_and_weighted_by_load():
    similarity = np.eye(4)
    for i, j, value in ((0, 3, 0.9), (1, 2, 0.8), (0, 1, 0.1)):
        similarity[i, j] = similarity[j, i] = value
    share_EP = mixing.grouped(2, similarity, np.array([3.0, 1.0, 1.0, 1.0]))
    np.testing.assert_allclose(share_EP, [[0.75, 0, 0, 0.25], [0, 0.5, 0.5, 0]])


def test_merging_a_naive_mixture_back_gives_its_parent_and_any_other_the_average():
    naive = made("naive")
    back = upcycle.upcycle(naive, EIGHT, DENSE, recipe="merge_back", key=KEY)
    # An eighth each of eight equal numbers.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), back, parents_of(DENSE, 1)[0]
    )
    share_LP = STATISTICS["load"] / STATISTICS["load"].sum(axis=1, keepdims=True)
    old = parents_of(EIGHT, 1)[0]["blocks"]["0"]["moe"]["experts"]["up"]
    want = np.einsum("lp,lpdf->ldf", share_LP, old)
    np.testing.assert_allclose(made("merge_back")["blocks"]["0"]["mlp"]["up"], want, atol=1e-5)


def test_what_is_not_finite_in_an_expert_that_is_left_out_stays_out():
    w_LPX = jnp.array([[[1.0], [jnp.inf]]])
    mixed = mixing.mix(w_LPX, jnp.array([[[1.0, 0.0]]]))
    np.testing.assert_array_equal(mixed, [[[1.0]]])
