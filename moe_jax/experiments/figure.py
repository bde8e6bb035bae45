"""The figure of the bench: the test loss of each group, its seeds and the interval of its mean."""

import io

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moe_jax.experiments.page import Published
from moe_jax.report import comparisons, style
from moe_jax.report.records import COLOURS

KINDS = {"upcycled": COLOURS[0], "from scratch": COLOURS[3], "dense": COLOURS[6]}


def svg(one: Published) -> bytes:
    """The groups from the lowest loss to the highest, as SVG; equal rows give equal bytes."""
    ranked = sorted(
        one.groups.items(), key=lambda item: np.mean([r.test_bits_per_byte for r in item[1]])
    )
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.24 * len(ranked)), layout="constrained")
        axes = figure.subplots()
        for place, (_, own) in enumerate(ranked):
            colour = KINDS[_kind(own[0])]
            values = [row.test_bits_per_byte for row in own]
            half = comparisons.spread(values) or 0.0
            mean = float(np.mean(values))
            axes.plot([mean - half, mean + half], [place, place], color=colour, linewidth=1.4)
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.45, markersize=4)
            axes.plot(mean, place, "|", color=colour, markersize=11, markeredgewidth=2)
        for kind, colour in KINDS.items():
            axes.plot([], [], "o", color=colour, label=kind)
        axes.set_yticks(range(len(ranked)), [name for name, _ in ranked])
        axes.invert_yaxis()
        axes.set_xlabel("bits per byte on the sealed test text (dots: seeds; line: 95 % interval)")
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower right")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _kind(row) -> str:
    if row.effective_experts is None:
        return "dense"
    return "upcycled" if row.parents else "from scratch"
