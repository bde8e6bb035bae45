"""Lists of runs: products, pairs, chains, seeds, and names that are made of the overrides."""

import re

import pytest

from moe_jax.sweep import arms

RECIPES = arms.over("init.upcycle.recipe", ["naive", "drop"])
RATES = arms.over("optimizer.learning_rate", [1e-3, 2e-3])
DENSE = arms.named({"dense": {}})


def names(runs):
    return [run["name"] for run in runs]


def test_a_product_has_every_combination_and_a_zip_has_pairs():
    both = arms.product({"model.num_experts": 8}, RECIPES, RATES)
    first, rate = "naive-learning_rate=0.001", "optimizer.learning_rate"
    assert names(both) == [
        *(first, "naive-learning_rate=0.002"),
        *("drop-learning_rate=0.001", "drop-learning_rate=0.002"),
    ]
    assert both[0] == {
        "name": first,
        "overrides": {"model.num_experts": 8, "init.upcycle.recipe": "naive", rate: 1e-3},
        "after": [],
    }
    assert arms.zip(RECIPES, RATES) == [arms.product(RECIPES, RATES)[place] for place in (0, 3)]
    with pytest.raises(ValueError, match=r"zip of \[1, 2\] runs"):
        arms.zip(DENSE, RATES)


def test_products_nest_and_the_later_override_wins():
    base = arms.named({"a": {"seed": 1, "data": {"sequence_length": 8}}}, after=["x"])
    flat = arms.product(base, RECIPES, RATES)
    assert flat == arms.product(arms.product(base, RECIPES), RATES)
    assert flat == arms.product(base, arms.product(RECIPES, RATES))
    [run] = arms.product(base, {"data.sequence_length": 9})
    assert run["overrides"] == {"seed": 1, "data.sequence_length": 9} and run["after"] == ["x"]


def test_seeds_have_their_own_parents_or_share_one():
    child = arms.named({"moe": {"init.source": "@dense", "seed": 1}}, after=["dense", "other"])
    shared = arms.chain(DENSE, arms.seeds(child, 2))
    assert names(shared) == ["dense", "moe_s0", "moe_s1"]
    assert {run["overrides"]["init.source"] for run in shared[1:]} == {"@dense"}
    own = arms.seeds(arms.chain(DENSE, child), (0, 5))
    assert names(own) == ["dense_s0", "moe_s0", "dense_s5", "moe_s5"]
    assert [run["overrides"]["seed"] for run in own] == [0, 1, 5, 6]
    assert own[3]["overrides"]["init.source"] == "@dense_s5"
    assert own[3]["after"] == ["dense_s5", "other"]


def test_checkpoints_and_several_parents_keep_their_steps_in_seeds():
    runs = {"a": {}, "a2": {}, "240": {}, "b": {"init.source": "@a@240,@a2,@elsewhere"}}
    *_, b = arms.seeds(arms.named(runs), [3])
    assert b["overrides"]["init.source"] == "@a_s3@240,@a2_s3,@elsewhere"
    *_, folder = arms.seeds(arms.named({"runs": {}, "c": {"init.source": "runs"}}), [3])
    assert folder["overrides"]["init.source"] == "runs"  # of the file system


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("init.upcycle.ratio", 0.5, "ratio=0.5"),
        ("model.norm_topk_prob", False, "norm_topk_prob=False"),
        ("init.source", None, "source=None"),
        ("init.source", "@dense", "dense"),
        ("data.source", "path/to/text", "path_to_text"),
        ("evaluation.prompts", ("a", "b c"), "prompts=_a_b_c"),
        ("data.source", "", "source="),
    ],
)
def test_a_name_is_of_the_value_and_fits_a_folder(key, value, name):
    assert names(arms.over(key, [value])) == [name]
    assert re.fullmatch(r"[\w.+=-]+", name)


def test_the_lists_of_a_file_by_hand_join_with_those_of_this_module():
    by_hand = [{"name": "x", "overrides": {"optimizer": {"learning_rate": 1e-3}}}]
    assert arms.chain(by_hand, DENSE)[0]["overrides"] == {"optimizer.learning_rate": 1e-3}
    assert names(arms.product(by_hand, RECIPES)) == ["x-naive", "x-drop"]
    assert by_hand == [{"name": "x", "overrides": {"optimizer": {"learning_rate": 1e-3}}}]
