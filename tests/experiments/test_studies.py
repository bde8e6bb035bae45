"""The studies of configs/experiments: which arms they have, what they share, and what they ask."""

import collections
import dataclasses
import pathlib

import pytest

from moe_jax.config import program
from moe_jax.experiments import page, study
from moe_jax.sweep import plan
from moe_jax.training import flops
from moe_jax.upcycle import plan as plans
from moe_jax.upcycle import recipes

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "experiments"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/cpu.py"))


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """The runs of each study, by name."""
    workdir = tmp_path_factory.mktemp("runs")
    read = {name: plan.read(str(FOLDER / name / "cpu.py"), workdir) for name in NAMES}
    return {name: {run.name: run for run in runs} for name, runs in read.items()}


def test_every_recipe_for_dense_parents_is_an_arm_of_the_bench(studies):
    groups = collections.Counter(run.group for run in studies["bench"].values())
    dense = {name for name, row in recipes.RECIPES.items() if row.takes == recipes.DENSE}
    assert dense <= groups.keys() and set(groups.values()) == {3}


def test_a_recipe_that_is_added_is_an_arm_without_another_line(monkeypatch, tmp_path):
    row = dataclasses.replace(recipes.RECIPES["noise"], source="a test")
    monkeypatch.setitem(recipes.RECIPES, "mine", row)
    names = {run.name for run in plan.read(str(FOLDER / "bench" / "cpu.py"), tmp_path)}
    assert {"mine_s0", "mine_s1", "mine_s2"} <= names
    asked = program.call(str(FOLDER / "bench" / "cpu.py"), "get_study").questions
    assert "mine − naive" in [c.label for question in asked for c in question.comparisons]


@pytest.mark.parametrize("name", NAMES)
def test_a_study_asks_about_groups_that_it_has_and_measures_that_there_are(name, studies):
    groups = {run.group for run in studies[name].values()}
    asked = program.call(str(FOLDER / name / "cpu.py"), "get_study")
    for question in asked.questions:
        assert page.measure_of(question.measure)
        for comparison in question.comparisons:
            assert comparison.weights.keys() <= groups, comparison.label
            of_one = comparison in study.alone(comparison.weights)
            assert of_one or sum(comparison.weights.values()) == 0
    assert {name for pair in asked.crossings for name in pair} <= groups


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_can_be_made_of_its_parents_and_reads_the_sealed_test_split(name, studies):
    runs = studies[name]
    for run in runs.values():
        assert run.settings.evaluation.test_split
        assert run.settings.data.source == "tfds:lo_parallel19_sealed"
        section = run.settings.init.upcycle
        if section.recipe:
            plans.make(
                runs[run.sources[0]].settings.model,
                run.settings.model,
                recipe=section.recipe,
                router=section.router,
                num_parents=len(run.sources),
                parameters=section.parameters,
            )


def test_the_studies_share_their_parents_and_arms(studies):
    ids = {n: {run.name: run.run_id for run in runs.values()} for n, runs in studies.items()}
    for seed in range(3):
        parents = {own[f"dense_s{seed}"] for own in ids.values() if f"dense_s{seed}" in own}
        assert len(parents) == 1
        for recipe in ("naive", "drop"):
            own = ids["bench"][f"{recipe}_s{seed}"]
            assert own == ids["drop"][f"{recipe}_s{seed}"]
            assert own == ids["balance"][f"{recipe}-layer_s{seed}"]
            assert own == ids["rates"][f"{recipe}-re-warmed_s{seed}"]
        shards = ids["groups"][f"quarters_s{seed}"]
        assert shards == ids["bench"][f"virtual_group_s{seed}"]
        assert ids["skywork"][f"scratch_s{seed}"] == ids["bench"][f"scratch_s{seed}"]


def test_no_arm_reads_its_text_in_the_order_of_its_parent(studies):
    for runs in studies.values():
        for run in runs.values():
            assert all(run.seed != runs[source].seed for source in run.sources)


def test_the_controls_match_tokens_and_flops(studies):
    """Within the rounding of a step."""
    runs = studies["bench"]

    def cost(name):
        settings = runs[f"{name}_s0"].settings
        tokens = settings.training.num_steps * settings.training.batch_size * 128
        return tokens, tokens * flops.model_flops(settings.model, 128)

    (tokens, naive), (_, parent) = cost("naive"), cost("dense")
    assert tokens >= 1e6 and cost("dense_continued")[0] == cost("scratch")[0] == tokens
    assert cost("dense_same_flops")[1] == pytest.approx(naive, rel=1e-3)
    assert cost("scratch_same_flops")[1] == pytest.approx(naive + parent, rel=1e-3)
    branches = cost("european")[1] + cost("others")[1]
    assert cost("dense_branch_flops")[1] == pytest.approx(naive + branches, rel=1e-3)


def test_the_budgets_of_skywork_are_shares_of_the_parents_flops(studies):
    runs = studies["skywork"]

    def cost(name):
        settings = runs[f"{name}_s0"].settings
        return settings.training.num_steps * flops.model_flops(settings.model, 128)

    for name, share in (("two_thirds", 2 / 3), ("twice", 2.0)):
        assert cost(f"naive-{name}") == pytest.approx(share * cost("dense"), rel=2e-3)
        assert cost(f"naive-{name}") == cost(f"scratch-{name}")
