"""Measures generated texts by the table of metrics: for all texts and by label, with intervals."""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from moe_jax import spelling, untrusted
from moe_jax.data import sources
from moe_jax.data.cache import DATASETS, cache_folder
from moe_jax.data.document import TRAIN
from moe_jax.evaluation import comparison, judge, likelihood
from moe_jax.evaluation.samples import Sample
from moe_jax.evaluation.subject import Subject
from moe_jax.evaluation.text_metrics import METRICS, Metric, Tools

EXTRA = "pip install 'moe_jax[evaluation]'"


@dataclasses.dataclass(frozen=True)
class Value:
    """texts: the number of texts for which the metric is defined; None if it is of the whole set.
    interval: 95 %, by a bootstrap over texts; None if fewer than 20 texts define it."""

    value: float
    interval: tuple[float, float] | None
    texts: int | None


def choose(names: Sequence[str], given: Container[str]) -> dict[str, str]:
    """For each metric "" if it can be measured, or the reason why it cannot.

    Args:
      names: the metrics that are wanted; an empty sequence wants all that can be measured.
      given: the fields of `Tools` that are given.

    Raises: ValueError for a name that is not in the table, or a wanted metric that lacks something.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(spelling.unknown("--metrics", name, METRICS))
    reasons = {name: _missing(METRICS[name], given) for name in names or METRICS}
    for name, reason in reasons.items():
        if names and reason:
            raise ValueError(f"--metrics={name} {reason}")
    return reasons


def _missing(metric: Metric, given: Container[str]) -> str:
    if metric.needs and metric.needs not in given:
        return f"needs --{metric.needs}"
    if metric.package and importlib.util.find_spec(metric.package) is None:
        return f"needs {metric.package}, which is not installed; run {EXTRA}"
    return ""


def measure(
    samples: Sequence[Sample], names: Iterable[str], tools: Tools
) -> dict[str, dict[str, Value]]:
    """The metrics of all samples together, under "", and of each label if there are several."""
    labels = sorted({sample.label for sample in samples})
    groups = {"": list(range(len(samples)))}
    for label in labels if len(labels) > 1 else ():
        groups[label] = [i for i, sample in enumerate(samples) if sample.label == label]
    found: dict[str, dict[str, Value]] = {label: {} for label in groups}
    for name in names:
        metric = METRICS[name]
        rows_K2 = None if metric.whole else metric.measure(samples, tools)
        for label, members in groups.items():
            if rows_K2 is None:
                rows = metric.measure([samples[i] for i in members], tools)
            else:
                rows = rows_K2[members]
            found[label][name] = _value(metric, rows, tools.seed)
    return found


def _value(metric: Metric, rows_R2: np.ndarray, seed: int) -> Value:
    """The ratio of sums, with a percentile bootstrap over rows (Efron 1979)."""
    defined_R2 = rows_R2[rows_R2[:, 1] > 0]
    R = len(defined_R2)
    texts = None if metric.whole else R
    if not R:
        return Value(math.nan, None, texts)
    ratio = functools.partial(_ratio, metric)
    if R < comparison.FEWEST:
        return Value(ratio(defined_R2), None, texts)
    drawn = [metric.show(n / d) for n, d in comparison.means(defined_R2, seed).tolist()]
    low, high = comparison.middle(drawn)
    return Value(ratio(defined_R2), (low, high), texts)


def _ratio(metric: Metric, rows_R2: np.ndarray) -> float:
    numerator, denominator = rows_R2.sum(axis=0).tolist()
    return metric.show(numerator / denominator)


def tools(
    given: Mapping[str, str],
    load: Callable[[str], Subject],
    *,
    templates: Sequence[str] = judge.TEMPLATES,
    scale: tuple[float, float] = judge.SCALE,
    seed: int = 0,
) -> Tools:
    """The tools of the given models and training text; one model is in memory at a time.

    Args:
      given: the models' names and the text's source, by field of `Tools`.
      load: returns the model of a name.
    """
    in_memory: dict[str, Subject] = {}

    def loaded(name: str) -> Subject:
        if name not in in_memory:
            in_memory.clear()
            in_memory[name] = load(name)
        return in_memory[name]

    def score(who: str) -> likelihood.Score | None:
        name = given.get(who)
        return likelihood.under(lambda: loaded(name)) if name else None

    judging, text = given.get("judge"), given.get("training_text")
    ask = judge.asking(lambda: loaded(judging)) if judging else None
    return Tools(
        checkpoint=score("checkpoint"),
        second=score("second"),
        judge=judge.Judge(ask, templates, scale) if ask else None,
        training_text=functools.partial(_training_text, text) if text else None,
        seed=seed,
    )


def _training_text(source: str) -> Iterator[str]:
    how: dict[str, Any] = {"validation_fraction": 0.0, "data_dir": cache_folder("") / DATASETS}
    documents = sources.texts("--training_text", source, TRAIN, **how)
    name = f"reading {source}"
    return (d.text for d in tqdm.tqdm(documents, name, unit=" documents", disable=None))


def report(samples: Sequence[Sample], reasons: Mapping[str, str], tools: Tools) -> dict:
    """`measure` as plain values. Args: reasons: the result of `choose`."""
    found = measure(samples, [name for name, reason in reasons.items() if not reason], tools)
    everything, *labels = (
        {
            "texts": sum(label in ("", sample.label) for sample in samples),
            "metrics": {name: dataclasses.asdict(value) for name, value in values.items()},
        }
        for label, values in found.items()
    )
    return {
        **everything,
        "labels": dict(zip(list(found)[1:], labels, strict=True)),
        "not_measured": {name: reason for name, reason in reasons.items() if reason},
    }


ROW = "{:22} {:>10} {:>21} {:>8}  {}"


def text(report: dict) -> str:
    """The report as a table: a line for each metric, and below it one for each label."""
    lines = [ROW.format("metric", "value", "95 %", "texts", "better")]
    for name, entry in report["metrics"].items():
        lines.append(_line(name, entry, METRICS[name].better))
        for label, part in report["labels"].items():
            lines.append(_line(f"  {untrusted.label(label)}", part["metrics"][name], ""))
    missing = [f"{name:22} {reason}" for name, reason in report["not_measured"].items()]
    return "\n".join(lines + missing)


def _line(name: str, entry: dict, better: str) -> str:
    interval = entry["interval"]
    shown = "" if interval is None else "{:.4g} – {:.4g}".format(*interval)
    value = "undefined" if math.isnan(entry["value"]) else f"{entry['value']:.4g}"
    texts = "" if entry["texts"] is None else f"{entry['texts']:,}"
    return ROW.format(name, value, shown, texts, better).rstrip()
