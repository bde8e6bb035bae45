"""The figures of a report, each a function from plain records to a matplotlib Figure.

The colours are Okabe & Ito's, which people with colour blindness can tell apart; line styles and
markers differ too, so figures are also readable in greyscale. A figure is None if the records lack
its data.
"""

import dataclasses
import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax import untrusted
from moe_jax.analysis import measures

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)), ":")
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.dpi": 110,
    "font.size": 10,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 110,
    "text.parse_math": False,  # a "$" in the label of a text or in the name of a run is a "$"
}
MOST_LABELS = 100  # lines of a figure; the hardest texts are shown
LEVEL = {"color": "#555555", "linewidth": 1, "linestyle": (0, (1, 1))}  # a dotted horizontal line


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run: its config, result.json and metrics.jsonl rows."""

    name: str
    place: int  # its index among all runs, so that its colour does not change when others finish
    config: dict
    result: dict
    rows: list[dict]

    @property
    def look(self) -> dict[str, Any]:
        """The colour, marker and dashes of its curves, which are the same in all figures."""
        looks = {"color": COLOURS, "marker": MARKERS, "linestyle": DASHES}
        return {key: values[self.place % len(values)] for key, values in looks.items()}

    @property
    def is_sparse(self) -> bool:
        return self.result["tokens_per_expert"] is not None

    @property
    def training_rows(self) -> list[dict]:
        return [row for row in self.rows if "loss" in row]

    @property
    def validation_rows(self) -> list[dict]:
        return [row for row in self.rows if "validation" in row]


def draw(records: list[Record]) -> dict[str, bytes]:
    """All figures that are not None for these records, as PNG files by name."""
    images = {}
    with matplotlib.rc_context(STYLE):
        for name, figure_of in FIGURES.items():
            if figure := figure_of(records):
                png = io.BytesIO()
                figure.savefig(png, format="png")
                images[name] = png.getvalue()
    return images


def _figure(columns: int, height: float = 4.2, width: float = 10.0):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def loss(records: list[Record]) -> Figure:
    """Training and held-out loss of each arm over tokens, with its parents' loss as a level."""
    figure, (left, right) = _figure(2)
    arms = _arms(records)
    for record in arms:
        rows = record.training_rows
        smooth = _smooth([row["loss"] for row in rows])
        look = {**record.look, "marker": None}
        left.plot([r["tokens"] / 1e6 for r in rows], smooth, label=record.name, **look)
        rows = record.validation_rows
        bits = [row["validation"]["bits_per_byte"] for row in rows]
        right.plot([r["tokens"] / 1e6 for r in rows], bits, label=record.name, **record.look)
    for parent in [record for record in records if record not in arms]:
        label = f"{parent.name} ({parent.result['tokens'] / 1e6:.2f} M tokens)"
        left.axhline(np.mean([row["loss"] for row in parent.training_rows[-20:]]), **LEVEL)
        # On the same sample of the held-out text as the curves; the result is on all of it.
        level = parent.validation_rows[-1]["validation"]["bits_per_byte"]
        right.axhline(level, label=label, **LEVEL)
    # Including the untrained model's loss would compress all other values.
    trained = [row for r in arms for row in r.validation_rows if row["step"]]
    right.set_ylim(top=1.05 * max(row["validation"]["bits_per_byte"] for row in trained))
    xlabel = "million tokens" if arms == records else "million tokens after the parent"
    left.set(title="Training loss (smoothed)", ylabel="nats per token", xlabel=xlabel)
    right.set(title="Held-out text", ylabel="bits per byte", xlabel=xlabel)
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    return figure


def languages(records: list[Record]) -> Figure:
    """Final bits per byte, one line per language and one marker per run."""
    values = {
        record.name: {
            label: losses
            for label, losses in record.result["per_language"].items()
            if losses["bits_per_byte"] is not None  # null if its documents are empty
        }
        for record in records
    }
    labels = sorted(
        set.intersection(*(set(v) for v in values.values())),
        key=lambda label: np.mean([v[label]["bits_per_byte"] for v in values.values()]),
    )[-MOST_LABELS:]
    figure, (axes,) = _figure(1, height=1.4 + 0.28 * len(labels))
    for record in records:
        bits = [values[record.name][label]["bits_per_byte"] for label in labels]
        look = {**record.look, "linestyle": "none"}
        axes.plot(bits, range(len(labels)), label=record.name, markersize=7, alpha=0.9, **look)
    axes.set_yticks(range(len(labels)), map(untrusted.label, labels))
    axes.set_xlabel("bits per byte on held-out text (lower is better)")
    axes.legend(ncols=len(records), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def expert_load(records: list[Record]) -> Figure | None:
    """Each expert's fraction of the assignments in each layer, on the held-out text."""
    arms = [record for record in records if record.is_sparse]
    if not arms:
        return None
    loads = [100 * np.array(record.result["tokens_per_expert"]) for record in arms]
    L, E = loads[0].shape
    figure, all_axes = _figure(len(arms), height=1.6 + 0.45 * L, width=max(10.0, 2.6 * len(arms)))
    top = max(load.max() for load in loads)
    for record, load, axes in zip(arms, loads, all_axes, strict=True):
        image = axes.imshow(load, cmap="cividis", vmin=0, vmax=top, aspect="auto")
        axes.set(title=record.name, xlabel="expert")
        axes.set_xticks(range(E) if E <= 16 else range(0, E, E // 8))
        axes.set_yticks(range(L) if L <= 16 else range(0, L, L // 8))
        axes.grid(False)
        for (layer, expert), share in np.ndenumerate(load) if E <= 8 else ():
            look = {"color": "black" if share > 0.6 * top else "white", "size": 8}
            axes.text(expert, layer, f"{share:.0f}", ha="center", va="center", **look)
    all_axes[0].set_ylabel("sparse layer")
    label = f"% of assignments (even: {100 / E:.1f})"
    figure.colorbar(image, ax=all_axes, fraction=0.03, label=label)
    return figure


def router_health(records: list[Record]) -> Figure | None:
    """Load balance of the routers over training: the mean and the worst layer."""
    arms = [record for record in records if record.is_sparse]
    if not arms:
        return None
    panels = {name: m.panel for name, m in measures.MEASURES.items() if m.panel}
    width = 11.0 * max(1, len(panels) / 3)
    figure, all_axes = _figure(len(panels), height=3.6, width=width)
    for (name, panel), axes in zip(panels.items(), all_axes, strict=True):
        for record in arms:
            rows = [r for r in record.validation_rows if r["step"] and name in r["router"]]
            values = [panel.reduce(row["router"][name]) for row in rows]
            tokens = [row["tokens"] / 1e6 for row in rows]
            axes.plot(tokens, values, label=record.name, markersize=5, **record.look)
        axes.set(title=panel.title, ylabel=panel.label, xlabel="million tokens as MoE")
        axes.set_ylim(0, 1.08 * max(axes.get_ylim()[1], 1))
    if num_experts := arms[0].config["model"]["num_experts"]:
        all_axes[0].axhline(num_experts, **LEVEL)
    all_axes[0].legend(loc="lower right")
    return figure


def experts_by_layer(records: list[Record]) -> Figure | None:
    """Effective experts, their similarity, and router drift in each layer at the end of a run."""
    arms = [r for r in records if r.is_sparse and r.result.get("expert_similarity")]
    if not arms:
        return None
    figure, (left, middle, right) = _figure(3, height=3.8, width=11.0)
    for axes, key, title, label in (
        (left, "effective_experts", "Effective experts on held-out text", "exp(entropy of load)"),
        (
            middle,
            "expert_similarity",
            "Similarity of experts",
            "cosine, mean of pairs and matrices",
        ),
        (right, "router_drift", "Drift of the router", "|end − start| / |start|"),
    ):
        for record in arms:
            values = record.result[key]
            axes.plot(range(len(values)), values, label=record.name, **record.look)
        axes.set(title=title, ylabel=label, xlabel="sparse layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if num_experts := max(r.config["model"]["num_experts"] or 0 for r in arms):
        left.axhline(num_experts, **LEVEL)
    left.set_ylim(0, 1.08 * left.get_ylim()[1])
    middle.set_ylim(min(0, middle.get_ylim()[0]) - 0.05, 1.05)
    right.set_ylim(0, 1.08 * right.get_ylim()[1])
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    return figure


def training_flops(records: list[Record]) -> Figure:
    """The training cost of each run, without and with its dense parent's."""
    figure, (axes,) = _figure(1, height=1.2 + 0.42 * len(records))
    own = np.array([record.result["training_flops"] for record in records]) / 1e12
    parent = np.array([record.result["parent_training_flops"] for record in records]) / 1e12
    places = np.arange(len(records))
    axes.barh(places, own, color=COLOURS[0], label="this run")
    axes.barh(places, parent, left=own, color=COLOURS[1], hatch="//", label="its dense parent")
    for place, (a, b) in enumerate(zip(own, parent, strict=True)):
        text = f" {a:.3g}" + (f" + {b:.3g} = {a + b:.3g}" if b else "")
        axes.text(a + b, place, text, va="center")
    axes.set_yticks(places, [record.name for record in records])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("training TFLOP (model FLOPs: active parameters, causal attention)")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower center", ncols=2, bbox_to_anchor=(0.5, 1.0))
    return figure


FIGURES = {
    "loss": loss,
    "languages": languages,
    "expert_load": expert_load,
    "router_health": router_health,
    "experts_by_layer": experts_by_layer,
    "training_flops": training_flops,
}


def _arms(records: list[Record]) -> list[Record]:
    """The sparse runs and those that start from another run, or all runs if there are none."""
    return [r for r in records if r.is_sparse or r.config["init"]["source"]] or records


def _smooth(values: list[float]) -> np.ndarray:
    """A centred running mean over at most a tenth of the points; None is a missing value."""
    all_values = np.array(values, np.float64)
    half = max(1, len(values) // 20)
    windows = (all_values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array([np.nanmean(window) for window in windows])
