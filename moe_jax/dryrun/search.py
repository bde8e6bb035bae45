"""The remat policy, number of microbatches and mesh with which a config's step is fastest and fits.

Every candidate is compiled, so the search is greedy: first policies on the config's own mesh, then
meshes with the best policy, each with the fewest microbatches that fit. More of them need less
memory, and no less time: weights are gathered once for each.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from moe_jax.config import ConfigError, Run, environment, sections
from moe_jax.dryrun import report as dryrun
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding

# These keep less from left to right. Policies that offload to the host are left out: the roofline
# does not know the network to it.
POLICIES = ("none", "save_dots", "save_experts", "full")

Trial = Callable[[Run], dryrun.Report]


def search(settings: Run, num_devices: int, trial: Trial) -> Iterator[dryrun.Report]:
    """The reports of all trials, one by one; `best` chooses among them.

    Args: trial: `dryrun.run` of a config, on the devices that the search is for.
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
    """The fastest that fits, by FLOPs without a chip's figures; of equals, that of least memory."""

    def order(report):
        least = report.roofline_seconds or report.step_flops
        return least, report.microbatches, report.hbm_peak_bytes

    return min((r for r in reports if r.fits), key=order, default=None)


def fewest_microbatches(trial: Trial, settings: Run) -> Iterator[dryrun.Report]:
    """Bisects the numbers of microbatches that the batch can have; the reports of those tried."""
    numbers = microbatch_numbers(settings)
    low, high = 0, len(numbers)  # numbers before low do not fit, those from high on do
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
    """The numbers that give every batch shard the same number of whole rows, from 1 on."""
    rows = settings.training.batch_size // sharding.batch_shards(vars(settings.mesh))
    return [number for number in range(1, rows + 1) if rows % number == 0]


def mesh_shapes(settings: Run, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Other sizes of expert and tensor, powers of 2, that divide experts and key-value heads."""
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
    """The options that give a run these settings, to copy."""
    settings = {
        "model.remat": report.remat,
        "training.accumulation_steps": report.microbatches,
        **{f"mesh.{axis}": size for axis, size in report.mesh.items()},
    }
    return " ".join(f"--config.{name}={value}" for name, value in settings.items())


_COLUMNS = "{:13} {:>12}  {:28} {:>10} {:>5} {:>10}"
HEADER = _COLUMNS.format("remat", "microbatches", "mesh", "peak", "", "least, s")
