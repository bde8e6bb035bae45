"""Advice: costs against the published ones and worked by hand, rules at the authors' own points."""

import dataclasses
import json
import math
import pathlib
import runpy
import sys

import pytest

from moe_jax import adviser, model
from moe_jax.model.presets import PRESETS
from moe_jax.training import flops

ROOT = pathlib.Path(__file__).parents[1]
T = 4096
SPARSE = PRESETS["drop-upcycling-8x3.7b"]


def budgets_of(moe=SPARSE, dense=None, *, moe_tokens=5e11, dense_tokens=1e12):
    return adviser.budgets(
        moe,
        dense or adviser.dense_parent(moe),
        moe_tokens=moe_tokens,
        dense_tokens=dense_tokens,
        moe_sequence_length=T,
        dense_sequence_length=T,
    )


def masked_attention(config):
    """FLOPs per trained token of the products with positions that causal attention leaves out."""
    pairs = T - (T + 1) / 2
    heads = config.num_attention_heads * config.head_size
    return 6 * 2 * config.num_hidden_layers * heads * pairs


# The published totals are given by Nakamura et al., arXiv 2502.19261.
@pytest.mark.parametrize(
    ("preset", "tokens", "published"),
    [
        ("drop-upcycling-8x3.7b", 5.0e11, 1.89e22),
        ("drop-upcycling-3.7b", 1.0e12, 2.51e22),
        ("drop-upcycling-13b", 8.05e11, 7.18e22),
    ],
)
def test_our_flops_and_the_published_ones_differ_by_the_masked_half_of_attention(
    preset, tokens, published
):
    config = PRESETS[preset]
    ours = flops.model_flops(config, T)
    assert tokens * (ours + masked_attention(config)) == pytest.approx(published, rel=3e-3)
    # 6 N_active D counts the embedding table, which multiplies nothing, and no attention.
    _, active = model.count_parameters(config)
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)
    matrices = active - config.vocab_size * config.hidden_size - norms
    attention = flops.model_flops(config, T) - 6 * matrices
    assert attention == pytest.approx(masked_attention(config), rel=1e-3)  # as many are left out
    assert ours / (6 * active) == pytest.approx(1, abs=0.03)  # the two all but cancel


def test_the_quarter_of_the_abstract_is_six_tenths_with_the_parent():
    b = budgets_of()
    _, _, upcycled, *_ = adviser.ways(b)
    rival = 8.05e11 * flops.model_flops(PRESETS["drop-upcycling-13b"], T)
    assert upcycled.flops / rival == pytest.approx(0.26, abs=0.005)
    assert upcycled.total_flops / rival == pytest.approx(0.61, abs=0.02)


def test_ways_by_hand():
    config = SPARSE
    b = adviser.Budgets(
        moe=config,
        dense=config,
        moe_tokens=10,
        dense_tokens=30,
        moe_flops_per_token=4,
        dense_flops_per_token=2,
    )
    numbers = [(way.tokens, way.flops, way.total_flops) for way in adviser.ways(b)]
    assert numbers == [(30, 60, 60), (10, 40, 40), (10, 40, 100), (20, 40, 100), (25, 100, 100)]


@pytest.mark.parametrize("name", ["8x152m", "8x1.5b", "8x3.7b"])
def test_the_parent_made_of_a_config_is_the_published_one(name):
    parent = PRESETS[f"drop-upcycling-{name.removeprefix('8x')}"]
    made = adviser.dense_parent(PRESETS[f"drop-upcycling-{name}"])
    assert dataclasses.replace(made, model_type=parent.model_type) == parent


def test_granularity_gives_the_parent_its_width_back():
    made = adviser.dense_parent(PRESETS["nemotron-4-15b-e8g8t8"], 8)
    assert dataclasses.replace(made, model_type="nemotron") == PRESETS["nemotron-4-15b"]
    grouped = PRESETS["llm-jp-4-32b-a3.8b-sigmoid"]
    grouped = dataclasses.replace(grouped, num_expert_groups=8, num_groups_per_tok=4)
    assert adviser.dense_parent(grouped).num_expert_groups == 1


def verdict(name, b):
    return next(v for v in adviser.verdicts(b) if v.rule.name == name)


@pytest.mark.parametrize(
    ("name", "ratio", "answer"),
    [
        ("Skywork-MoE", 0.1, adviser.UPCYCLE),
        ("Skywork-MoE", 2 / 3, adviser.UNCLEAR),
        ("Skywork-MoE", 2.01, adviser.SCRATCH),
        ("OLMoE", 0.2, adviser.UPCYCLE),
        ("OLMoE", 0.25, adviser.UNCLEAR),
        ("OLMoE", 0.305, adviser.SCRATCH),
        ("Sparse Upcycling", 0.6, adviser.UPCYCLE),
        ("Sparse Upcycling", 1.1, adviser.UNCLEAR),
        ("Sparse Upcycling", 1.3, adviser.SCRATCH),
    ],
)
def test_a_rule_says_at_its_authors_points_what_they_found(name, ratio, answer):
    even = dataclasses.replace(budgets_of(), dense_tokens=1e12, moe_tokens=ratio * 1e12)
    same = dataclasses.replace(even, moe_flops_per_token=1.0, dense_flops_per_token=1.0)
    found = verdict(name, same)
    assert (found.answer, found.value) == (answer, pytest.approx(ratio))


def test_rules_of_cost_and_of_tokens_differ_by_the_cost_of_a_token():
    b = budgets_of()
    cost = b.moe_flops_per_token / b.dense_flops_per_token
    assert cost > 1.5
    assert verdict("Skywork-MoE", b).value == pytest.approx(cost * verdict("OLMoE", b).value)


@pytest.mark.parametrize("ratio", [1e-6, 1, 1e6])
def test_a_finding_without_its_numbers_decides_nothing(ratio):
    found = verdict("Joint scaling law", budgets_of(moe_tokens=ratio * 1e12))
    assert found.answer == adviser.UNCLEAR
    assert "constants" in found.rule.finding and "not included" in found.rule.finding


def test_disagreement_is_named_and_agreement_too():
    text = adviser.disagreement(adviser.verdicts(budgets_of()))
    assert text.startswith("They disagree: Sparse Upcycling says upcycle; OLMoE says from scratch")
    few = adviser.verdicts(budgets_of(moe_tokens=5e10))
    assert adviser.disagreement(few).startswith("They do not contradict each other: Skywork-MoE")
    decided = tuple(v for v in few if v.answer == adviser.UPCYCLE)
    assert adviser.disagreement(decided) == (
        "They agree: Skywork-MoE and OLMoE and Sparse Upcycling say upcycle."
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dense_tokens": -1.0}, "dense_tokens=-1 must be a finite number more than 0"),
        ({"moe_tokens": math.nan}, "moe_tokens=nan must be a finite number more than 0"),
        ({"moe": PRESETS["drop-upcycling-3.7b"]}, "config is a dense model's"),
        (
            {"dense": PRESETS["drop-upcycling-13b"]},
            "no parent of this model: its vocab_size=99487, not 99584; give the parent's",
        ),
        ({"dense": SPARSE}, r"dense_config is a sparse model's \(num_experts=8\)"),
    ],
)
def test_what_makes_no_comparison_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        budgets_of(**change)


def test_the_command_prints_what_the_functions_say_and_one_line_of_a_mistake(monkeypatch, capsys):
    def run(*flags):
        tokens = ("--dense_tokens=1e12", "--moe_tokens=5e11")
        monkeypatch.setattr(sys, "argv", ["advise.py", *tokens, *flags])
        runpy.run_path("scripts/advise.py", run_name="__main__")

    monkeypatch.chdir(ROOT)
    run("--config=configs/drop_upcycling/moe.py:8x3.7b", "--json")
    assert json.loads(capsys.readouterr().out) == adviser.as_json(budgets_of())
    with pytest.raises(SystemExit, match="2"):
        run("--config=nope.py")
    assert capsys.readouterr().err == (
        "advise.py: --config=nope.py: no such file; the examples are under configs/\n"
    )


def test_the_report_names_every_source_in_lines_that_a_terminal_holds():
    text = adviser.report(budgets_of())
    assert all(rule.source in " ".join(text.split()) for rule in adviser.RULES)
    assert max(map(len, text.splitlines())) <= 100
