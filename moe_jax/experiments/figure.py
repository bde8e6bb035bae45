"""The figure of a study: the test loss of each group, relative to a control, with its interval."""

import io

import matplotlib
from matplotlib.figure import Figure

from moe_jax.experiments import page
from moe_jax.experiments.rows import Row
from moe_jax.experiments.study import BITS, minus
from moe_jax.report import style
from moe_jax.report.records import COLOURS

KINDS = {
    "upcycled": COLOURS[0],
    "upcycled from several parents": COLOURS[2],
    "from scratch": COLOURS[3],
    "dense": COLOURS[6],
}


def svg(one: page.Published) -> bytes:
    """The groups that no other starts from, as SVG, the lowest loss first: dots are the differences
    of single seeds, bars the 95 % interval of their mean. Equal rows give equal bytes."""
    parents = {name.rpartition("_s")[0] for row in one.rows for name in row.parents}
    control, measure, found = one.study.control, page.MEASURES[BITS], {}
    for name in one.groups.keys() - parents - {control}:
        values = page.by_seed(minus(name, control), one.groups, measure)
        if values:
            found[name] = page.statistics.paired(values), values
    ranked = sorted(found, key=lambda name: found[name][0].mean)
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(7.2, 1.2 + 0.24 * len(ranked)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, **style.LEVEL)
        for place, name in enumerate(ranked):
            colour, (mean, values) = KINDS[_kind(one.groups[name][0])], found[name]
            axes.plot(mean.interval or [mean.mean] * 2, [place] * 2, color=colour)
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.5, markersize=4)
        handles = [axes.plot([], [], "o-", color=colour)[0] for colour in KINDS.values()]
        figure.legend(handles, KINDS, loc="outside upper left", ncols=len(KINDS))
        axes.set_yticks(range(len(ranked)), ranked)
        axes.invert_yaxis()
        axes.set_xlabel(f"bits per byte on the test split, minus those of {control}, by seed")
        axes.grid(visible=False, axis="y")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _kind(row: Row) -> str:
    if row.effective_experts is None:
        return "dense"
    if len(row.parents) > 1:
        return "upcycled from several parents"
    return "upcycled" if row.parents else "from scratch"
