"""The figures of a report, each a function from records and a layout to a matplotlib Figure.

A figure is None if the records lack its data. Runs that differ only in their seeds are one line:
their mean, in a band from the lowest to the highest. A row of FIGURES has a figure's caption and
its result in words, which stands for the image where it cannot be seen.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax import untrusted
from moe_jax.report import catch_up, load_figures, preference_figures, results, style
from moe_jax.report.records import Group, Record, front, groups, looks, parents_of
from moe_jax.report.style import LEVEL, NARROW, OTHERS, WIDE, Layout

MOST_LABELS = 100  # lines of a figure; the hardest texts are shown
MOST_PANELS = 36  # of the figure of losses
UNITS = {"T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21}


def loss(records: list[Record], layout: Layout = WIDE) -> Figure | None:
    """Training and held-out loss of each arm over tokens, with its parents' loss as a level.

    With more arms than a reader can tell apart there is a panel for each, with its held-out loss in
    front of the others'.
    """
    arms = results.arms(records)
    if not any(record.rows for record in records):
        return None
    shown = {arm.name for arm in arms}
    levels = [_level(group) for group in groups(records) if group.name not in shown]
    if len(arms) > len(looks(arms)):
        return _loss_in_panels(front(arms, MOST_PANELS), levels, layout)
    figure, (left, right) = style.panels(2, layout, width=4.8, height=3.8)
    for arm in arms:
        tokens, values = arm.curve("training", "loss")
        smooth = np.array([_smooth(list(row)) for row in values])
        style.band(left, tokens / 1e6, smooth, arm.name, arm.look | {"marker": None})
        tokens, values = arm.curve("validation", "bits_per_byte")
        style.band(right, tokens / 1e6, values, arm.name, arm.look)
    for label, nats, bits in levels:
        left.axhline(nats, **LEVEL)
        right.axhline(bits, label=label, **LEVEL)
    right.set_ylim(*_limits(arms))
    xlabel = _tokens_label(arms, levels)
    left.set(title="Training loss (smoothed)", ylabel="nats per token", xlabel=xlabel)
    right.set(title="Held-out text", ylabel="bits per byte", xlabel=xlabel)
    style.legend(figure, layout, *right.get_legend_handles_labels())
    return figure


def _loss_in_panels(arms: list[Group], levels: list[tuple], layout: Layout) -> Figure:
    figure, all_axes = style.panels(len(arms), layout, width=2.4, height=1.9)
    curves = {arm.name: arm.curve("validation", "bits_per_byte") for arm in arms}
    limits = _limits(arms)
    for arm, axes in zip(arms, all_axes, strict=True):
        for name, (tokens, values) in curves.items():
            if name != arm.name and len(tokens):
                axes.plot(tokens / 1e6, values.mean(axis=0), **OTHERS)
        tokens, values = curves[arm.name]
        style.band(axes, tokens / 1e6, values, arm.name, {**style.FILLS[0], "linestyle": "-"})
        for _, _, bits in levels:
            axes.axhline(bits, **LEVEL)
        axes.set_title(style.short(arm.name), fontsize=style.SMALLEST_TEXT)
        axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(3))
    figure.supxlabel(_tokens_label(arms, levels), fontsize=10)
    figure.supylabel("bits per byte on held-out text", fontsize=10)
    return figure


def _tokens_label(arms: Sequence[Group], levels: list[tuple]) -> str:
    after = levels or any(arm.first.sources for arm in arms)
    return "million tokens after the parent" if after else "million tokens"


def _level(parent: Group) -> tuple[str, float, float]:
    """The label, training loss and held-out loss of a parent at its end."""
    label = f"{parent.name} ({parent.first.result['tokens'] / 1e6:.2f} M tokens)"
    _, nats = parent.curve("training", "loss")
    # On the same sample of the held-out text as the curves; the result is on all of it.
    _, bits = parent.curve("validation", "bits_per_byte")
    ends = nats[:, -20:], bits[:, -1:]
    last = [float(values.mean()) if values.size else np.nan for values in ends]
    return label, last[0], last[1]


def _limits(arms: Sequence[Group]) -> tuple[float | None, float | None]:
    """Limits of held-out loss that show the last two thirds of what is learned after the first
    evaluation, and each end: a run from scratch would compress all other curves, and so would the
    parents of others, such as those that specialise in a part of the text."""
    records = [record for arm in arms for record in arm.records]
    parents = {parent.name for record in records for parent in parents_of(record, records)}
    shown = [arm for arm in arms if arm.first.name not in parents] or arms
    curves = [arm.curve("validation", "bits_per_byte") for arm in shown]
    trained = [values[:, tokens > 0] for tokens, values in curves]
    every = np.concatenate([values.ravel() for values in trained])
    every = every[np.isfinite(every)]
    if not len(every):
        return None, None
    ends = np.concatenate([values[:, -1:].ravel() for values in trained])
    low, high = every.min(), every.max()
    enough = low + max((high - low) / 3, 1.15 * (np.nanmax(ends, initial=low) - low))
    top = enough if high > 1.2 * enough else high
    margin = 0.05 * (top - low or 1)
    return low - margin, top + margin


def loss_against_flops(records: list[Record], layout: Layout = WIDE) -> Figure | None:
    """Held-out loss, and the score if runs have one, against training FLOPs, without and with the
    parents'."""
    arms = [arm for arm in groups(records) if len(arm.curve("validation", "bits_per_byte")[0]) > 1]
    if not arms:
        return None
    most = max(results.flops_of(record) for record in records)
    unit, scale = _unit(most)
    kinds = [("validation", "bits_per_byte", "held-out bits per byte")]
    if any(len(arm.curve("score", "accuracy")[0]) for arm in arms):
        kinds.append(("score", "accuracy", "accuracy"))
    figure, all_axes = style.panels(2 * len(kinds), layout, width=4.8, height=3.6)
    known = looks(arms)
    titles = {"Of this run alone": catch_up.flops, "With its parents'": catch_up.flops_with_parents}
    rows = itertools.product(kinds, titles.items())
    for ((phase, value, label), (title, axis)), axes in zip(rows, all_axes, strict=True):
        for arm in arms:
            tokens, values = arm.curve(phase, value)
            after = tokens > 0
            x, y = axis(arm.first, tokens[after]) / scale, values[:, after]
            style.band(axes, x, y, arm.name, known.get(arm.name, OTHERS))
        if phase == "validation":
            axes.set_ylim(*_limits(arms))
        axes.set(title=title, xlabel=f"training {unit}FLOP", ylabel=label)
    style.limited_legend(figure, layout, all_axes[0], known)
    return figure


def languages(records: list[Record], layout: Layout = WIDE) -> Figure | None:
    """Final bits per byte, one line per language and one marker per run or mean of seeds."""
    arms, values = groups(records), {}
    for arm in arms:
        tables = [record.result["per_language"] for record in arm.records]
        values[arm.name] = {
            label: np.mean([table[label]["bits_per_byte"] for table in tables])
            for label in tables[0]
            # None if its documents are empty
            if all(table.get(label, {}).get("bits_per_byte") is not None for table in tables)
        }
    labels = sorted(
        set.intersection(*(set(v) for v in values.values())),
        key=lambda label: np.mean([v[label] for v in values.values()]),
    )[-MOST_LABELS:]
    if not labels:
        return None
    figure, [axes] = style.panels(1, layout, width=9.6, height=1.0 + 0.25 * len(labels))
    known = looks(arms)
    for arm in sorted(arms, key=lambda arm: arm.name in known):
        bits = [values[arm.name][label] for label in labels]
        behind = {"color": OTHERS["color"], "marker": "."}
        look = {**known.get(arm.name, behind), "linestyle": "none"}
        axes.plot(bits, range(len(labels)), label=arm.name, alpha=0.9, **look)
    axes.set_yticks(range(len(labels)), map(untrusted.label, labels))
    axes.set_xlabel("bits per byte on held-out text (lower is better)")
    style.limited_legend(figure, layout, axes, known)
    return figure


def parent_similarity(records: list[Record], layout: Layout = WIDE) -> Figure | None:
    """The experts' similarity to the dense parent and their distance from it over training."""
    arms = [arm for arm in groups(records) if len(arm.curve("layers", "parent_similarity")[0])]
    if not arms:
        return None
    figure, all_axes = style.panels(2, layout, width=4.8, height=3.4)
    known = looks(arms)
    panels = {
        "parent_similarity": ("Similarity to the parent", "cosine of weights"),
        "parent_distance": ("Distance from the parent", "in units of the parent's norm"),
    }
    for (key, (title, label)), axes in zip(panels.items(), all_axes, strict=True):
        for arm in arms:
            tokens, values = arm.curve("layers", key)
            style.band(axes, tokens / 1e6, values, arm.name, known.get(arm.name, OTHERS))
        axes.set(title=title, ylabel=label, xlabel="million tokens after the parent")
    all_axes[1].set_ylim(bottom=0)
    style.limited_legend(figure, layout, all_axes[0], known)
    return figure


def training_flops(records: list[Record], layout: Layout = WIDE) -> Figure:
    """The training cost of each run, without and with its dense parent's."""
    arms = groups(records)
    unit, scale = _unit(max(results.flops_of(record) for record in records))
    height = 0.9 + 0.3 * len(arms)
    figure, [axes] = style.panels(1, layout, width=9.6, height=height)
    own = np.array([arm.first.result["training_flops"] for arm in arms]) / scale
    parent = np.array([arm.first.result["parent_training_flops"] for arm in arms]) / scale
    places = np.arange(len(arms))
    look = style.FILLS
    axes.barh(places, own, label="this run", **look[0])
    axes.barh(places, parent, left=own, label="its parents", **look[1])
    for place, (a, b) in enumerate(zip(own, parent, strict=True)):
        axes.text(a + b, place, f" {a + b:.3g}", va="center")
    axes.set_yticks(places, [style.short(arm.name) for arm in arms])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"training {unit}FLOP (active parameters, causal attention)")
    axes.grid(axis="y", visible=False)
    style.legend(figure, layout, *axes.get_legend_handles_labels())
    return figure


def _unit(value: float) -> tuple[str, float]:
    """The prefix and the value of the largest unit that is at most this value."""
    fitting = [(name, unit) for name, unit in UNITS.items() if unit <= value]
    return fitting[-1] if fitting else ("T", 1e12)


def _smooth(values: list[float]) -> np.ndarray:
    """A centred running mean over at most a tenth of the points; None is a missing value."""
    all_values = np.array(values, np.float64)
    half = max(1, len(values) // 20)
    windows = (all_values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array(
        [np.mean(w[np.isfinite(w)]) if np.isfinite(w).any() else np.nan for w in windows]
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A figure: its title, how it is drawn, its caption, and its result in a sentence."""

    title: str
    draw: Callable[..., Figure | None]
    caption: str
    result: Callable[[list[Record]], str]


FIGURES: dict[str, Row] = {
    "loss": Row(
        "Loss",
        loss,
        "Loss against the tokens seen after the parent; losses far above all ends are off the "
        "scale. "
        "Bands: lowest to highest of the seeds. Dotted: the parent's loss in its last training "
        "steps, and its last held-out loss, on the same sample of the held-out text as the curves; "
        "the table's losses are on all of it. A run that starts at its parent's loss first gets "
        "worse: its learning rate warms up again, and Adam's moments start at zero.",
        results.of_loss,
    ),
    "loss_against_flops": Row(
        "Loss against compute",
        loss_against_flops,
        "The same held-out loss against training FLOPs, and accuracy if the runs measure it. Left: "
        "of a run alone, which is the cost if "
        "the parent exists already. Right: with its parents', which is the cost from nothing.",
        results.of_loss_against_flops,
    ),
    "languages": Row(
        "Languages",
        languages,
        "Final held-out bits per byte by label of the text. Bytes are not comparable between "
        "scripts (a Cyrillic letter has two, a CJK character three): compare runs within one line.",
        results.of_languages,
    ),
    "expert_load": Row(
        "Load of the experts",
        load_figures.expert_load,
        "Where the routers send held-out tokens: each row of a panel sums to 100 %. At most "
        f"{load_figures.MOST_PANELS} runs, with the lowest losses; of several seeds, the first.",
        results.of_expert_load,
    ),
    "load_over_training": Row(
        "Load over training",
        load_figures.load_over_training,
        "The share of each expert on held-out text during training, in the layer whose load is the "
        "least even at the end; bright: the largest share at the end; dotted: an even load.",
        results.of_load_over_training,
    ),
    "drop_rates": Row(
        "Drop rates and balance coefficients",
        load_figures.drop_rates,
        "The share of assignments that capacity_factor would drop if the batch were one group, and "
        "the adaptive coefficient of the balance loss, for each layer over training; dark: the "
        "first layer, bright: the last.",
        results.of_drop_rates,
    ),
    "router_health": Row(
        "Health of the routers",
        load_figures.router_health,
        "Evenness of the load on held-out text during training; bands: lowest to highest of the "
        "seeds.",
        results.of_router_health,
    ),
    "preferences": Row(
        "Preferences",
        preference_figures.preferences,
        "Held-out pairs of answers during training; bands: lowest to highest of the seeds. The "
        "distance is half the mean squared log-ratio of the answers' tokens.",
        results.of_preferences,
    ),
    "experts_by_layer": Row(
        "Experts by layer",
        load_figures.experts_by_layer,
        "At the end of training. Effective experts: the effective number in each layer (dotted: "
        "all, evenly). Similarity: of their weights, entry by entry, the mean of all pairs of "
        "experts and of their matrices: 1 for copies, 0 for random ones and for copies with their "
        "neurons in a different order. Drift: the distance of the "
        "routers' weights from their initial values. Bands: lowest to highest of the seeds.",
        results.of_experts_by_layer,
    ),
    "parent_similarity": Row(
        "Similarity to the dense parent",
        parent_similarity,
        "Weights of the experts against the feed-forward of the parent in the same layer, place "
        "by place: the mean over experts, matrices and sparse layers. Experts whose neurons are in "
        "another order count as unlike.",
        results.of_parent_similarity,
    ),
    "training_flops": Row(
        "Training FLOPs",
        training_flops,
        "The cost of each run, without and with that of its parents.",
        results.of_training_flops,
    ),
}


def draw(records: list[Record]) -> dict[str, style.Files]:
    """All figures that are not None for these records, as files by name."""
    images = {}
    with matplotlib.rc_context(style.STYLE):
        for name, row in FIGURES.items():
            wide, narrow = row.draw(records, WIDE), row.draw(records, NARROW)
            if wide and narrow:
                images[name] = style.files(wide, narrow)
    return images
