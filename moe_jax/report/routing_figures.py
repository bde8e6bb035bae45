"""Figures of routing and languages, each a function from plain arrays to a matplotlib Figure.

They are narrow, so that text stays legible in a column of 400 pixels, and panels stand below each
other. Colours are those of `figures`; where there are more families than colours, markers and
hatches tell them apart.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import lines, patches, ticker
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from scipy.cluster import hierarchy

from moe_jax import files, untrusted
from moe_jax.report import records, style

STYLE: dict[Any, Any] = style.STYLE | {"figure.constrained_layout.use": True, "savefig.dpi": 160}
WIDTH = 5.0  # inches: 9.5 points are 10 pixels or more in a figure shown 400 pixels wide
ROW = 0.155  # inches for a row with a label
LEVEL: dict[str, Any] = style.LEVEL
MOST_ON_A_LINEAR_AXIS = 8  # powers of two are too few ticks for ratios near 1
ALONE = {"color": "#999999", "marker": ".", "hatch": ""}  # families of one language
MOST_FAMILIES = 14  # with a look of their own
# Where a label of a point may go, nearest first: factors of its width and height.
PLACES = ((0, 1), (0, -1), (1, 0), (-1, 0), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def styled(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def save(figure: Figure, path: str | pathlib.Path) -> None:
    """Writes `path`.png and `path`.svg; equal figures give equal bytes."""
    formats: dict[str, dict] = {"png": {}, "svg": {"Date": None}}
    for suffix, metadata in formats.items():
        whole = pathlib.Path(path).with_name(f"{pathlib.Path(path).name}.{suffix}")
        with matplotlib.rc_context(STYLE), files.whole_file(whole) as unfinished:
            figure.savefig(unfinished, format=suffix, metadata=metadata)


@_styled
def expert_share(
    share_LGE: np.ndarray, labels: Sequence[str], layers: Sequence[int], *, title: str = ""
) -> Figure:
    """Each expert's share of the assignments by label, a panel for each chosen layer.

    The dotted line is even routing (Nakamura et al., arXiv 2502.19261, figure 5). Up to 16 experts
    and 7 labels are bars; otherwise a heatmap has a row for each label.
    """
    L, G, E = share_LGE.shape
    if G > len(records.COLOURS) or E > 16:
        return _share_heatmaps(share_LGE, labels, layers, title)
    figure = Figure(figsize=(WIDTH, 0.9 + 1.35 * L))
    all_axes = figure.subplots(L, 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    width = 0.8 / G
    for axes, layer, share_GE in zip(all_axes, layers, share_LGE, strict=True):
        for g, share_E in enumerate(share_GE):
            place_E = np.arange(E) + (g - (G - 1) / 2) * width
            look = {"color": records.COLOURS[g], "label": untrusted.label(labels[g])}
            axes.bar(place_E, 100 * share_E, width, **look)
        axes.axhline(100 / E, **LEVEL)
        axes.set_title(f"layer {layer}")
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    all_axes[-1].set_xticks(range(E))
    all_axes[-1].set_xlabel(f"expert (dotted: even, {100 / E:.1f} %)")
    figure.supylabel("% of the label's assignments", fontsize=9.5)
    _legend_above(figure, all_axes[0], title)
    return figure


def _share_heatmaps(share_LGE, labels, layers, title) -> Figure:
    L, G, E = share_LGE.shape
    figure = Figure(figsize=(WIDTH, 1.0 + L * (0.35 + ROW * G)))
    all_axes = figure.subplots(L, 1, squeeze=False, sharex=True)[:, 0]
    for axes, layer, share_GE in zip(all_axes, layers, share_LGE, strict=True):
        image = _heat(axes, share_GE * E, vmax=_top(share_LGE * E))
        axes.set_yticks(range(G), map(untrusted.label, labels))
        axes.set_title(f"layer {layer}")
    all_axes[-1].set_xlabel("expert")
    _bar_below(figure, image, all_axes, "share of the assignments, in units of an even share")
    figure.suptitle(title, fontsize=10)
    return figure


@_styled
def saturation(
    steps_K: Sequence[float],
    panels: Mapping[str, np.ndarray],
    layers: Sequence[int],
    *,
    chance: Mapping[str, float],
    xlabel: str = "training step",
) -> Figure:
    """Router saturation over checkpoints, a panel for each kind ("top-1", "top-8"), a line for each
    layer. panels: values [K, L] by kind. chance: the random level k/E by kind, dotted."""
    figure = Figure(figsize=(WIDTH, 0.8 + 2.2 * len(panels)))
    all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (kind, value_KL) in zip(all_axes, panels.items(), strict=True):
        for i, layer in enumerate(layers):
            look = _look_of_depth(i, len(layers))
            axes.plot(steps_K, 100 * value_KL[:, i], label=f"layer {layer}", **look)
        axes.axhline(100 * chance[kind], **LEVEL)
        axes.set(title=f"{kind} (dotted: random, {100 * chance[kind]:.1f} %)", ylim=(0, 103))
        axes.set_ylabel("% of final experts")
    all_axes[-1].set_xlabel(xlabel)
    all_axes[-1].xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    _legend_above(figure, all_axes[0], "")
    return figure


@_styled
def coactivation(
    matrices: Sequence[np.ndarray],
    orders: Sequence[np.ndarray],
    layers: Sequence[int],
    *,
    chance: float,
) -> Figure:
    """Co-activation N_ij / N_i of chosen experts, a heatmap for each chosen layer.

    orders: the experts that are shown, such as `routing.most_coactive` gives. The diagonal, which
    is 1 by definition, is left grey. chance: the base line (k - 1)/(E - 1), marked on the colours.
    """
    shown = [m[np.ix_(order, order)] for m, order in zip(matrices, orders, strict=True)]
    off = [np.where(np.eye(len(m)) > 0, np.nan, 100 * m) for m in shown]
    top = max(100 * chance, *(float(np.nanmax(m)) for m in off))
    figure = Figure(figsize=(WIDTH, 0.9 + 4.1 * len(off)))
    all_axes = figure.subplots(len(off), 1, squeeze=False)[:, 0]
    for axes, matrix, order, layer in zip(all_axes, off, orders, layers, strict=True):
        image = _heat(axes, matrix, vmax=top, aspect="equal")
        every = -(-len(order) // 20)
        axes.set_xticks(range(0, len(order), every), order[::every])
        axes.set_yticks(range(0, len(order), every), order[::every])
        axes.set(title=f"layer {layer}", ylabel="of the tokens of expert …", xlabel="… go also to")
    label = f"% of the expert's tokens (line: if independent, {100 * chance:.1f} %)"
    bar = _bar_below(figure, image, all_axes, label)
    for width, colour in ((3, "white"), (1, "black")):  # visible on dark and on bright colours
        bar.ax.axvline(100 * chance, linewidth=width, color=colour)
    return figure


@dataclasses.dataclass(frozen=True)
class _Families:
    """A look for each family: those with most languages first, all of one language alike."""

    looks: dict[str, dict]

    @classmethod
    def of(cls, families: Sequence[str]) -> "_Families":
        names = sorted(set(families), key=lambda name: (-families.count(name), name))
        many = [name for name in names if families.count(name) > 1][:MOST_FAMILIES]
        C = len(records.COLOURS)
        looks = {
            name: {
                "color": records.COLOURS[i % C],
                "marker": records.MARKERS[(i + i // C) % C],
                "hatch": "////" if i >= C else "",
            }
            for i, name in enumerate(many)
        }
        return cls({name: looks.get(name, ALONE) for name in names})

    def legend(self, figure: Figure, patch: Callable[[str, dict], Any]) -> None:
        own = {name: look for name, look in self.looks.items() if look is not ALONE}
        handles = [patch(untrusted.label(name), look) for name, look in own.items()]
        if len(own) < len(self.looks):
            handles.append(patch("alone in its family", ALONE))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1.2)


@_styled
def language_heatmap(
    vector_GX: np.ndarray, languages: Sequence[str], families: Sequence[str], layers: Sequence[int]
) -> Figure:
    """Each language's share of each expert, in units of an even share, sorted by family."""
    L, G = len(layers), len(languages)
    E = vector_GX.shape[1] // L
    looks = _Families.of(list(families))
    rank = {name: i for i, name in enumerate(looks.looks)}
    order = sorted(range(G), key=lambda g: (rank[families[g]], languages[g]))
    figure = Figure(figsize=(WIDTH, 1.7 + ROW * G))
    axes = figure.subplots()
    times_even = vector_GX[order] * E
    image = _heat(axes, times_even, vmax=_top(times_even), aspect="auto")
    axes.set_yticks(range(G), [untrusted.label(languages[g]) for g in order])
    axes.tick_params(axis="y", length=0, pad=11)
    for row, g in enumerate(order):
        look = looks.looks[families[g]]
        strip = patches.Rectangle(
            (-0.028, row - 0.5), 0.022, 1, transform=axes.get_yaxis_transform(), clip_on=False,
            facecolor=look["color"], hatch=look["hatch"], edgecolor="white", linewidth=0,
        )  # fmt: skip
        axes.add_patch(strip)
    for layer in range(1, L):
        axes.axvline(layer * E - 0.5, color="white", linewidth=1)
    every = max(1, -(-L // 12))
    axes.set_xticks(np.arange(0, L, every) * E + (E - 1) / 2, [str(n) for n in layers[::every]])
    axes.set_xlabel(f"layer, {E} experts in each")
    _bar_below(figure, image, [axes], "share, in units of an even share")
    looks.legend(figure, _patch)
    return figure


@_styled
def dendrogram(linkage: np.ndarray, languages: Sequence[str], families: Sequence[str]) -> Figure:
    """The tree of `languages.linkage`; the mark at a leaf shows its family."""
    G, looks = len(languages), _Families.of(list(families))
    tree = hierarchy.dendrogram(linkage, no_plot=True)
    figure = Figure(figsize=(WIDTH, 1.5 + 1.06 * ROW * G))
    axes = figure.subplots()
    for across, down in zip(tree["dcoord"], tree["icoord"], strict=True):
        axes.plot(across, down, color=LEVEL["color"], linewidth=1.1)
    ends = 10 * np.arange(G) + 5.0  # scipy's places of leaves
    right = float(np.max(tree["dcoord"]))
    for end, g in zip(ends, tree["leaves"], strict=True):
        look = {key: looks.looks[families[g]][key] for key in ("color", "marker")}
        face = "white" if looks.looks[families[g]]["hatch"] else None
        axes.plot(-0.02 * right, end, clip_on=False, markersize=5, markerfacecolor=face, **look)
    axes.set_yticks(ends, [untrusted.label(languages[g]) for g in tree["leaves"]])
    axes.tick_params(axis="y", length=0, pad=6)
    axes.set(xlim=(-0.035 * right, 1.03 * right), ylim=(10 * G, 0))
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("distance at which groups join")
    looks.legend(figure, _mark)
    return figure


@_styled
def language_map(
    position_G2: np.ndarray, languages: Sequence[str], families: Sequence[str]
) -> Figure:
    """The t-SNE map of languages by family; a label without room is left out."""
    looks = _Families.of(list(families))
    figure = Figure(figsize=(WIDTH, WIDTH + 0.5))
    axes = figure.subplots()
    for (x, y), family in zip(position_G2, families, strict=True):
        look = looks.looks[family]
        face = "white" if look["hatch"] else look["color"]
        kind = {"color": look["color"], "marker": look["marker"], "markerfacecolor": face}
        axes.plot(x, y, markersize=6, linestyle="none", **kind)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#cccccc")
    axes.margins(0.07)
    looks.legend(figure, _mark)
    figure.draw_without_rendering()  # after which the axes have their final size
    _label_points(axes, position_G2, [untrusted.label(name) for name in languages])
    return figure


def _label_points(axes: Axes, position_G2: np.ndarray, labels: Sequence[str]) -> None:
    """Puts each label at the first place beside its point that is free, or leaves it out."""
    point_G2 = axes.transData.transform(position_G2)
    # matplotlib declares that axes may be in no figure, or in a part of one that has no dpi.
    pixel = axes.get_figure().dpi / 72  # type: ignore[union-attr]
    size, mark = 8.5, 4.0 * pixel
    taken = [(x - mark, y - mark, x + mark, y + mark) for x, y in point_G2]
    frame = axes.get_window_extent()
    for (x, y), position, label in zip(point_G2, position_G2, labels, strict=True):
        width, height = 0.62 * size * pixel * len(label), 1.1 * size * pixel
        for right, up in PLACES:
            cx, cy = x + right * (width / 2 + 1.3 * mark), y + up * (height / 2 + 1.1 * mark)
            box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            inside = frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1]
            if inside and box[3] < frame.y1 and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                offset = ((cx - x) / pixel, (cy - y) / pixel)
                look: dict[str, Any] = {"size": size, "ha": "center", "va": "center"}
                axes.annotate(label, position, offset, textcoords="offset points", **look)
                break


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@_styled
def vocabulary_specialisation(
    layers: Sequence[int],
    values: Mapping[str, Sequence[float]],
    *,
    chance: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Vocabulary specialisation by depth, a line for each kind of id; its chance level dotted."""
    figure = Figure(figsize=(WIDTH, 3.0))
    axes = figure.subplots()
    for i, (kind, value_L) in enumerate(values.items()):
        look = records.look(i)
        axes.plot(layers, 100 * np.asarray(value_L), label=kind, **look)
        if chance:
            level: dict[str, Any] = {**LEVEL, "color": look["color"], "linewidth": 1.4}
            axes.plot(layers, 100 * np.asarray(chance[kind]), **level)
    axes.set(ylim=(0, 103), ylabel="% at the id's main expert")
    _depth(axes, layers, "layer (dotted: experts drawn by load alone)" if chance else "layer")
    _legend_above(figure, axes, "")
    return figure


@_styled
def gate_ratios(layers: Sequence[int], ratios: Mapping[str, np.ndarray]) -> Figure:
    """Ratios of the router's largest probabilities by layer: the median, and the middle half of
    tokens as a band. ratios: quartiles [L, 3] by name, such as "first to second"."""
    figure = Figure(figsize=(WIDTH, 3.0))
    axes = figure.subplots()
    for i, (kind, quartile_L3) in enumerate(ratios.items()):
        low_L, median_L, high_L = np.asarray(quartile_L3).T
        look = records.look(i)
        axes.plot(layers, median_L, label=kind, **look)
        axes.fill_between(layers, low_L, high_L, color=look["color"], alpha=0.2, linewidth=0)
    if max(np.max(quartile_L3) for quartile_L3 in ratios.values()) > MOST_ON_A_LINEAR_AXIS:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(ticker.LogLocator(base=2, numticks=7))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axhline(1, **LEVEL)
    axes.set_ylabel("ratio of probabilities")
    _depth(axes, layers, "layer (dotted: no preference; band: middle half of tokens)")
    _legend_above(figure, axes, "")
    return figure


def _heat(axes: Axes, values: np.ndarray, *, vmax: float, aspect="auto"):
    colormap = matplotlib.colormaps["cividis"].with_extremes(bad="#bbbbbb")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes.imshow(values, colormap, vmin=0, vmax=vmax, aspect=aspect, interpolation="nearest")


def _top(values: np.ndarray) -> float:
    """An upper end of the colours that one extreme expert does not set."""
    return max(2.0, float(np.percentile(values, 99.5)))


def _bar_below(figure: Figure, image, all_axes, label: str) -> Colorbar:
    largest = max(axes.images[0].get_array().max() for axes in all_axes)
    bar = figure.colorbar(
        image,
        ax=list(all_axes),
        location="bottom",
        extend="max" if largest > image.norm.vmax else "neither",
        fraction=0.03,
        pad=0.02,
        aspect=30,
    )
    bar.set_label(label)
    return bar


def _legend_above(figure: Figure, axes: Axes, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) <= 16 else 2
    where: dict[str, Any] = {"loc": "outside upper center", "handlelength": 2.7}
    figure.legend(handles, labels, ncols=columns, title=title or None, **where)


def _depth(axes: Axes, layers: Sequence[int], label: str) -> None:
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(label)


def _look_of_depth(i: int, number: int) -> dict[str, Any]:
    """From dark for the first layer to light for the last, with other markers and dashes."""
    shade = matplotlib.colormaps["cividis"](0.85 * i / max(number - 1, 1))
    marks, dashes = (seq[i % len(seq)] for seq in (records.MARKERS, records.DASHES))
    return {"color": shade, "marker": marks, "linestyle": dashes, "markersize": 5}


def _patch(label: str, look: dict) -> patches.Patch:
    return patches.Patch(
        facecolor=look["color"], hatch=look["hatch"], edgecolor="white", linewidth=0, label=label
    )


def _mark(label: str, look: dict) -> lines.Line2D:
    face = "white" if look["hatch"] else look["color"]
    kind = {"color": look["color"], "marker": look["marker"], "markerfacecolor": face}
    return lines.Line2D([], [], linestyle="none", markersize=6, label=label, **kind)
