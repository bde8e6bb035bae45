"""Similarity of experts against its definitions, written out as loops and worked by hand."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest

from moe_jax import model
from moe_jax.analysis import similarity
from moe_jax.model.config import DENSE, MOE

PARENT = model.ModelConfig(
    vocab_size=8,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=5,
    num_attention_heads=2,
)
LAYERS = (DENSE, MOE, DENSE, MOE, DENSE)
SPARSE = PARENT.to_moe(num_experts=3, num_experts_per_tok=1, layers=LAYERS)
PLACE = "1"  # of both sparse layers
MATRICES = ("gate", "up", "down")


def random_params(config, seed=0):
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: draw(size=leaf.shape).astype(leaf.dtype), shapes)


def dense_layer(params, layer):
    """Layers 0 to 4 of the parent are all of one kind, and so in one stack."""
    return {name: params["blocks"]["0"]["mlp"][name][layer] for name in MATRICES}


def sparse_model(experts_of_layers, config=SPARSE):
    """A tree whose sparse layers hold these lists of experts."""
    params = random_params(config)
    params["blocks"][PLACE]["moe"]["experts"] = {
        name: np.stack([[ffn[name] for ffn in ffns] for ffns in experts_of_layers])
        for name in MATRICES
    }
    return params


def cosine(a, b):
    return np.sum(a * b) / math.sqrt(np.sum(a * a) * np.sum(b * b))


def test_pairs_and_parent_are_what_loops_over_the_experts_give():
    params, parent = random_params(SPARSE), random_params(PARENT, seed=1)
    rows = similarity.experts(params, SPARSE, (parent, PARENT))
    assert [row.layer for row in rows] == [1, 3]
    for i, row in enumerate(rows):
        for name in MATRICES:
            experts = params["blocks"][PLACE]["moe"]["experts"][name][i]
            source = dense_layer(parent, row.layer)[name]
            pairs = [cosine(a, b) for a, b in itertools.combinations(experts, 2)]
            to_parent = [cosine(w, source) for w in experts]
            away = [np.linalg.norm(w - source) / np.linalg.norm(source) for w in experts]
            assert row.pairwise[name] == pytest.approx(np.mean(pairs), abs=1e-6)
            assert row.parent_cosine[name] == pytest.approx(np.mean(to_parent), abs=1e-6)
            assert row.parent_distance[name] == pytest.approx(np.mean(away), abs=1e-5)
        assert row.intact == 0
    means = [np.mean(list(row.pairwise.values())) for row in rows]
    np.testing.assert_allclose(similarity.of_layers(params, SPARSE), means, atol=1e-5)


def test_copies_of_the_parent_are_alike_near_and_intact():
    parent = random_params(PARENT)
    params = sparse_model([[dense_layer(parent, layer)] * 3 for layer in (1, 3)])
    for row in similarity.experts(params, SPARSE, (parent, PARENT)):
        for name in MATRICES:
            assert row.pairwise[name] == pytest.approx(1, abs=1e-6)
            assert row.parent_cosine[name] == pytest.approx(1, abs=1e-6)
            assert row.parent_distance[name] == 0
        assert row.intact == 1
    assert similarity.of_layers(params, SPARSE) == [1, 1]


def test_opposite_and_empty_experts_by_hand():
    ffn = {"gate": np.ones((4, 6)), "up": np.ones((4, 6)), "down": np.ones((6, 4))}
    minus, zero = ({n: s * w for n, w in ffn.items()} for s in (-1, 0))
    params = sparse_model([[ffn, ffn, minus], [ffn, ffn, zero]])
    # Pairs: (1 - 1 - 1) / 3, and (1 + 0 + 0) / 3 for what has no direction.
    np.testing.assert_allclose(similarity.of_layers(params, SPARSE), [-1 / 3, 1 / 3], atol=1e-5)


def take_neurons(ffn, index):
    return {"gate": ffn["gate"][:, index], "up": ffn["up"][:, index], "down": ffn["down"][index]}


def test_intact_neurons_are_found_in_any_order_and_only_if_all_matrices_agree():
    parent = random_params(PARENT)
    ffn = dense_layer(parent, 1)
    shuffled = take_neurons(ffn, [3, 0, 5, 1, 4, 2])
    half = take_neurons(ffn, [5, 4, 3, 2, 1, 0])
    half["gate"][:, :3] += 1  # three lose all matrices
    half["up"][:, :3] += 1
    half["down"][:3] += 1
    touched = take_neurons(ffn, range(6))
    touched["down"][0, 0] = np.nextafter(touched["down"][0, 0], np.inf)  # one lost by one bit
    other_layer = [dense_layer(parent, 1)] * 3  # of layer 1, but in layer 3
    params = sparse_model([[shuffled, half, touched], other_layer])
    first, second = similarity.experts(params, SPARSE, (parent, PARENT))
    assert first.intact == pytest.approx((6 + 3 + 5) / 18)
    assert second.intact == 0


def test_parts_of_the_parent_are_found_intact_and_compared_no_further():
    parent = random_params(PARENT)
    thirds = dataclasses.replace(SPARSE, moe_intermediate_size=2)
    shards = [
        [take_neurons(dense_layer(parent, layer), slice(2 * e, 2 * e + 2)) for e in range(3)]
        for layer in (1, 3)
    ]
    for row in similarity.experts(sparse_model(shards, thirds), thirds, (parent, PARENT)):
        assert row.intact == 1
        assert row.parent_cosine == row.parent_distance == {}


def test_bfloat16_parents_are_found_in_float32_experts():
    rounded = jax.tree.map(lambda w: w.astype(jax.numpy.bfloat16), random_params(PARENT))
    wide = jax.tree.map(lambda w: w.astype(np.float32), rounded)
    params = sparse_model([[dense_layer(wide, layer)] * 3 for layer in (1, 3)])
    rows = similarity.experts(params, SPARSE, (rounded, PARENT))
    assert [row.intact for row in rows] == [1, 1]


@pytest.mark.parametrize(
    ("parent", "complaint"),
    [
        (SPARSE, "the parent is sparse"),
        (dataclasses.replace(PARENT, num_hidden_layers=4), "num_hidden_layers=4 of the parent"),
    ],
)
def test_what_cannot_be_the_parent_is_refused(parent, complaint):
    with pytest.raises(ValueError, match=complaint):
        similarity.experts(random_params(SPARSE), SPARSE, ({}, parent))


def test_similarity_to_the_parent_is_the_mean_of_each_layers_columns():
    params, parent = random_params(SPARSE), random_params(PARENT, seed=1)
    found = similarity.to_parent(params, SPARSE, (parent, PARENT))
    rows = similarity.experts(params, SPARSE, (parent, PARENT))
    for name, of_row in (("similarity", "parent_cosine"), ("distance", "parent_distance")):
        means = [np.mean(list(getattr(row, of_row).values())) for row in rows]
        np.testing.assert_allclose(found[f"parent_{name}"], means, atol=1e-5)
    copies = sparse_model([[dense_layer(parent, layer)] * 3 for layer in (1, 3)])
    same = similarity.to_parent(copies, SPARSE, (parent, PARENT))
    assert same == {"parent_similarity": [1, 1], "parent_distance": [0, 0]}
    wider = dataclasses.replace(PARENT, intermediate_size=12)
    with pytest.raises(ValueError, match="have 12 neurons, and an expert 6"):
        similarity.to_parent(params, SPARSE, ({}, wider))


def test_models_without_pairs_have_no_similarity():
    assert similarity.of_layers({}, PARENT) is None
    lonely = dataclasses.replace(SPARSE, num_experts=1)
    assert similarity.of_layers({}, lonely) is None
    [row, _] = similarity.experts(random_params(lonely), lonely)
    assert math.isnan(row.pairwise["up"])


def test_router_drift_by_hand():
    old, new = random_params(SPARSE), random_params(SPARSE)
    old["blocks"][PLACE]["moe"]["router"]["kernel"] = np.stack([np.eye(4, 3)] * 2)
    turned = np.eye(4, 3)
    turned[:, 0] = [0, 0, 0, 1]  # one of three columns, all of length 1, at a right angle
    new["blocks"][PLACE]["moe"]["router"]["kernel"] = np.stack([turned, -np.eye(4, 3)])
    kernels = (similarity.routers(params, SPARSE) for params in (old, new))
    first, second = similarity.router_drift(*kernels)
    assert dataclasses.astuple(first) == pytest.approx((1, math.sqrt(2 / 3), 2 / 3))
    assert dataclasses.astuple(second) == pytest.approx((3, 2, -1))


def test_a_table_is_aligned_and_short():
    rows = [similarity.Drift(layer, distance=layer / 10, cosine=math.nan) for layer in range(3)]
    assert similarity.table(rows[:2]).splitlines() == [
        "         router  router",
        "layer  distance  cosine",
        "    0    0.0000       -",
        "    1    0.1000       -",
    ]
    many = [similarity.Drift(layer, distance=layer, cosine=1) for layer in range(13)]
    labels = [line.split()[0] for line in similarity.table(many).splitlines()[2:]]
    assert labels == ["0", "6", "12", "mean"]
    assert similarity.table(many).splitlines()[-1].split() == ["mean", "6.0000", "1.0000"]
    params, parent = random_params(SPARSE), random_params(PARENT)
    _, *lines = similarity.table(similarity.experts(params, SPARSE, (parent, PARENT))).splitlines()
    assert len(set(map(len, lines))) == 1 and len(lines[0]) <= 100
