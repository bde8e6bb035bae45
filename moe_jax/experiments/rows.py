"""One row of JSON for each finished run of a study, committed beside the study's config."""

import contextlib
import dataclasses
import json
import pathlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax import files, strict_json
from moe_jax.sweep import launchers, status
from moe_jax.sweep.plan import Run
from moe_jax.training import metrics

OF_THE_EXECUTION = ("seconds", "commit")  # fields in which a repetition of a run may differ


@dataclasses.dataclass(frozen=True)
class Row:
    """The numbers that a run leaves for the page of results. Losses are in nats per token or
    bits per byte.

    number: its place among the seeds of its group; runs of one number share their parent.
    tokens, training_flops: without those of its parents, which follow.
    curve: [tokens, bits per byte on a sample of the validation text] of each evaluation.
    effective_experts, expert_similarity, max_violation: of each sparse layer at the end; None for
      a dense model. max_violation_mean: over training, of the worst layer.
    languages: how the languages of the held-out text are routed, if `analyze` has written it to the
      run's folder analysis/: `divergence`, the mean Jensen-Shannon divergence between them in bits,
      mean of the layers, and `family`, the correlation of their distances with those of family.
    """

    name: str
    group: str
    number: int
    seed: int
    run_id: str
    overrides: Mapping[str, Any]
    parents: Sequence[str]
    steps: int
    tokens: int
    parent_tokens: int
    training_flops: float
    parent_training_flops: float
    parameters: int
    active_parameters: int
    test_loss: float
    test_bits_per_byte: float
    test_bits_by_label: Mapping[str, float]
    validation_bits_per_byte: float
    curve: Sequence[Sequence[float]]
    effective_experts: Sequence[float] | None
    expert_similarity: Sequence[float] | None
    max_violation: Sequence[float] | None
    max_violation_mean: float | None
    seconds: float
    commit: str
    versions: Mapping[str, str]
    hardware: str
    languages: Mapping[str, float] | None = None


def of_run(run: Run, result: Mapping[str, Any], hardware: str) -> Row:
    """The row of a finished run, from its result.json and metrics.jsonl.

    Raises: ValueError if it was not evaluated on a test split.
    """
    if "test" not in result:
        raise ValueError(f"{run.name} has no test loss; set config.evaluation.test_split=True")
    logged = metrics.read(run.workdir / "metrics.jsonl")
    evaluated = [row for row in logged if "validation" in row]
    router = [row["router"] for row in logged if "loss" in row and row.get("router")]
    sparse = bool(result["router"])
    end = re.search(r"_s(\d+)$", run.name)
    return Row(
        name=run.name,
        group=run.group,
        number=int(end[1]) if end else 0,
        seed=run.seed,
        run_id=run.run_id,
        overrides={key: value for key, value in run.overrides.items() if key != "seed"},
        parents=run.sources,
        **{name: result[name] for name in ("steps", "tokens", "training_flops", "commit")},
        parent_tokens=result["parent_tokens"] or 0,
        parent_training_flops=result["parent_training_flops"],
        **{name: result[name] for name in ("parameters", "active_parameters", "versions")},
        test_loss=result["test"]["loss"],
        test_bits_per_byte=result["test"]["bits_per_byte"],
        test_bits_by_label={
            label: round(own["bits_per_byte"], 5)
            for label, own in result["test"]["per_language"].items()
        },
        validation_bits_per_byte=result["bits_per_byte"],
        curve=[[r["tokens"], round(r["validation"]["bits_per_byte"], 5)] for r in evaluated],
        effective_experts=result["effective_experts"] if sparse else None,
        expert_similarity=result["expert_similarity"] if sparse else None,
        max_violation=evaluated[-1]["router"]["max_violation"] if sparse else None,
        max_violation_mean=round(float(np.mean([max(r["max_violation"]) for r in router])), 5)
        if router
        else None,
        seconds=status.wall(result),
        hardware=hardware,
        languages=_languages(run.workdir / "analysis" / "result.json"),
    )


def _languages(path: pathlib.Path) -> dict[str, float] | None:
    if not path.exists():
        return None
    found = strict_json.read_object(path)
    if "mantel" not in (found["languages"] or {}):  # the text had no related languages
        return None
    layers = [layer["label_divergence"] for layer in found["layers"].values()]
    family = found["languages"]["mantel"]["statistic"]
    return {"divergence": round(float(np.mean(layers)), 5), "family": round(family, 5)}


def hardware(result: Mapping[str, Any]) -> str:
    """The device of a run; for a CPU, the processor of this machine and its cores."""
    device = str(result["device"])
    if not device.startswith("cpu"):
        return device
    return f"{_processor()}, {len(launchers.available_cores()) or '?'} cores"


def _processor() -> str:
    with contextlib.suppress(OSError):
        facts = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = re.search(r"^model name\s*:\s*(.+)", facts, re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def collect(runs: Iterable[Run]) -> list[Row]:
    """The rows of the finished runs of a sweep, in its order."""
    finished = [(run, result) for run in runs if (result := run.result)]
    return [of_run(run, result, hardware(result)) for run, result in finished]


def differences(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """A line for each field in which two rows of the same run are not equal bit for bit; the fields
    of its execution may differ, and a repetition need not be analysed."""
    before, found = {row.name: row for row in old}, []
    for row in (row for row in new if row.name in before):
        was, now = (strict_json.plain(dataclasses.asdict(r)) for r in (before[row.name], row))
        free = OF_THE_EXECUTION if now["languages"] else (*OF_THE_EXECUTION, "languages")
        names = [name for name in was if name not in free and was[name] != now[name]]
        found += [f"{row.name}: {name}={now[name]}, not {was[name]}" for name in names]
    return found


def write(path: pathlib.Path, rows: Iterable[Row]) -> None:
    lines = (strict_json.text(dataclasses.asdict(row)) for row in rows)
    files.write_text(path, "".join(f"{line}\n" for line in lines))


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a file.

    Raises: ValueError, with the line, for one that is no row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no row of results: {error}") from None
    return rows
