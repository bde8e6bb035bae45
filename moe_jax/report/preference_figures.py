"""The figure of preferences; None without a run on pairs of answers."""

from matplotlib.figure import Figure

from moe_jax.analysis import answers
from moe_jax.report import style
from moe_jax.report.records import Record, groups, looks
from moe_jax.report.style import OTHERS, WIDE, Layout


def preferences(records: list[Record], layout: Layout = WIDE) -> Figure | None:
    """The measures of held-out pairs over training, a panel for each."""
    arms = [
        arm
        for arm in groups(records)
        if any(len(arm.curve("preferences", name)[0]) > 1 for name in answers.MEASURES)
    ]
    if not arms:
        return None
    figure, all_axes = style.panels(len(answers.MEASURES), layout, width=3.1, height=2.6)
    known = looks(arms)
    for (name, measure), axes in zip(answers.MEASURES.items(), all_axes, strict=True):
        for arm in arms:
            tokens, values = arm.curve("preferences", name)
            style.band(axes, tokens / 1e6, values, arm.name, known.get(arm.name, OTHERS))
        axes.set(title=measure.title, ylabel=measure.unit, xlabel="million tokens")
    style.limited_legend(figure, layout, all_axes[0], known)
    return figure
