"""Searches for the remat policy, number of microbatches and mesh with the fastest step that fits.

Every candidate is compiled, so the search is greedy: first policies on the config's own mesh, then
meshes with the best policy, each with the fewest microbatches that fit. More microbatches need less
memory but never less time, because the weights are all-gathered for each of them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from moe_jax.config import ConfigError, Run, environment, sections
from moe_jax.dryrun import report as dryrun
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding

# From left to right, these keep less. Policies that offload to the host are left out, because the
# roofline does not model the link to the host.
POLICIES = ("none", "save_dots", "save_experts", "full")

Trial = Callable[[Run], dryrun.Report]


def search(settings: Run, num_devices: int, trial: Trial) -> Iterator[dryrun.Report]:
    """Yields the reports of all trials; `best` chooses among them.

    Args: trial: runs `dryrun.report.run` for a config on the target devices.

    Raises: ConfigError for a mesh or batch that does not fit the devices.
    """
    environment.validate_mesh(settings, num_devices)
    sizes = meshes.axis_sizes(vars(settings.mesh), num_devices)
    tried = []
    for policy in POLICIES:
        for report in fewest_microbatches(trial, _with(settings, sizes, policy)):
            tried.append(report)
            yield report
    found = best(tried)
    policy = found.remat if found else POLICIES[-1]
    for other in mesh_shapes(settings, sizes):
        try:
            yield from fewest_microbatches(trial, _with(settings, other, policy))
        except ConfigError:  # the mesh does not fit these devices or the model's arrays
            continue


def best(reports: Sequence[dryrun.Report]) -> dryrun.Report | None:
    """The fastest report that fits, or without a chip's specifications the one with the fewest
    FLOPs; among equals, the one with the least memory."""

    def order(report):
        least = report.roofline_seconds or report.step_flops
        return least, report.microbatches, report.hbm_peak_bytes

    return min((r for r in reports if r.fits), key=order, default=None)


def fewest_microbatches(trial: Trial, settings: Run) -> Iterator[dryrun.Report]:
    """Yields the reports of a binary search over the possible numbers of microbatches."""
    numbers = microbatch_numbers(settings)
    low, high = 0, len(numbers)  # numbers before low do not fit; numbers from high on do
    while low < high:
        middle = (low + high) // 2
        training = dataclasses.replace(settings.training, accumulation_steps=numbers[middle])
        report = trial(dataclasses.replace(settings, training=training))
        yield report
        if report.fits:
            high = middle
        else:
            low = middle + 1


def microbatch_numbers(settings: Run) -> list[int]:
    """The numbers, ascending, that give every batch shard the same number of whole rows."""
    rows = settings.training.batch_size // sharding.batch_shards(vars(settings.mesh))
    return [number for number in range(1, rows + 1) if rows % number == 0]


def mesh_shapes(settings: Run, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Meshes with other powers of 2 for expert and tensor that divide experts and kv heads."""
    shapes = []
    for expert in _powers_of_2(settings.model.num_experts):
        for tensor in _powers_of_2(settings.model.num_kv_heads):
            rest, left = divmod(sizes["fsdp"] * sizes["expert"] * sizes["tensor"], expert * tensor)
            shape = {**sizes, "fsdp": rest, "expert": expert, "tensor": tensor}
            if rest and not left and shape != sizes:
                shapes.append(shape)
    return shapes


def _powers_of_2(divided: int) -> list[int]:
    return [2**k for k in range(divided.bit_length()) if divided % 2**k == 0] or [1]


def _with(settings: Run, sizes: dict[str, int], policy: str) -> Run:
    model = dataclasses.replace(settings.model, remat=policy)
    return dataclasses.replace(settings, mesh=sections.Mesh(**sizes), model=model)


def line(report: dryrun.Report) -> str:
    """One line of a table of trials, under HEADER."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1)
    least = "" if report.roofline_seconds is None else f"{report.roofline_seconds:.3g}"
    peak, verdict = dryrun.size(report.hbm_peak_bytes), "fits" if report.fits else "no"
    plan = report.remat, report.microbatches, mesh or "one device"
    return _COLUMNS.format(*plan, peak, verdict, least)


def flags(report: dryrun.Report) -> str:
    """The command-line options that give a run these settings."""
    settings = {
        "model.remat": report.remat,
        "training.accumulation_steps": report.microbatches,
        **{f"mesh.{axis}": size for axis, size in report.mesh.items()},
    }
    return " ".join(f"--config.{name}={value}" for name, value in settings.items())


_COLUMNS = "{:13} {:>12}  {:28} {:>10} {:>5} {:>10}"
HEADER = _COLUMNS.format("remat", "microbatches", "mesh", "peak", "", "least, s")
