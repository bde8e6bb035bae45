"""The dry run: memory, time and traffic of a train step on devices that this machine lacks.

It compiles a config's step for these devices, like `train.run`, and reads the compiled program.
"""

import dataclasses
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from moe_jax import config as configs
from moe_jax.config import checks, environment
from moe_jax.dryrun import hlo, hlo_traffic, lowering
from moe_jax.dryrun import roofline as rooflines
from moe_jax.parallel import chips
from moe_jax.parallel import mesh as meshes
from moe_jax.training import flops, objective

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The compiler's messages for a program that does not fit; the total includes the arguments.
_WANTED = (
    re.compile(r"total memory required for [\w ]+ \(([\d.]+)([KMGT])\) exceeds available HBM"),
    re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Numbers for one device and one step.

    Those that need the compiled step are None if compilation ran out of memory or never began;
    those that need a chip's specifications are None for CPUs.
    """

    config: str
    topology: str
    devices: int
    mesh: dict[str, int]
    microbatches: int
    remat: str
    fits: bool | None  # None without a limit
    hbm_limit_bytes: int | None
    hbm_peak_bytes: int
    argument_bytes: int
    temporary_bytes: int | None = None
    step_flops: int | None = None
    analytic_flops: float
    model_flops: float
    collectives: tuple[hlo.Collective, ...] | None = None
    hbm_traffic_bytes: int | None = None
    hbm_due_bytes: int  # what any such step must move to and from main memory
    roofline: rooflines.Seconds | None = None
    roofline_seconds: float | None = None
    mfu_bound: float | None = None
    compile_seconds: float = 0.0  # includes lowering; 0 if the state alone does not fit
    tokens_per_second: float | None = None  # of all devices; the roofline's upper bound
    tokens_per_second_per_device: float | None = None
    num_steps: int = 0
    days: float | None = None  # for all steps; a lower bound
    device_hours: float | None = None
    estimate: bool = False  # compiled for CPU devices in place of GPUs


def run(
    settings: configs.Run,
    topology: chips.Topology,
    devices: Sequence[jax.Device],
    *,
    name: str = "",
    hbm_limit: int | None = None,
) -> Report:
    """Compiles a run's step for the devices of a topology, and analyses it.

    Args:
      name: the config's name in the report.
      hbm_limit: bytes of memory to assume instead of the chip's.

    Raises: ConfigError, in one line, for a config that is wrong or does not fit the devices.
    """
    environment.validate_mesh(settings, len(devices))
    objective.batch_shapes(settings, jax.ShapeDtypeStruct)
    with checks.refusing():
        mesh = meshes.make(vars(settings.mesh), devices)
        state = lowering.abstract_state(settings, mesh)
    arguments = lowering.state_bytes(state)
    with jax.set_mesh(mesh):
        analytic_flops = flops.analytic_flops(settings.model, settings.data.sequence_length)
    model_flops = flops.model_flops(settings.model, settings.data.sequence_length)
    tokens = settings.training.batch_size * settings.data.sequence_length / mesh.size
    chip = topology.facts
    limit = hbm_limit or (chip.hbm_bytes if chip else None)
    facts: dict[str, Any] = {
        "config": name,
        "topology": topology.name,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "microbatches": settings.training.accumulation_steps,
        "remat": settings.model.remat,
        "hbm_limit_bytes": limit,
        "analytic_flops": tokens * analytic_flops,
        "model_flops": tokens * model_flops,
        "hbm_due_bytes": lowering.bytes_due(settings, state, tokens),
        "num_steps": settings.training.num_steps,
        "estimate": topology.compiles_here and chip is not None,
    }
    if limit is not None and arguments > limit:  # saves minutes of compiling
        return Report(**facts, fits=False, hbm_peak_bytes=arguments, argument_bytes=arguments)
    print(f"compiling for {topology.name} ...", file=sys.stderr, flush=True)
    began = time.perf_counter()
    try:
        with checks.refusing():
            compiled = lowering.lower(settings, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        return Report(
            **facts,
            fits=False,
            hbm_peak_bytes=bytes_wanted(str(error)),
            argument_bytes=arguments,
            compile_seconds=time.perf_counter() - began,
        )
    compile_seconds = time.perf_counter() - began
    read = _read(compiled, settings, mesh, topology)
    peak = read["hbm_peak_bytes"]
    return Report(
        **facts,
        **read,
        **_times(topology, mesh, facts["model_flops"], read, settings, tokens),
        fits=None if limit is None else peak <= limit,
        compile_seconds=compile_seconds,
    )


def _read(
    compiled: jax.stages.Compiled,
    settings: configs.Run,
    mesh: jax.sharding.Mesh,
    topology: chips.Topology,
) -> dict[str, Any]:
    """The numbers of a compiled step: its memory, products, collectives and traffic."""
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    peak = memory.peak_memory_in_bytes  # on TPU this includes arrays kept in VMEM
    if topology.compiles_here:  # on CPU the peak does not include temporaries
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    within = dict(zip(mesh.axis_names, meshes.first_slice(mesh).shape, strict=True))
    return {
        "hbm_peak_bytes": peak,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "step_flops": hlo.product_flops(
            text,
            kernels=lowering.kernel_flops(settings, mesh),
            filled=lowering.filled_rows(settings, mesh),
        ),
        "collectives": tuple(c for c in hlo.collectives(text, within) if c.axes),
        "hbm_traffic_bytes": hlo_traffic.traffic(text, settings.model.num_experts),
    }


def _times(
    topology: chips.Topology,
    mesh: jax.sharding.Mesh,
    model_flops: float,
    read: dict,
    settings: configs.Run,
    tokens: float,
) -> dict:
    """The report's times and rates; `tokens` is the number per device and step."""
    if (chip := topology.facts) is None:
        return {}
    seconds = rooflines.seconds(
        step_flops=read["step_flops"],
        traffic=read["hbm_traffic_bytes"],
        collectives=read["collectives"],
        mesh=mesh,
        chip=chip,
        topology=topology,
    )
    return {
        "roofline": seconds,
        "roofline_seconds": seconds.bound,
        "mfu_bound": model_flops / (seconds.bound * chip.flops),
        "tokens_per_second": tokens * mesh.size / seconds.bound,
        "tokens_per_second_per_device": tokens / seconds.bound,
        "days": settings.training.num_steps * seconds.bound / 86400,
        "device_hours": settings.training.num_steps * seconds.bound * mesh.size / 3600,
    }


def bytes_wanted(complaint: str) -> int:
    """The bytes needed by a program that does not fit, from the compiler's error message.

    Raises: ConfigError if the message is about something else.
    """
    for pattern in _WANTED:
        if found := pattern.search(complaint):
            return int(float(found[1]) * _UNITS[found[2]])
    raise configs.ConfigError(f"the compiler cannot make this step: {complaint.splitlines()[0]}")


def text(report: Report, price: float = 0.0) -> str:
    """The report as a short table of at most 100 columns, with the collectives if it compiled.

    Args: price: the price of one device for one hour.
    """
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1)
    lines = [
        f"{chips.topology(report.topology).title}: {report.devices} devices, {mesh or 'no mesh'}, "
        f"microbatches {report.microbatches}, remat {report.remat}",
        f"  memory   {_memory(report)}",
    ]
    if report.step_flops is not None:
        lines.append(
            f"  FLOPs    {report.step_flops:.4g} = {report.step_flops / report.analytic_flops:.3f} "
            f"x analytic, {report.step_flops / report.model_flops:.3f} x model"
        )
    if report.roofline is not None and report.mfu_bound is not None:
        moved = report.hbm_traffic_bytes or 0
        lines.append(
            f"  traffic  {size(moved)} to and from memory = "
            f"{moved / report.hbm_due_bytes:.2f} x the least"
        )
        parts = dataclasses.asdict(report.roofline)
        shown = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
        lines.append(
            f"  seconds  {report.roofline_seconds:.3g} at least ({shown}): "
            f"MFU at most {100 * report.mfu_bound:.0f} %"
        )
        lines.append(
            f"  speed    {report.tokens_per_second:,.0f} tokens/s at most, "
            f"{report.tokens_per_second_per_device:,.0f} a device"
        )
        cost = f", {price * (report.device_hours or 0):,.0f} at {price:g} an hour" if price else ""
        lines.append(
            f"  run      {report.num_steps:,} steps take {report.days:,.2f} days at least, "
            f"{report.device_hours:,.0f} device hours{cost}"
        )
    if report.estimate:
        lines.append(
            "  This is an estimate: the step was compiled for CPU devices in place of GPUs."
        )
    if report.collectives is not None:
        lines.append(f"  {'collectives':20} {'along':22} {'times':>7} {'bytes':>12}")
        for c in report.collectives:
            axes = ", ".join(c.axes)
            lines.append(f"  {c.operation:20} {axes:22} {c.count:7,} {size(c.bytes):>12}")
        lines.append(f"  compiled in {report.compile_seconds:.0f} s")
    return "\n".join(lines)


def size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


def _memory(report: Report) -> str:
    refusal = "does not fit; --search finds settings that do"
    verdict = {True: "fits", False: refusal, None: "no limit known"}[report.fits]
    of_limit = f" of {size(report.hbm_limit_bytes)}" if report.hbm_limit_bytes else ""
    parts = f"arguments {size(report.argument_bytes)}"
    if report.temporary_bytes is not None:
        parts += f", temporaries {size(report.temporary_bytes)}"
        if spare := report.argument_bytes + report.temporary_bytes - report.hbm_peak_bytes:
            more = "not all at the peak" if spare > 0 else "and code or outputs"
            parts += f" {more}"
    return f"{size(report.hbm_peak_bytes)}{of_limit} ({parts}): {verdict}"
