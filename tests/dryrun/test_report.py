"""The dry run against what is known of a step: its state, its products, its collectives."""

import dataclasses
import json
import pathlib
import runpy
import subprocess
import sys

import jax
import pytest

from moe_jax import config as configs
from moe_jax.dryrun import lowering, search, topologies
from moe_jax.dryrun import report as dryrun
from moe_jax.parallel import chips
from moe_jax.parallel import mesh as meshes

ROOT = pathlib.Path(__file__).parents[2]
CPUS = jax.devices()  # before topologies asks for another number of them
TINY = """
from moe_jax import config as configs


def get_config(experts="0"):
    config = configs.default()
    config.model.update(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                        num_attention_heads=2, num_experts=int(experts))
    if int(experts):
        config.model.num_experts_per_tok = 2
    config.data.sequence_length = 128
    config.training.batch_size = config.evaluation.batch_size = 8
    return config
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(TINY)
    return path


def dry_run(config, where, **options):
    topology = chips.topology(where)
    return dryrun.run(configs.resolve(config), topology, topologies.devices(topology), **options)


def parameters(model):
    D, V, F, E = (
        model[k] for k in ("hidden_size", "vocab_size", "intermediate_size", "num_experts")
    )
    return 2 * V * D + 4 * D * D + 3 * D + E * (3 * D * F + D)


def test_memory_and_collectives_are_those_of_the_step(tiny):
    config = configs.load(f"{tiny}:4", {"mesh.fsdp": 4, "mesh.expert": 2})
    report = dry_run(config, "cpu:8")
    D, E, T = 64, 4, 128
    replicated = 3 * D + E * D  # norms, router
    cut = parameters(config.model) - replicated
    experts = E * 3 * D * 128
    state = 3 * 4 * (replicated + (cut - experts) / 4 + experts / 8)
    batch = 5 * 4 * T  # one row of tokens, targets, segments, positions, weights
    assert report.argument_bytes == pytest.approx(state + batch, abs=64)
    assert report.hbm_peak_bytes == report.argument_bytes + report.temporary_bytes
    assert report.fits is None and report.roofline is None
    axes = {axis for row in report.collectives for axis in row.axes}
    assert axes == {"fsdp", "expert"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_least_that_a_step_moves_is_worked_by_hand(tiny, dtype):
    changes = {"model.dtype": dtype, "training.accumulation_steps": 4, "optimizer.frozen": "router"}
    settings = configs.resolve(configs.load(f"{tiny}:4", changes))
    state = lowering.abstract_state(settings, meshes.make({}, CPUS[:1]))
    D, V, T, rows, L, size = 64, 256, 128, 8, 1, 4 if dtype == "float32" else 2
    all_of_them, router = parameters(vars(settings.model)), D * 4
    trained = all_of_them - router
    moved = 4 * (all_of_them + trained + 2 * 2 * trained)  # the moments are those of `trained`
    weights = 2 * 4 * (all_of_them - V * D)  # in both passes of four microbatches, but not rows
    kept = 2 * (trained + rows * T * D * L)  # written and read again
    due = lowering.bytes_due(settings, state, rows * T)
    assert due == pytest.approx(moved + size * (weights + kept), abs=128)  # the numbers of steps


def test_the_command_prints_the_json_of_the_function(tiny):
    command = [sys.executable, "scripts/dryrun.py", f"--config={tiny}", "--topology=cpu:2"]
    command += ["--json", "--hbm_limit=1", "--config.training.batch_size=4"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    printed = json.loads(ended.stdout)
    config = configs.load(str(tiny), {"training.batch_size": 4})
    again = dry_run(config, "cpu:2", name=str(tiny), hbm_limit=10**9)
    expected = json.loads(json.dumps(dataclasses.asdict(again)))
    del printed["compile_seconds"], expected["compile_seconds"]
    assert printed == expected
    assert printed["fits"] is True
    assert printed["step_flops"] == printed["analytic_flops"]
    assert "does not fit" in dryrun.text(dataclasses.replace(again, fits=False))


def test_a_state_larger_than_the_limit_is_known_before_compiling(tiny, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    report = dry_run(configs.load(str(tiny)), "cpu:8", hbm_limit=1000)
    assert (report.fits, report.step_flops) == (False, None)
    assert "does not fit" in dryrun.text(report) and "collectives" not in dryrun.text(report)


@pytest.mark.parametrize(
    ("complaint", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (97.88G) exceeds available HBM (95.74G).",
            97.88,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 33.27G of 30.75G hbm. Exceeded by", 33.27),
    ],
)
def test_what_a_step_that_does_not_fit_needs_is_read_from_the_compilers_words(complaint, gib):
    assert dryrun.bytes_wanted(complaint) == int(gib * 2**30)


def test_a_failure_of_the_compiler_for_another_reason_is_no_lack_of_memory():
    vmem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem."
    with pytest.raises(configs.ConfigError, match="the compiler cannot make this step: RES.* vmem"):
        dryrun.bytes_wanted(vmem)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--topology=v9:2x2"], "unknown chip v9; use one of cpu, v4, v5e, v5p, v6e, tpu7x"),
        (["--topology=cpu:3"], "config.training.batch_size .* is not divisible by the 3 batch"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "config.mesh .* does not fit 8 device"),
        (
            ["--topology=cpu:8", "--config.model.num_heads=3"],
            "config.model.num_heads is no key",
        ),
        (["--topology=cpu:8", "--search"], "--search needs to know what fits cpu:8; add"),
        (["--topology=cpu:8", "--hbm_limit=0"], "--hbm_limit=0.0 must be a number of GB more"),
        (["--topology=cpu:9"], "jax has only 8 CPU device"),
        (["--topology=v5p:2x2x1"], r"libtpu 0.0.1 is not jax .*; pip install 'jax\[tpu\]=="),
    ],
)
def test_mistakes_are_one_line(tiny, tmp_path, monkeypatch, capsys, flags, complaint):
    _pretend_libtpu(tmp_path, "0.0.1", monkeypatch)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["dryrun.py", f"--config={tiny}", *flags])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path("scripts/dryrun.py", run_name="__main__")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=complaint):
        raise ValueError(error)


def test_another_libtpu_than_jaxs_own_is_refused_and_its_own_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu" / "libtpu.so"))
    with pytest.raises(ValueError, match=r"is not installed; pip install 'jax\[tpu\]=="):
        topologies.check_libtpu()
    own = topologies.own_libtpu()
    _pretend_libtpu(tmp_path, own.removesuffix("*") + "1" * own.endswith("*"), monkeypatch)
    topologies.check_libtpu()


def _pretend_libtpu(folder, version, monkeypatch):
    info = folder / f"libtpu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: libtpu\nVersion: {version}\n")
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(folder / "libtpu" / "libtpu.so"))


def test_the_answers_for_a_run_follow_from_the_least_time_of_a_step(tiny):
    """GPUs are estimated on CPU devices; a step takes as long as the slowest part."""
    report = dry_run(configs.load(str(tiny), {"training.num_steps": 1000}), "h100:8")
    tokens = 8 * 128
    assert report.estimate and report.fits and report.hbm_limit_bytes == 80 * 10**9
    assert report.tokens_per_second == pytest.approx(tokens / report.roofline_seconds)
    assert report.tokens_per_second_per_device == pytest.approx(report.tokens_per_second / 8)
    assert report.days == pytest.approx(1000 * report.roofline_seconds / 86400)
    assert report.device_hours == pytest.approx(24 * 8 * report.days)
    hours = dataclasses.replace(report, device_hours=1000.0)
    assert "1,000 device hours, 2,500 at 2.5 an hour" in dryrun.text(hours, price=2.5)
    assert "This is an estimate" in dryrun.text(report)


def test_memory_that_does_not_add_up_says_why_and_no_fit_says_what_to_do(tiny):
    report = dry_run(configs.load(str(tiny)), "cpu:8", hbm_limit=10**9)
    assert "not all" not in dryrun.text(report)
    less = dataclasses.replace(report, hbm_peak_bytes=report.hbm_peak_bytes - 1000, fits=False)
    assert "not all at the peak): does not fit; --search finds" in dryrun.text(less)


def test_the_options_of_a_report_make_its_settings(tiny):
    options = {"model.remat": "full", "training.accumulation_steps": 2, "mesh.fsdp": 4}
    rows = {"training.batch_size": 16, "mesh.data": 2}
    report = dry_run(configs.load(str(tiny), options | rows), "cpu:8")
    flags = search.flags(report).split()
    again = configs.resolve(configs.parse([f"--config={tiny}", *flags]))
    assert (again.model.remat, again.training.accumulation_steps) == ("full", 2)
    assert (again.mesh.data, again.mesh.fsdp, again.mesh.expert) == (2, 4, 1)
