"""The page of results from a few made-up rows, and the committed page from the committed rows."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest

from moe_jax.commands import results
from moe_jax.experiments import figure, page, rows, study

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = '''"""Is b better than a?

    python scripts/sweep.py --config=x.py \\\\
        --workdir=runs/x

Some text of
two lines.

The results are in docs/results.md.
"""

from moe_jax.experiments import study


def get_study():
    pairs = study.against(["b", "c"], "a")
    question = study.Question("Is one lower?", pairs)
    return study.Study((question,), control="a", crossings=(("a", "b"),), conclusion="So it is.")
'''


def row(group, number, bits, **others):
    tokens = np.array([100, 200, 300])
    values = {
        **dict(name=f"{group}_s{number}", group=group, number=number, seed=10 + number),
        **dict(run_id=f"{group}{number}", overrides={}, parents=[], steps=3, tokens=300),
        **dict(parent_tokens=0, training_flops=600.0, parent_training_flops=0.0, parameters=5),
        **dict(active_parameters=5, test_loss=bits, test_bits_per_byte=bits),
        "test_bits_by_label": {"de": bits, "fr": bits + 1},
        **dict(validation_bits_per_byte=bits, curve=[[int(t), bits + 1 / t] for t in tokens]),
        **dict(effective_experts=None, expert_similarity=None, max_violation=None),
        **dict(max_violation_mean=None, seconds=1800.0, commit="abc", versions={"jax": "1"}),
        "hardware": "a CPU, 2 cores",
    }
    return rows.Row(**{**values, **others})


# The parents differ much: b is below a by 0.1 for each seed, c by 0.1 on average only.
ROWS = [
    *(row("a", i, 3.0 + i) for i in range(3)),
    *(row("b", i, 2.9 + i + 0.001 * (i - 1)) for i in range(3)),
    *(row("c", i, 2.9 + i + 0.2 * (i - 1)) for i in range(3)),
]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "configs" / "experiments" / "x"
    folder.mkdir(parents=True)
    (folder / "cpu.py").write_text(CONFIG)
    rows.write(folder / "cpu.jsonl", ROWS)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(
        "Before.\n<!-- generated: begin -->\n<!-- generated: end -->\nAfter.\n"
    )
    return tmp_path


def test_rows_are_read_as_they_were_written(root):
    [found] = page.read(root)
    assert rows.differences(ROWS, found.rows) == [] and len(found.rows) == len(ROWS)


def test_a_difference_is_bold_only_if_the_paired_interval_excludes_zero(root):
    text = page.text(page.read(root))
    b, c = (re.search(rf"\| {name} − a \|(.*)", text)[1] for name in "bc")
    assert "**−0.100**" in b and "[−0.102, −0.098]" in b and "| 3 |" in b
    assert "**" not in c and "−0.100 | [−0.597, +0.397]" in c
    assert text.count("**") == 2


def test_the_page_has_the_questions_commands_facts_and_conclusion(root):
    text = page.text(page.read(root))
    assert text.startswith(
        "- [Is b better than a?](#is-b-better-than-a)\n\n## Is b better than a?\n\n"
        "So it is.\n\n### How was it measured?\n\n"
        "```bash\npython scripts/sweep.py --config=x.py"
    )
    assert "Some text of two lines." in text and "### Is one lower?" in text
    assert (
        "9 runs in 3 groups; 4.5 hours of processes on a CPU, 2 cores; jax 1; commit abc." in text
    )
    assert "docs/results.md" not in text
    assert "no crossing; lower at the end: b in 3 of 3 seeds" in text


def test_a_correction_counts_the_tests_of_its_question(root):
    """Three seeds of differences −0.02 ± 0.0022 have p = 0.004: one test shows it, 20 do not."""
    values = [-0.022, -0.020, -0.018]
    made = [row("a", i, 3.0) for i in range(3)]
    made += [row(f"b{k}", i, 3.0 + v) for k in range(20) for i, v in enumerate(values)]
    groups = page.Published("x.py", "", study.Study(()), made).groups
    for number, bold in ((1, True), (20, False)):
        pairs = study.against([f"b{k}" for k in range(number)], "a")
        assert ("**" in page._of_question(study.Question("?", pairs), groups)) is bold


def test_an_interaction_is_a_difference_of_differences():
    """(b − a) − (d − c) of 1 − 2, 3 − 5: by seed (2 − 1) − (5 − 3)."""
    made = [row(name, 0, bits) for name, bits in zip("abcd", (1.0, 2.0, 3.0, 5.0), strict=True)]
    groups = page.Published("x.py", "", study.Study(()), made).groups
    asked = study.difference(study.minus("b", "a"), study.minus("d", "c"))
    assert asked.weights == {"b": 1, "a": -1, "d": -1, "c": 1}
    assert page.by_seed(asked, groups, page.MEASURES[study.BITS]) == [-1.0]


def test_the_early_loss_is_of_a_quarter_of_the_steps_and_the_dip_is_above_the_start():
    curve = [[0, 3.0], [100, 3.4], [200, 3.1], [400, 2.5]]
    made = row("a", 0, 2.5, curve=curve, tokens=400)
    assert page.MEASURES["early"].value(made) == 3.4
    assert page.MEASURES["dip"].value(made) == pytest.approx(0.4)
    assert page.MEASURES["dip"].value(row("a", 0, 2.5, curve=[[0, 3.0], [300, 2.0]])) == 0


def test_a_seed_that_one_group_lacks_is_left_out():
    made = [row("a", i, 3.0) for i in range(3)] + [row("b", i, 2.0) for i in (0, 2)]
    groups = page.Published("x.py", "", study.Study(()), made).groups
    assert page.by_seed(study.minus("b", "a"), groups, page.MEASURES[study.BITS]) == [-1.0, -1.0]
    assert page.by_seed(study.minus("z", "a"), groups, page.MEASURES[study.BITS]) == []


def test_curves_cross_at_the_tokens_and_at_the_flops_with_parents():
    """2 − x and x cross at 1; with 1 FLOP per token and a parent of 0.5 for the first, at 1.25."""
    x = [0.0, 1.0, 2.0]
    a = row("a", 0, 0.0, curve=[[t, 2 - t] for t in x], tokens=2, training_flops=2.0)
    a = dataclasses.replace(a, parent_training_flops=0.5)
    b = row("b", 0, 2.0, curve=[[t, t] for t in x], tokens=2, training_flops=2.0)
    [tokens] = page.crossings([a], [b], of_flops=False)
    [flops] = page.crossings([a], [b], of_flops=True)
    assert (tokens.at, tokens.ahead) == (1.0, 0) and flops.at == pytest.approx(1.25)


def test_equal_rows_give_an_equal_figure_of_the_groups_that_are_no_parents(root):
    [one] = page.read(root)
    first = figure.svg(one)
    assert first == figure.svg(one) and len(first) < 60_000
    assert b">b</text>" in first and b">c</text>" in first and b">a</text>" not in first


def test_the_command_writes_the_page_and_check_finds_one_that_is_old(root):
    said, lines = results._write_page(root, check=True)
    assert lines == ["docs/results.md is old; run python scripts/results.py"]
    assert results._write_page(root, check=False)[0] == "docs/results.md: 1 studies"
    assert results._write_page(root, check=True) == ("1 studies compared", [])
    text = (root / "docs" / "results.md").read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n")
    assert (root / "docs" / "results.svg").is_file()


def test_a_damaged_row_is_named_by_its_line(root):
    path = root / "configs" / "experiments" / "x" / "cpu.jsonl"
    path.write_text(path.read_text() + '{"name": "more"}\n')
    with pytest.raises(ValueError, match=r"cpu.jsonl:10 is no row of results"):
        rows.read(path)


def test_docs_results_is_what_the_committed_rows_say():
    assert results._write_page(ROOT, check=True)[1] == []


def test_the_worst_label_is_the_one_with_the_most_bits_and_one_can_be_named():
    made = row("a", 0, 2.0)
    assert (
        page.MEASURES["worst_label"].value(made) == page.measure_of("label/fr").value(made) == 3.0
    )
    assert page.measure_of("label/de").value(made) == 2.0


def test_a_group_alone_is_compared_with_zero_and_a_row_without_the_measure_is_left_out():
    found = [0.2, 0.3, 0.4, None]
    made = [row("a", i, 3.0, languages=v and {"family": v}) for i, v in enumerate(found)]
    groups = page.Published("x.py", "", study.Study(()), made).groups
    asked = study.Question("?", study.alone(["a"]), "family")
    assert "| a | **+0.300** | [+0.052, +0.548] | 3 | 0.035 |" in page._of_question(asked, groups)


@pytest.mark.parametrize("one", page.read(ROOT), ids=lambda one: one.config.split("/")[-2])
def test_a_conclusion_has_no_number_that_the_tables_lack(one):
    """A result that was typed in by hand would outlive the rows that it was read from."""
    silent = dataclasses.replace(one.study, conclusion="")
    tables = page.text([dataclasses.replace(one, study=silent)])
    known = {float(number) for number in re.findall(r"\d+\.\d+", tables)}
    claimed = {float(number) for number in re.findall(r"\d+\.\d+", one.study.conclusion)}
    assert claimed <= known
