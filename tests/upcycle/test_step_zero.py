"""Each recipe keeps its promise about step 0: the model that it makes computes it."""

import ast
import dataclasses
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax import upcycle
from moe_jax.model import layers, moe
from moe_jax.model import router as router_rows
from moe_jax.model.config import ModelConfig
from moe_jax.upcycle import plan, recipes, step_zero
from tests.upcycle.test_recipes import (
    CASES,
    DENSE,
    EIGHT,
    KEY,
    SHARDS,
    STATISTICS,
    parents_of,
)

ROUTERS = [
    {},
    {"router": "topk_softmax"},
    {"router": "sigmoid_topk"},
    {"router": "sigmoid_topk", "routed_scaling_factor": 2.5},
    {"router": "expert_choice", "dispatch": "capacity"},
    {"gate_norm_std": 1.0},
    {"dispatch": "merge", "merge_segment_length": 4},
]


@st.composite
def of_dense_models(draw):
    """A recipe and configs of sizes, activations, routers and weights that it may be asked for."""
    name = draw(
        st.sampled_from(sorted(n for n, r in recipes.RECIPES.items() if r.takes == "dense"))
    )
    act, gated, bias = draw(
        st.sampled_from([("silu", True, False), ("relu2", False, False), ("gelu", False, True)])
    )
    G = draw(st.sampled_from([1, 2, 4])) if recipes.RECIPES[name].cut else 1
    E = draw(st.sampled_from([4, 8]))
    dense = dataclasses.replace(
        DENSE,
        num_hidden_layers=1,
        hidden_act=act,
        gated_mlp=gated,
        mlp_bias=bias,
        tie_word_embeddings=draw(st.booleans()),
    )
    one = name == "llama_moe" and G == 1  # whose logit has no deviation
    routers = [r for r in ROUTERS if not (one and "gate_norm_std" in r)]
    if recipes.RECIPES[name].shared:
        routers = [r for r in routers if r.get("dispatch") != "merge"]
    fields = draw(st.sampled_from(routers))
    if "norm_topk_prob" in router_rows.ROUTERS[fields.get("router", "softmax_topk")].reads:
        fields = {**fields, "norm_topk_prob": draw(st.booleans())}
    config = dense.to_moe(
        num_experts=G if name == "llama_moe" else E,
        num_experts_per_tok=min(draw(st.sampled_from([1, 2, 4])), G if name == "llama_moe" else E),
        moe_intermediate_size=dense.intermediate_size // G,
        **fields,
        shared_expert_intermediate_size=32 if recipes.RECIPES[name].shared else None,
        num_attention_experts=2 if recipes.RECIPES[name].attention else 0,
    )
    parameters = {}
    if "permute_neurons" in recipes.RECIPES[name].defaults:
        parameters["permute_neurons"] = draw(st.booleans())
    if "scaling" in recipes.RECIPES[name].defaults:
        parameters["scaling"] = draw(st.sampled_from(["none", "down", "exact", "paper"]))
    if "ratio" in recipes.RECIPES[name].defaults:
        parameters["ratio"] = draw(st.sampled_from([0.0, 0.5]))
    router = draw(st.sampled_from(["", "zero", "grouped"]))
    return name, dense, config, {"router": router, **parameters}


@st.composite
def of_mixtures(draw):
    """Copies of experts: their numbers, routers, rules of weights, noise, and the utility."""
    routers = [r for r in ROUTERS if r.get("dispatch") != "merge"]
    fields = draw(st.sampled_from([*routers, {"router": "noisy_topk"}]))
    source = dataclasses.replace(EIGHT, num_hidden_layers=1, **fields)
    config = dataclasses.replace(
        source,
        num_experts=draw(st.sampled_from([8, 12, 16, 32])),
        num_experts_per_tok=draw(st.sampled_from([2, 4, 8])),
    )
    if "norm_topk_prob" in router_rows.ROUTERS[source.router].reads:
        source, config = (
            dataclasses.replace(c, norm_topk_prob=draw(st.sampled_from([True, True, False])))
            for c in (source, config)
        )
    parameters = {"bias_noise": 0.0, "router_noise": draw(st.sampled_from([0.0, 0.0, 0.1]))}
    if source.num_experts < config.num_experts and draw(st.booleans()):
        parameters["statistics"] = {"utility": STATISTICS["utility"][:1]}
    router = draw(st.sampled_from(["", "", "normal", "zero"]))
    if router:
        parameters["router_noise"] = 0.0
    return "expert_upcycling", source, config, {"router": router, **parameters}


def upcyclings():
    return of_dense_models() | of_mixtures()


def outputs(name, source, config, how):
    """The only layer's feed-forward and the mixture that is made of it, on the same inputs."""
    [params] = parents_of(source, 1)
    new = upcycle.upcycle(params, source, config, recipe=name, key=KEY, **how)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 8, 16))

    def output(params, config):
        [block] = [jax.tree.map(lambda w: w[0], b) for b in params["blocks"].values()]
        if "mlp" in block:
            return layers.mlp(x_BTD, block["mlp"], config)
        return moe.moe(x_BTD, block["moe"], jnp.ones((2, 8), bool), config)[0]

    return output(params, source), output(new, config)


def assert_keeps_its_word(case):
    promised = factor(*case[:3], **case[3])
    hypothesis.assume(promised is not None)
    old, new = outputs(*case)
    np.testing.assert_allclose(new, promised * old, rtol=1e-5, atol=1e-5 * np.abs(old).max())


@hypothesis.given(upcyclings())
@hypothesis.settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_a_recipe_keeps_its_word_about_step_0(case):
    assert_keeps_its_word(case)


@pytest.mark.long
@hypothesis.given(upcyclings())
@hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_a_recipe_keeps_its_word_about_step_0_in_many_cases(case):
    assert_keeps_its_word(case)


def planned(name, source, config, router="", statistics=None, **parameters):
    how = {"router": router, "statistics": statistics, "parameters": parameters}
    return plan.make(source, config, recipe=name, **how)


def factor(*case, **how):
    return step_zero.factor(planned(*case, **how))


def test_step_0_is_promised_where_it_should_be_and_not_elsewhere():
    """So that a recipe does not keep its word by promising nothing."""
    plain = dataclasses.replace(EIGHT, norm_topk_prob=False)
    assert factor("naive", DENSE, EIGHT) == 1 and factor("naive", DENSE, plain) is None
    assert factor("drop", DENSE, EIGHT, ratio=0.0) == 1
    assert factor("drop", DENSE, EIGHT, ratio=0.5) is None
    assert factor("virtual_group", DENSE, SHARDS, scaling="exact") == 1
    assert factor("virtual_group", DENSE, SHARDS, scaling="none") == 1 / 4
    assert factor("virtual_group", DENSE, SHARDS, scaling="paper") is None  # SwiGLU is not cubic
    assert factor("virtual_group", DENSE, SHARDS, router="normal", scaling="exact") is None
    two = dataclasses.replace(SHARDS, num_experts_per_tok=2)  # of shards of which it takes 4
    assert factor("virtual_group", DENSE, two, scaling="exact") is None
    plain = dataclasses.replace(SHARDS, norm_topk_prob=False)
    assert factor("virtual_group", DENSE, plain, router="zero", scaling="exact") == 1
    assert factor("moe_ct", *CASES["moe_ct"][:2]) == 1
    wider = dataclasses.replace(EIGHT, num_experts=16, num_experts_per_tok=4)
    assert factor("expert_upcycling", EIGHT, wider) == 1
    assert factor("expert_upcycling", EIGHT, wider, router_noise=0.01) is None
    biased = [dataclasses.replace(c, router="sigmoid_topk") for c in (EIGHT, wider)]
    assert factor("expert_upcycling", *biased) is None


SHARD = {"scaling": "exact"}


@pytest.mark.parametrize(
    ("name", "fields", "how"),
    [
        ("naive", {"norm_topk_prob": False}, {}),
        ("drop", {}, {"ratio": 0.5}),
        ("drop", {"norm_topk_prob": False}, {"ratio": 0.5}),
        ("drop", {"dispatch": "merge"}, {"ratio": 0.5, "permute_neurons": True}),
        ("virtual_group", {"num_experts_per_tok": 2}, SHARD),
        ("virtual_group", {"dispatch": "merge"}, SHARD),
        ("virtual_group", {}, {"scaling": "paper"}),
        ("virtual_group", {"norm_topk_prob": False}, {"scaling": "paper", "router": "normal"}),
        ("llama_moe", {"num_experts": 4, "num_experts_per_tok": 2}, {}),
        ("llama_moe", {"num_experts": 4, "dispatch": "merge"}, {"router": "normal"}),
    ],
)
def test_each_condition_that_fails_names_the_setting_that_repairs_it(name, fields, how):
    shards = name in ("virtual_group", "llama_moe")
    config = dataclasses.replace(SHARDS if shards else EIGHT, **fields)
    made = planned(name, DENSE, config, **how)
    assert step_zero.differences(made) and step_zero.factor(made) is None
    assert all(line in step_zero.in_words(made) for line in step_zero.differences(made))
    for line in step_zero.differences(made):
        repaired, value = re.findall(r"([a-z_]+)=([^ =)]+)", line)[-1]
        value = ast.literal_eval(value)
        if repaired in ModelConfig.__dataclass_fields__ and "upcycle" not in line:
            config = dataclasses.replace(config, **{repaired: value})
        else:
            how = {**how, repaired: value}
    made = planned(name, DENSE, config, **how)
    assert step_zero.differences(made) == [] and step_zero.factor(made) is not None
    assert "not equal" not in step_zero.in_words(made)


def test_a_capacity_is_named_where_step_0_is_said_to_be_equal():
    config = dataclasses.replace(EIGHT, dispatch="capacity")
    assert "equal to the parent, except for tokens" in step_zero.in_words(
        planned("naive", DENSE, config)
    )


COPIES = dataclasses.replace(EIGHT, num_experts=16, num_experts_per_tok=4)
SUMS = dataclasses.replace(EIGHT, norm_topk_prob=False)


@pytest.mark.parametrize(
    ("source", "config", "how"),
    [
        *((EIGHT, COPIES, {"router": router}) for router in ("normal", "zero", "centred_uniform")),
        (EIGHT, COPIES, {"statistics": STATISTICS}),  # 1, 1, 1, 1, 1, 3, 4 and 4 copies
        (EIGHT, dataclasses.replace(COPIES, num_experts=12), {}),
        (EIGHT, dataclasses.replace(COPIES, num_experts_per_tok=2), {}),
        (SUMS, COPIES, {}),
        (EIGHT, dataclasses.replace(COPIES, norm_topk_prob=False), {}),
    ],
)
def test_copies_are_the_parent_only_where_all_are_copied_alike_and_weighed_by_its_router(
    source, config, how
):
    assert factor("expert_upcycling", source, config, **how) is None
    old, new = outputs("expert_upcycling", *(one_layer(c) for c in (source, config)), first(how))
    assert np.abs(new - old).max() > 0.01 * np.abs(old).max()


def one_layer(config):
    return dataclasses.replace(config, num_hidden_layers=1)


def first(how):
    return {**how, "statistics": {n: x[:1] for n, x in how.get("statistics", {}).items()}}


@pytest.mark.parametrize(
    ("fields", "how", "stay"),
    [
        ({}, {}, True),
        ({}, {"router_noise": 0.01}, False),
        ({}, {"router": "normal"}, False),
        ({"num_experts": 8}, {}, False),
        ({"router": "sigmoid_topk"}, {}, False),
        ({"router": "sigmoid_topk"}, {"bias_noise": 0.0}, True),
        ({"router": "noisy_topk"}, {}, False),  # its own noise, in training
    ],
)
def test_copies_that_nothing_tells_from_their_originals_are_named(fields, how, stay):
    source = dataclasses.replace(EIGHT, **{k: v for k, v in fields.items() if k == "router"})
    config = dataclasses.replace(source, **{"num_experts": 16, **fields})
    said = step_zero.in_words(planned("expert_upcycling", source, config, **how))
    assert ("set router_noise, for example 0.01" in said) == stay


@pytest.mark.parametrize(
    ("router", "promised"),
    [
        ({}, 1),
        pytest.param({"norm_topk_prob": False}, 1, marks=pytest.mark.long),
        pytest.param({"router": "topk_softmax"}, 1, marks=pytest.mark.long),
        pytest.param({"router": "sigmoid_topk"}, 1, marks=pytest.mark.long),
        ({"router": "sigmoid_topk", "norm_topk_prob": False}, 2),
        ({"router": "sigmoid_topk", "num_expert_groups": 2}, None),
        ({"gate_norm_std": 1.0}, None),
        ({"router": "forced_balance"}, None),
    ],
    ids=str,
)
def test_all_experts_twice_and_twice_as_many_chosen(router, promised):
    one = dataclasses.replace(EIGHT, num_hidden_layers=1, **router)
    twice = dataclasses.replace(one, num_experts=16, num_experts_per_tok=4)
    assert factor("expert_upcycling", one, twice, bias_noise=0.0) == promised
    if promised is None:
        return
    [params] = parents_of(one, 1)
    new = upcycle.upcycle(params, one, twice, recipe="expert_upcycling", bias_noise=0.0, key=KEY)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 8, 16))
    layer = jax.jit(moe.moe, static_argnums=3)
    want, got = (
        layer(
            x_BTD, jax.tree.map(lambda w: w[0], p["blocks"]["0"]["moe"]), jnp.ones((2, 8), bool), c
        )
        for p, c in ((params, one), (new, twice))
    )
    np.testing.assert_allclose(got[0], promised * want[0], rtol=1e-5, atol=1e-5)
