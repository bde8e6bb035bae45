"""The tasks that published mixtures were evaluated on, as far as lm-evaluation-harness has them."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

from moe_jax import untrusted
from moe_jax.evaluation import outcomes


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, a group or a tag of lm-evaluation-harness 0.4.13.

    shots: the number of examples before each item; None takes the task's own.
    metric: the name in the harness of the measure that is the paper's, or the nearest to it.
    """

    name: str
    shots: int | None = None
    metric: str = ""


@dataclasses.dataclass(frozen=True)
class TaskList:
    """A paper's tasks.

    source: the paper and, where the tasks' names come from it, the released code.
    missing: tasks and settings of the paper that the harness does not have.
    """

    source: str
    tasks: tuple[Task, ...]
    missing: tuple[str, ...]


TASK_LISTS = {
    "olmoe": TaskList(
        "OLMoE (arXiv 2409.02060)",
        (
            Task("mmlu", 5, "acc"),
            Task("hellaswag", 5, "acc_norm"),
            Task("arc_challenge", 5, "acc_norm"),
            Task("arc_easy", 5, "acc_norm"),
            Task("piqa", 5, "acc_norm"),
            Task("winogrande", 5, "acc"),
        ),
        (
            "OLMES (arXiv 2406.08446), the paper's setting: its chosen shots, its normalisations, "
            "and the better of two formulations of a question",
        ),
    ),
    "lola": TaskList(
        "LOLA (arXiv 2409.11272; dice-group/LOLA, lola_ws/evaluate/task_lang.json)",
        (
            Task("xcopa", None, "acc"),
            Task("xnli", None, "acc"),
            Task("xstorycloze", None, "acc"),
            Task("xwinograd", None, "acc"),
            Task("arc_multilingual", None, "acc_norm"),
            Task("hellaswag_multilingual", None, "acc_norm"),
            Task("m_mmlu", None, "acc"),
            Task("truthfulqa_multilingual", None, "acc"),
        ),
        (
            "five of the paper's 13 tasks: its released code names further suites (Mega, XTREME-R, "
            "XL-Sum, XQuAD, MLQA, MultiQ, OMGEval), but not which of them are in the paper",
        ),
    ),
    "drop_upcycling": TaskList(
        "Drop-Upcycling (arXiv 2502.19261)",
        (
            Task("openbookqa", 4, "acc"),
            Task("triviaqa", 4, "exact_match"),
            Task("hellaswag", 4, "acc"),
            Task("squadv2", 4, "exact"),
            Task("xwinograd_en", 4, "acc"),
            Task("bbh_cot_fewshot", 3, "exact_match"),
            Task("ja_leaderboard_jsquad", 4, "exact_match"),
            Task("ja_leaderboard_xlsum", 1, "rouge2"),
        ),
        (
            "JEMHopQA (4 shots, character F1)",
            "NIILC (4 shots, character F1)",
            "WMT20 en-ja (4 shots, BLEU)",
            "WMT20 ja-en (4 shots, BLEU)",
            "character F1 of JSQuAD: the harness has exact match",
        ),
    ),
}


def check_harness(what: str) -> None:
    """Raises: ValueError if `what`, such as an option, needs the harness, which is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"{what} needs lm-evaluation-harness, an optional extra of this project: "
            "pip install 'moe_jax[evaluation]'"
        )


def expand(names: Sequence[str]) -> tuple[list[Task], list[str]]:
    """The tasks of names, each a task or the name of a list, and a line for what is missing."""
    tasks: dict[str, Task] = {}
    lines = []
    for name in names:
        if name not in TASK_LISTS:
            tasks.setdefault(name, Task(name))
            continue
        found = TASK_LISTS[name]
        for task in found.tasks:
            tasks.setdefault(task.name, task)
        lines += [f"{name}, {found.source}: missing is {one}" for one in found.missing]
    return list(tasks.values()), lines


ROW = "{:32} {:>8} {:>6} {:24} {:>8} {:>8}"


def text(report: dict[str, Any]) -> str:
    """The harness's results, `harness.run`, as a table with a line for each measure."""
    lines = [
        f"{report['checkpoint']} by lm-evaluation-harness {report['harness']}",
        ROW.format("task", "items", "shots", "measure", "value", "± error"),
    ]
    for name, row in report["results"].items():
        counts = "" if row["n"] is None else row["n"], "" if row["shots"] is None else row["shots"]
        for key, value in row.items():
            measure, comma, kept = key.partition(",")
            if comma and not measure.endswith("_stderr"):
                error = row.get(f"{measure}_stderr,{kept}")
                shown = "" if error is None else f"{error:.4f}"
                is_papers = measure == row.get("papers_measure")
                measure = (measure if kept == "none" else key) + (" *" if is_papers else "")
                lines.append(
                    ROW.format(untrusted.label(name), *counts, measure, f"{value:.4f}", shown)
                )
    if any(row.get("papers_measure") for row in report["results"].values()):
        lines.append("* the paper's measure, or the nearest to it")
    if cut := report["contexts_cut"]:
        lines.append(outcomes.cut_line(cut))
    return "\n".join(lines)
