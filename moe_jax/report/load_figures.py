"""Figures of the load of experts and of the state of routers; each is None without a sparse run."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax.analysis import measures
from moe_jax.report import results, style
from moe_jax.report.records import Group, Record, front, looks
from moe_jax.report.style import LEVEL, OTHERS, WIDE, Layout

MOST_PANELS = 12  # of one run each; those with the lowest loss are shown


def expert_load(records: list[Record], layout: Layout = WIDE) -> Figure | None:
    """Each expert's fraction of the assignments in each layer, on the held-out text."""
    arms = _sparse(records)
    if not arms:
        return None
    loads = [100 * np.array(arm.first.result["tokens_per_expert"], np.float64) for arm in arms]
    tallest = max(len(load) for load in loads)
    height = 0.9 + min(0.27 * tallest, 2.6)
    figure, all_axes = style.panels(len(arms), layout, width=2.4, height=height)
    top = max(load.max() for load in loads)
    for arm, load, axes in zip(arms, loads, all_axes, strict=True):
        L, E = load.shape
        image = axes.imshow(load, cmap="cividis", vmin=0, vmax=top, aspect="auto")
        axes.set_title(style.short(arm.name), fontsize=style.SMALLEST_TEXT)
        axes.set_xticks(range(E) if E <= 8 else range(0, E, max(1, E // 4)))
        axes.set_yticks(range(L) if L <= 8 else range(0, L, max(1, L // 4)))
        axes.grid(False)
        for (layer, expert), share in np.ndenumerate(load) if E <= 8 and L <= 8 else ():
            look = {"color": "black" if share > 0.6 * top else "white", "size": 9}
            axes.text(expert, layer, f"{share:.0f}", ha="center", va="center", **look)
    figure.supylabel("sparse layer", fontsize=10)
    even = sorted({100 / load.shape[1] for load in loads})
    shown = ", ".join(f"{share:.3g}" for share in even)
    # Not beside the colour bar, which may be too low for it.
    figure.supxlabel(f"expert (colours: % of assignments; even: {shown})", fontsize=10)
    figure.colorbar(image, ax=all_axes, fraction=0.03)
    return figure


def load_over_training(records: list[Record], layout: Layout = WIDE) -> Figure | None:
    """Each expert's share over training in the layer whose load is the least even at the end."""
    curves = {}
    for arm in _sparse(records):
        rows = [
            r for r in arm.first.validation_rows if r.get("router", {}).get("tokens_per_expert")
        ]
        if len(rows) > 1:
            load_SLE = np.array([r["router"]["tokens_per_expert"] for r in rows], np.float64)
            layer = results.least_even(load_SLE[-1])
            tokens = np.array([row["tokens"] for row in rows]) / 1e6
            curves[arm.name] = tokens, 100 * load_SLE[:, layer], layer
    if not curves:
        return None
    figure, all_axes = style.panels(len(curves), layout, width=2.4, height=2.1)
    colours = matplotlib.colormaps["cividis"]
    top = max(share_SE.max() for _, share_SE, _ in curves.values())
    for (name, (tokens, share_SE, layer)), axes in zip(curves.items(), all_axes, strict=True):
        E = share_SE.shape[1]
        for rank, expert in enumerate(np.argsort(share_SE[-1])):
            axes.plot(tokens, share_SE[:, expert], color=colours(rank / E), linewidth=1.1)
        axes.axhline(100 / E, **LEVEL)
        title = f"{style.short(name)}\nlayer {layer}"
        axes.set_title(title, fontsize=style.SMALLEST_TEXT)
        axes.set_ylim(0, 1.05 * top)
        axes.xaxis.set_major_locator(MaxNLocator(3))
    figure.supxlabel("million tokens as MoE", fontsize=10)
    figure.supylabel("% of assignments", fontsize=10)
    return figure


def drop_rates(records: list[Record], layout: Layout = WIDE) -> Figure | None:
    """Each layer's virtual drop rate over training, and its balance coefficient where these adapt.

    Both are Skywork-MoE's (Wei et al., arXiv 2406.06563, figure 4).
    """
    panels = {}
    for arm in _sparse(records):
        rates = [(r, r.get("router", {}).get("virtual_drop_rate")) for r in arm.first.rows]
        panels[f"{style.short(arm.name)}\ndrop rate, %"] = _by_layer(rates, 100)
        adaptive = [(r, r.get("load_balancing_coefficients")) for r in arm.first.training_rows]
        panels[f"{style.short(arm.name)}\ncoefficient, ‰"] = _by_layer(adaptive, 1000)
    panels = {title: curves for title, curves in panels.items() if curves is not None}
    if not panels:
        return None
    figure, all_axes = style.panels(len(panels), layout, width=2.4, height=2.1)
    colours = matplotlib.colormaps["cividis"]
    for (title, (tokens, value_SL)), axes in zip(panels.items(), all_axes, strict=True):
        L = value_SL.shape[1]
        for layer in range(L):
            colour = colours(layer / max(L - 1, 1))
            axes.plot(tokens, value_SL[:, layer], color=colour, linewidth=1.1)
        axes.set_title(title, fontsize=style.SMALLEST_TEXT)
        axes.set_ylim(0, 1.05 * max(float(value_SL.max()), 0.1))
        axes.xaxis.set_major_locator(MaxNLocator(3))
    figure.supxlabel("million tokens as MoE", fontsize=10)
    return figure


def _by_layer(rows: Sequence[tuple[dict, list | None]], scale: float):
    """(million tokens, values [S, L] times scale) of the rows that have them; None for fewer than
    two."""
    kept = [(row["tokens"] / 1e6, values) for row, values in rows if values]
    if len(kept) < 2:
        return None
    tokens, values = zip(*kept, strict=True)
    return np.array(tokens), scale * np.array(values, np.float64)


def router_health(records: list[Record], layout: Layout = WIDE) -> Figure | None:
    """Load balance of the routers over training: the mean and the worst layer."""
    arms = _sparse(records, len(records))
    if not arms:
        return None
    measured = {name: m.panel for name, m in measures.MEASURES.items() if m.panel}
    figure, all_axes = style.panels(len(measured), layout, width=3.1, height=3.0)
    known = looks(arms)
    for (name, panel), axes in zip(measured.items(), all_axes, strict=True):
        for arm in arms:
            tokens, values = _over_training(arm, name, panel.reduce)
            style.band(axes, tokens / 1e6, values, arm.name, known.get(arm.name, OTHERS))
        axes.set(title=panel.title, ylabel=panel.label, xlabel="million tokens as MoE")
        axes.set_ylim(0, 1.08 * max(axes.get_ylim()[1], 1))
    for number in {arm.first.config["model"]["num_experts"] for arm in arms} - {None}:
        all_axes[0].axhline(number, **LEVEL)
    style.limited_legend(figure, layout, all_axes[0], known)
    return figure


def _over_training(
    arm: Group, name: str, reduce: Callable[[Any], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, a measure's number [runs, points]) at the evaluations that all runs have."""
    curves = [
        {
            row["tokens"]: reduce(row["router"][name])
            for row in record.validation_rows
            if row["step"] and name in row.get("router", {})
        }
        for record in arm.records
    ]
    tokens = sorted(set.intersection(*map(set, curves)))
    values = [[points[at] for at in tokens] for points in curves]
    return np.array(tokens, np.float64), np.array(values, np.float64).reshape(len(curves), -1)


BY_LAYER = {  # key of result.json: title, label
    "effective_experts": ("Effective experts on held-out text", "exp(entropy of load)"),
    "expert_similarity": ("Similarity of experts", "mean cosine of pairs"),
    "router_drift": ("Drift of the router", "|end − start| / |start|"),
}


def experts_by_layer(records: list[Record], layout: Layout = WIDE) -> Figure | None:
    """Effective experts, their similarity, and router drift in each layer at the end of a run."""
    arms = [a for a in _sparse(records, len(records)) if a.first.result.get("expert_similarity")]
    if not arms:
        return None
    figure, all_axes = style.panels(3, layout, width=3.1, height=3.2)
    known = looks(arms)
    for (key, (title, label)), axes in zip(BY_LAYER.items(), all_axes, strict=True):
        for arm in arms:
            measured = [r.result[key] for r in arm.records if r.result.get(key)]
            values = np.array(measured, np.float64).reshape(len(measured), -1)
            layers = np.arange(values.shape[1])
            style.band(axes, layers, values, arm.name, known.get(arm.name, OTHERS))
        axes.set(title=title, ylabel=label, xlabel="sparse layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left, middle, right = all_axes
    if num_experts := max(a.first.config["model"]["num_experts"] or 0 for a in arms):
        left.axhline(num_experts, **LEVEL)
    left.set_ylim(0, 1.08 * left.get_ylim()[1])
    middle.set_ylim(min(0, middle.get_ylim()[0]) - 0.05, 1.05)
    right.set_ylim(0, 1.08 * right.get_ylim()[1])
    style.limited_legend(figure, layout, left, known)
    return figure


def _sparse(records: Sequence[Record], most: int = MOST_PANELS) -> list[Group]:
    """The sparse groups with the lowest losses, in the order of their runs."""
    return front(results.sparse(records), most)
