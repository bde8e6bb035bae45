"""The figure of preferences; None without a run on pairs of answers."""

from matplotlib.figure import Figure

from moe_jax.analysis import answers
from moe_jax.report import style
from moe_jax.report.records import Record, groups, looks
from moe_jax.report.style import OTHERS, WIDE, Layout


def preferences(records: list[Record], layout: Layout = WIDE) -> Figure | None:
    """The measures of held-out pairs over training, a panel for each."""
    curves = {}
    arms = groups(records)
    for arm in arms:
        rows = [row for row in arm.first.rows if isinstance(row.get("preferences"), dict)]
        if len(rows) > 1:
            curves[arm.name] = rows
    if not curves:
        return None
    figure, all_axes = style.panels(len(answers.MEASURES), layout, width=3.1, height=2.6)
    known = looks([arm for arm in arms if arm.name in curves])
    for (name, measure), axes in zip(answers.MEASURES.items(), all_axes, strict=True):
        for name_of_arm, rows in curves.items():
            kept = [(row["step"], row["preferences"].get(name)) for row in rows]
            points = [(at, value) for at, value in kept if isinstance(value, int | float)]
            steps, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, values, label=name_of_arm, **known.get(name_of_arm, OTHERS))
        axes.set(title=measure.title, ylabel=measure.unit, xlabel="step")
    style.limited_legend(figure, layout, all_axes[0], known)
    return figure
