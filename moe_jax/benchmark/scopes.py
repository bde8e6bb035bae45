"""The time of a profiled step by named scope: which parts of the model and the step take it.

A trace names the instructions of the compiled step, and the step's HLO names the scope of each, as
`jax.named_scope` and the derivative have left it: "…/transpose(jvp(moe))/experts/dot_general". A
fusion counts for the scope of its root, as in xprof.
"""

import collections
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import jax

from moe_jax import strict_json, untrusted
from moe_jax.dryrun import hlo_text
from moe_jax.training import profiling

# scope -> its meaning; of the scopes in an instruction's name, the innermost counts.
SCOPES = {
    "embedding": "look-up of the tokens",
    "attention": "attention with its norm",
    "mlp": "dense feed-forward with its norm",
    "moe": "rest of a sparse layer: norm, statistics, gathering of weights",
    "router": "logits, choice and weights of the experts",
    "dispatch": "sorting the tokens by expert",
    "exchange": "tokens to and from other devices",
    "experts": "feed-forward of the experts",
    "combine": "weighted sums of the experts' outputs",
    "shared_expert": "shared expert",
    "unembedding_loss": "logits and cross-entropy",
    "balance": "router losses",
    "optimizer": "norm of the gradients, clipping, Adam, balance rules outside the loss",
}
OTHER, ELSEWHERE = "other", "other programs"  # no scope; not the step: evaluation, for example
PASSES = ("forward", "recomputed", "backward")
_NAME = re.compile(r'\bop_name="([^"]*)"')
_WORD = re.compile(rf"(?<![\w])({'|'.join(SCOPES)})(?![\w])")
MOST_BYTES = 2_000_000_000  # of a trace


@dataclasses.dataclass(frozen=True)
class Row:
    """The seconds of one scope in a step, as a mean over steps and devices."""

    scope: str
    seconds: float
    share: float
    forward: float
    recomputed: float
    backward: float


@dataclasses.dataclass(frozen=True)
class Event:
    """An instruction that a thread or stream executed, in nanoseconds."""

    start: float
    end: float
    name: str
    module: str  # "" if the trace does not say it


def summary(workdir: pathlib.Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a run's profile, the largest first, and the facts of its profile.json.

    Raises: ValueError if the run has no profile, or a damaged one.
    """
    folder = workdir / profiling.FOLDER
    if not (folder / profiling.FACTS).is_file():
        raise ValueError(
            f'{folder} is no profile; run with --config.profile.steps="(5,7)", or to the last of '
            "these steps"
        )
    untrusted.check_folder(folder)
    facts = strict_json.read_object(folder / profiling.FACTS)
    match facts:
        case {
            "steps": [int() as first, int() as last],
            "seconds_per_step": int() | float(),
            "device": str(),
            "devices": int() as devices,
            "memory_of_step": dict(),
            "memory_of_device": dict(),
        } if devices > 0 <= last - first:
            number = last - first + 1
        case _:
            raise ValueError(f"{folder / profiling.FACTS} is not as a run writes it")
    traces = sorted(folder.glob("plugins/profile/*/*.xplane.pb"))
    if not traces or traces[-1].stat().st_size > MOST_BYTES:
        raise ValueError(f"{folder} has no trace, *.xplane.pb, of at most {MOST_BYTES:,} bytes")
    text = (folder / profiling.HLO).read_text(encoding="utf-8")
    module = text.split(maxsplit=1)[1].split(",")[0] if text.startswith("HloModule ") else ""
    names = op_names(text)
    seconds: dict[tuple[str, str], float] = collections.defaultdict(float)
    for events in lines(jax.profiler.ProfileData.from_file(str(traces[-1]))):
        for event, own in self_times(events):
            name = names.get(event.name) if event.module in ("", module) else None
            seconds[place(name)] += own / 1e9 / number / devices
    return rows(seconds), facts


def op_names(text: str) -> dict[str, str]:
    """The name in the program of each instruction of a compiled step: that of its `metadata`, or
    for a fusion without one the longest of those of its instructions."""
    computations, _ = hlo_text.parse(text)
    own, called = {}, {}
    inside: dict[str, list[str]] = collections.defaultdict(list)
    for computation, instructions in computations.items():
        for i in instructions:
            found = _NAME.search(i.rest)
            own[i.name] = found[1] if found else ""
            called[i.name] = i.called if i.operation == "fusion" else []
            inside[computation].append(own[i.name])
    return {
        name: given or max(itertools.chain(*(inside[c] for c in called[name])), key=len, default="")
        for name, given in own.items()
    }


def place(name: str | None) -> tuple[str, str]:
    """The scope and the pass of an instruction's name; None stands for another program's."""
    if name is None:
        return ELSEWHERE, "forward"
    found = _WORD.findall(name)
    kind = "backward" if "transpose(" in name else "forward"
    return (found[-1] if found else OTHER), "recomputed" if "rematted" in name else kind


def lines(profile: Any) -> Iterable[list[Event]]:
    """The instructions of each thread or stream: those of a device's line "XLA Ops" if it has one,
    otherwise all events that name an instruction."""
    for plane in profile.planes:
        found = list(plane.lines)
        whole = [line for line in found if line.name == "XLA Ops"]
        for line in whole or found:
            events = []
            for event in line.events:
                stats = {
                    key: value for key, value in event.stats if key in ("hlo_op", "hlo_module")
                }
                if whole or "hlo_op" in stats:
                    name = stats.get("hlo_op") or event.name.split(" = ")[0].lstrip("%")
                    module = stats.get("hlo_module", "")
                    end = event.start_ns + event.duration_ns
                    events.append(Event(event.start_ns, end, name, module))
            yield events


def self_times(events: Iterable[Event]) -> Iterable[tuple[Event, float]]:
    """Each event with its time less that of the events inside it, such as a loop's body."""
    own: dict[int, float] = {}
    ordered = sorted(events, key=lambda event: (event.start, -event.end))
    around: list[int] = []
    for i, event in enumerate(ordered):
        while around and ordered[around[-1]].end <= event.start:
            around.pop()
        own[i] = event.end - event.start
        if around:
            own[around[-1]] -= own[i]
        around.append(i)
    return [(event, max(own[i], 0.0)) for i, event in enumerate(ordered)]


def rows(seconds: dict[tuple[str, str], float]) -> list[Row]:
    total = max(sum(seconds.values()), 1e-12)
    found = []
    for scope in {scope for scope, _ in seconds}:
        passes = {kind: seconds.get((scope, kind), 0.0) for kind in PASSES}
        whole = sum(passes.values())
        found.append(Row(scope, whole, whole / total, **passes))
    return sorted(found, key=lambda row: (row.scope in (OTHER, ELSEWHERE), -row.seconds, row.scope))
