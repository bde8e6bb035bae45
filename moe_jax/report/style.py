"""One style for all figures, and their files: PNG for a page at two widths, SVG for a paper.

The colours (`records.look`) are Okabe & Ito's, which people with colour blindness can tell apart;
line styles and markers differ too, so figures are also readable in greyscale.
"""

import dataclasses
import io
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from moe_jax.report.records import COLOURS

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "font.size": 9.5,
    "grid.color": "#dddddd",
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "moe_jax",
    "text.parse_math": False,  # a "$" in the label of a text or in the name of a run is a "$"
}
# A dotted line at a level.
LEVEL: dict[str, Any] = {"color": "#555555", "linewidth": 1, "linestyle": (0, (1, 1))}
# A line behind those of the runs in front.
OTHERS = {"color": "#bbbbbb", "linewidth": 0.9, "linestyle": "-", "zorder": 1, "marker": None}
FILLS = ({"color": COLOURS[0]}, {"color": COLOURS[1], "hatch": "//"})  # of bars
LONGEST_NAME = 30  # of a run in a figure
SMALLEST_TEXT = 9  # points
MOST_COLOURS = 256  # of a PNG


@dataclasses.dataclass(frozen=True)
class Layout:
    """The width of a figure in inches. At 1280 CSS pixels a page shows WIDE at 112 per inch, and at
    400 NARROW at 76, where 9 points are 9.5 pixels."""

    width: float
    dpi: int

    def columns(self, panel_width: float) -> int:
        return max(1, int(self.width / panel_width))


WIDE, NARROW = Layout(9.6, 120), Layout(4.8, 160)


@dataclasses.dataclass(frozen=True)
class Files:
    """A figure as PNG in both layouts and as SVG in the wide one."""

    wide: bytes
    narrow: bytes
    svg: bytes


def panels(number: int, layout: Layout, *, width: float, height: float):
    """A figure with a grid of panels, as many beside each other as the layout has room for.

    Args: width, height: of a panel, in inches; panels grow to fill the layout's width.
    Returns: the figure and its axes, one per panel.
    """
    columns = min(number, layout.columns(width))
    rows = -(-number // columns)
    figure = Figure(figsize=(layout.width, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[number:]:
        figure.delaxes(spare)
    return figure, axes[:number]


def band(axes, x, values: np.ndarray, label: str, look: Mapping[str, Any]) -> None:
    """The mean of the curves of a group's runs, and their range if there are several.

    Args: values: [runs, points].
    """
    if not len(x):
        return
    axes.plot(x, values.mean(axis=0), label=label, **look)
    if len(values) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        axes.fill_between(x, low, high, alpha=0.2, color=look["color"], linewidth=0)


def legend(figure: Figure, layout: Layout, handles: Sequence, labels: Iterable[str]) -> None:
    """A legend above the panels, in as many columns as its longest label leaves room for. The
    figure grows by its height."""
    labels = [short(label) for label in labels]
    if not labels:
        return
    columns = max(1, min(len(labels), int(layout.width / (0.085 * max(map(len, labels)) + 0.75))))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def limited_legend(figure: Figure, layout: Layout, axes, front: Container[str]) -> None:
    """A legend of the runs in front, and one entry for all others, from the lines of a panel."""
    handles, labels = axes.get_legend_handles_labels()
    entries = {label: h for h, label in zip(handles, labels, strict=True) if label in front}
    others = [h for h, label in zip(handles, labels, strict=True) if label not in front]
    if others:
        entries[f"{len(others)} other{'s' * (len(others) > 1)}"] = others[0]
    legend(figure, layout, list(entries.values()), entries)


def short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def files(wide: Figure, narrow: Figure) -> Files:
    """The files of a figure that was drawn in both layouts."""
    png = _png(wide, WIDE)
    wide.set_layout_engine("none")  # keeps the layout, which takes most of the time
    svg = io.BytesIO()
    wide.savefig(svg, format="svg", metadata={"Date": None})
    return Files(png, _png(narrow, NARROW), svg.getvalue())


def _png(figure: Figure, layout: Layout) -> bytes:
    """The figure in a palette, which takes a third of the bytes."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=layout.dpi)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(MOST_COLOURS).save(small, format="png", optimize=True)
    return small.getvalue()
