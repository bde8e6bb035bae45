"""The search over a memory that is a formula: what fits is known, and so what is the best."""

import dataclasses

from moe_jax import config as configs
from moe_jax.config import sections
from moe_jax.dryrun import report as dryrun
from moe_jax.dryrun import search

KEPT = {"none": 8, "save_dots": 4, "save_experts": 2, "full": 1}  # bytes of a row
SECONDS = {"none": 1.0, "save_dots": 1.1, "save_experts": 1.2, "full": 1.3}


def tiny():
    config = configs.default()
    config.model.update(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    config.training.batch_size = config.evaluation.batch_size = 96
    return configs.resolve(config)


def trial_within(limit, tried):
    """Memory grows with a microbatch's rows and what is kept of each, less with tensor; a
    microbatch takes a hundredth of a second."""

    def trial(run):
        rows = 96 * run.mesh.tensor // 8 // run.training.accumulation_steps
        peak = rows * KEPT[run.model.remat] * 8 // run.mesh.tensor
        tried.append((run.model.remat, run.training.accumulation_steps))
        return dryrun.Report(
            config="",
            topology="",
            devices=8,
            mesh=vars(run.mesh),
            microbatches=run.training.accumulation_steps,
            remat=run.model.remat,
            fits=peak <= limit,
            hbm_limit_bytes=limit,
            hbm_peak_bytes=peak,
            hbm_due_bytes=0,
            argument_bytes=0,
            analytic_flops=1.0,
            model_flops=1.0,
            roofline_seconds=SECONDS[run.model.remat]
            + 0.01 * run.training.accumulation_steps
            + 0.5 * (run.mesh.tensor > 1),
        )

    return trial


def test_the_least_recomputing_policy_and_the_largest_microbatch_that_fit_are_found():
    tried = []
    # A device has 12 rows; "none" must cut them to 3 (4 microbatches, 1.04 s), "save_dots" to 6.
    reports = list(search.search(tiny(), 8, trial_within(8 * 8 * 3, tried)))
    best = search.best(reports)
    assert (best.remat, best.microbatches, best.mesh["fsdp"]) == ("none", 4, 8)
    assert {r.mesh["tensor"] for r in reports} == {1, 2}
    assert {r.mesh["expert"] for r in reports} == {1, 2, 4}
    assert len(tried) < 12 * len(KEPT)


def test_where_little_fits_everything_is_recomputed_and_where_nothing_fits_there_is_no_best():
    little = list(search.search(tiny(), 8, trial_within(8, [])))
    on_own_mesh = [r for r in little if r.mesh["tensor"] == 1 and r.mesh["expert"] == 1]
    best = search.best(on_own_mesh)
    assert (best.remat, best.microbatches) == ("full", 12)
    assert search.best(list(search.search(tiny(), 8, trial_within(1, [])))) is None


def test_a_microbatch_has_whole_rows_on_every_device():
    settings = dataclasses.replace(tiny(), mesh=sections.Mesh(fsdp=4, expert=2))
    assert search.microbatch_numbers(settings) == [1, 2, 3, 4, 6, 12]
