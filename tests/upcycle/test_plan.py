"""The plan of an upcycling: its answers and refusals; each upcycling makes one."""

import dataclasses
import functools
import sys

import jax
import pytest

from moe_jax import model, tree
from moe_jax.commands import upcycle as command
from moe_jax.model.layout import slots
from moe_jax.upcycle import plan
from moe_jax.upcycle.origins import CopiedRouter, Expert, FreshRouter, Kept, Mixture, Stacked
from tests.hf.test_golden import GOLDEN
from tests.upcycle.test_recipes import CASES, DENSE, EIGHT, PARTLY, STATISTICS, draw


@functools.cache
def paths_of(config):
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    return tuple(tree.flatten(shapes))


def planned(name, **changes):
    source, config, parameters, number = CASES[name]
    how = {"statistics": STATISTICS if source.num_experts else None, **changes}
    return plan.make(source, config, recipe=name, num_parents=number, parameters=parameters, **how)


@pytest.mark.parametrize("name", CASES)
def test_every_leaf_of_the_result_comes_from_a_leaf_of_the_parent(name):
    source, config, _, _ = CASES[name]
    made, paths = planned(name), paths_of(source)
    found = {path: {path} for path in made.shell(paths)}
    for layer, origins in enumerate(made.layers(paths)):
        (slot, _), (source_slot, _) = (slots(c.block_kinds)[layer] for c in (config, source))
        for leaf, origin in origins.items():
            found.setdefault(f"blocks/{slot}/{leaf}", set()).add(
                f"blocks/{source_slot}/{origin.path}"
            )
    assert set(found) == set(paths_of(config))
    assert set().union(*found.values()) <= set(paths)


def test_the_plan_says_where_the_leaves_of_a_layer_come_from():
    partly = dataclasses.replace(EIGHT, layers=("dense", "moe"))
    made = plan.make(DENSE, partly, recipe="drop", parameters={})
    dense, sparse = made.layers(paths_of(DENSE))
    assert dense["mlp/up"] == Kept("mlp/up", (0,))
    assert "mlp/up" not in sparse and sparse["moe/norm/scale"] == Kept("mlp/norm/scale", (0,))
    assert sparse["moe/experts/up"] == Expert("mlp/up", (0,) * 8)
    assert sparse["moe/router/kernel"] == FreshRouter("mlp/up", "router", (16, 8), "normal")
    back = plan.make(partly, DENSE, recipe="merge_back", parameters={})
    dense, sparse = back.layers(paths_of(partly))
    assert dense["mlp/up"] == Kept("mlp/up", (0,)) and sparse["mlp/up"] == Mixture("moe/experts/up")
    several = planned("bam").layers(paths_of(DENSE))[0]
    assert several["attention/experts/wq"] == Stacked("attention/wq", (0, 1))
    assert several["moe/experts/up"] == Expert("mlp/up", (0,) * 4 + (1,) * 4)
    assert several["attention/norm/scale"] == Kept("attention/norm/scale", (0, 1))
    assert planned("skywork").shell(paths_of(DENSE))["unembed"] == Kept("unembed", (1,))
    pruned, fresh = planned("prune"), planned("prune", router="normal")
    assert pruned.layers(paths_of(EIGHT))[0]["moe/router/kernel"] == CopiedRouter(
        "moe/router/kernel"
    )
    assert fresh.layers(paths_of(EIGHT))[0]["moe/router/kernel"] == FreshRouter(
        "moe/experts/up", "router", (16, 4), "normal"
    )


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_the_command_makes_one_plan(to, tmp_path, monkeypatch):
    plans, make = [], plan.make
    monkeypatch.setattr(
        plan, "make", lambda *args, **how: plans.append(make(*args, **how)) or plans[-1]
    )
    output = f"--output={tmp_path / 'moe'}"
    monkeypatch.setattr(
        sys, "argv", ["upcycle", f"--source={GOLDEN / 'llama'}", output, f"--to={to}"]
    )
    command.main()
    assert [made.name for made in plans] == ["drop"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("branch_train_mix", {"parents": 3}, "num_experts=8 is not divisible by the 3 parents"),
        ("drop", {"parents": 2}, "recipe 'drop' takes one parent, not 2"),
        ("virtual_group", {"moe_intermediate_size": 12}, "does not divide .* use --granularity=2 "),
        ("virtual_group", {"num_experts": 6}, "use a multiple of 4"),
        ("llama_moe", {"num_experts": 8}, "use --granularity=8 .*=4.*, or num_experts=4"),
        (
            "moe_ct",
            {"shared_expert_intermediate_size": None},
            "set shared_expert_intermediate_size",
        ),
        ("drop", {"shared_expert_intermediate_size": 32}, "makes no shared expert"),
        ("bam", {"num_attention_experts": 0}, "set num_attention_experts"),
        ("drop", {"num_attention_experts": 2}, "num_attention_experts=2 differs"),
        ("prune", {"num_experts": 9}, "must be at most the parent's 8"),
        ("expert_upcycling", {"num_experts": 4}, "must be at least the parent's 8"),
        ("prune", {"statistics": {}}, "^recipe 'prune' needs the statistic 'load'"),
        ("drop", {"statistics": STATISTICS}, "none of .* load, sim.*; leave .* router='centroids'"),
        (
            *("llama_moe", {"statistics": {"neurons": draw(2, 4, 8)}}),
            "'llama_moe' uses none of the statistics neurons; .* give partition='statistics' or r",
        ),
        (
            *("expert_upcycling", {"statistics": {"centroids": draw(2, 12, 16)}}),
            "uses none of the statistics centroids; leave them out, or give the statistic 'utilit",
        ),
        ("prune", {"statistics": {"load": draw(2, 7)}}, r"'load' is \[2, 7\], not \[2, 8\]"),
        ("merge_back", {"intermediate_size": 16}, "intermediate_size=16 differs from the experts'"),
        (
            "merge_back",
            {"source": PARTLY, "intermediate_size": 8},
            "dense layers have 32 neurons and its experts 8",
        ),
        (
            "prune",
            {"source": PARTLY, "layers": PARTLY.layers, "intermediate_size": 8},
            "intermediate_size=8 differs from the parent's 32",
        ),
    ],
)
def test_what_does_not_fit_a_recipe_is_refused_in_one_line(name, changes, message):
    source, config, parameters, number = CASES[name]
    changes = dict(changes)
    number = changes.pop("parents", number)
    statistics = changes.pop("statistics", STATISTICS if source.num_experts else None)
    source = changes.pop("source", source)
    config = dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match=message) as error:
        plan.make(
            source,
            config,
            recipe=name,
            num_parents=number,
            statistics=statistics,
            parameters=parameters,
        )
    assert "\n" not in str(error.value)


def test_a_gate_of_two_layers_is_not_copied_and_its_moments_are_zero():
    gate = dataclasses.replace(EIGHT, router="noisy_topk_mlp")
    wider = dataclasses.replace(gate, num_experts=12)
    with pytest.raises(
        ValueError, match="cannot copy a router='noisy_topk_mlp'; use one of normal"
    ):
        plan.make(gate, wider, recipe="expert_upcycling", parameters={})
    made = plan.make(DENSE, gate, recipe="naive", parameters={})
    leaves = {
        kind.of_moments: {
            leaf: origin.initialiser
            for leaf, origin in kind.layers(["blocks/0/mlp/up"])[0].items()
            if leaf.startswith("moe/router/")
        }
        for kind in (made, made.for_moments())
    }
    names = [f"moe/router/{name}" for name in ("kernel", "noise", "output")]
    assert leaves[False] == dict(zip(names, ("normal", "", "torch_linear"), strict=True))
    assert leaves[True] == dict(zip(names, ("zero", "", ""), strict=True))


def test_noise_on_what_no_router_copies_is_refused():
    wider = dataclasses.replace(EIGHT, num_experts=12)
    for parameters, router, leaf in (
        ({"bias_noise": 0.1}, "", "bias"),
        ({"router_noise": 0.1}, "normal", "kernel"),
    ):
        with pytest.raises(ValueError, match=f"has no effect: no router's {leaf} is copied; leave"):
            plan.make(EIGHT, wider, recipe="expert_upcycling", router=router, parameters=parameters)
    plan.make(EIGHT, wider, recipe="expert_upcycling", parameters={"router_noise": 0.1})


def test_longer_texts_need_another_parent_only_where_positions_have_weights():
    for positions, differing in (("rotary", []), ("learned", ["max_position_embeddings"])):
        parent = dataclasses.replace(DENSE, position_embedding=positions)
        longer = dataclasses.replace(EIGHT, position_embedding=positions)
        longer = dataclasses.replace(longer, max_position_embeddings=8192)
        found = plan.differences(parent, longer, plan.OWN)
        assert [name for name, *_ in found] == differing


def test_moments_go_the_way_of_their_weights_but_to_routers_of_zeros():
    """Neither redrawn nor disturbed; statistics of the weights' routers stay unused."""
    source, config, parameters, _ = CASES["drop"]
    how = {"recipe": "drop", "router": "centroids", "statistics": {"centroids": draw(2, 8, 16)}}
    weights = plan.make(source, config, **how, parameters={**parameters, "permute_neurons": True})
    moments = weights.for_moments()
    assert (weights.router, moments.router) == ("centroids", "zero")
    assert weights.parameters == {**moments.parameters, "ratio": 0.25}
    assert moments.parameters["ratio"] == 0 and moments.parameters["permute_neurons"]
