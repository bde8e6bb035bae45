"""Records a profile of a few steps of a run: a trace, the compiled step and its memory.

The folder `profile` of the workdir gets a trace as xprof and TensorBoard read it (jax.profiler);
step.hlo.txt, the compiled step, whose instructions the trace names; profile.json; and memory.prof,
the live arrays at the end of the last traced step, for pprof. `moe_jax profile_summary` reads them.
"""

import contextlib
import itertools
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from moe_jax import config as configs
from moe_jax import files, strict_json
from moe_jax.parallel import distributed

FOLDER, HLO, FACTS, LIVE = "profile", "step.hlo.txt", "profile.json", "memory.prof"
MEMORY = ("argument", "output", "alias", "temp", "generated_code")


def traced(
    jitted: jax.stages.Wrapped,
    extra: Sequence[Any],
    profile: configs.Profile,
    workdir: pathlib.Path,
    start: int,
) -> Callable:
    """(state, batch) -> jitted(state, batch, *extra), which records the steps of `profile.steps`.

    start: the number of steps that are already done. Process 0 records; a run that ends before the
    last of these steps leaves no profile.
    """
    if not (profile.steps and distributed.is_first()):
        return lambda state, batch: jitted(state, batch, *extra)
    first, last = max(profile.steps[0], start + 1), profile.steps[1]
    # A step that another version has compiled would come from the cache with that version's scopes.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    numbers, began = itertools.count(start + 1), [0.0]

    def train_step(state, batch):
        number, lowered = next(numbers), None
        if not first <= number <= last:
            return jitted(state, batch, *extra)
        if number == first:
            jax.block_until_ready(state)
            _begin(workdir / FOLDER)
            began[0] = time.monotonic()
        if number == last:
            lowered = jitted.lower(state, batch, *extra)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = jitted(state, batch, *extra)
        if lowered is not None:
            jax.block_until_ready(result)
            seconds = (time.monotonic() - began[0]) / (last - first + 1)
            jax.profiler.stop_trace()
            _write(workdir / FOLDER, lowered.compile(), [first, last], seconds)
        return result

    return train_step


def _begin(folder: pathlib.Path) -> None:
    with contextlib.suppress(RuntimeError):  # none is running, unless a rewind has left one
        jax.profiler.stop_trace()
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    folder.mkdir()
    jax.profiler.start_trace(folder)


def _write(folder: pathlib.Path, compiled: jax.stages.Compiled, steps: list[int], seconds: float):
    memory: Any = compiled.memory_analysis()
    found = {part: getattr(memory, f"{part}_size_in_bytes") for part in MEMORY}
    if jax.default_backend() != "cpu":  # where it leaves out the temporary arrays
        found["peak"] = getattr(memory, "peak_memory_in_bytes", None)
    facts = {
        "steps": steps,
        "seconds_per_step": seconds,
        "device": jax.devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "memory_of_step": found,
        "memory_of_device": jax.local_devices()[0].memory_stats() or {},
    }
    files.write_text(folder / HLO, compiled.as_text() or "")
    jax.profiler.save_device_memory_profile(str(folder / LIVE))
    files.write_text(folder / FACTS, strict_json.text(facts, indent=1) + "\n")
    distributed.say(f"profile of steps {steps[0]} to {steps[1]}: moe_jax profile_summary WORKDIR")
