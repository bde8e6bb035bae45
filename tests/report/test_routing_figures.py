"""Figures of routing and languages: legible in 400 pixels, without overlap, and reproducible."""

import itertools
import re

import matplotlib.text
import numpy as np
import pytest

from moe_jax.analysis import language_families, languages, routing
from moe_jax.report import records, routing_figures

CODES = list(language_families.FAMILIES)
FAMILIES = list(language_families.FAMILIES.values())
L, E = 3, 8
LAYERS = range(L)
RNG = np.random.default_rng(0)
VECTOR_GX = languages.vectors(RNG.multinomial(500, [1 / E] * E, (L, len(CODES))))
SHARE_LGE = RNG.dirichlet(np.ones(E), (L, 5))
PAIRS_EE = np.triu(RNG.integers(1, 50, (40, 40)), 1) + 100 * np.eye(40, dtype=int)
COACTIVATION_EE = routing.coactivation(PAIRS_EE + PAIRS_EE.T)
QUARTILE_L3 = np.array([[1.2, 2, 5], [2, 3, 9], [1.5, 9, 80]])
NAMES = ["C4", "English Wikipedia", "Japanese mC4", "Japanese Wikipedia", "The $tack"]

FIGURES = {
    "share of few labels": lambda: routing_figures.expert_share(
        SHARE_LGE, NAMES, LAYERS, title="a model"
    ),
    "share of many labels": lambda: routing_figures.expert_share(
        VECTOR_GX.reshape(-1, L, E).swapaxes(0, 1)[:1], CODES, [0]
    ),
    "saturation": lambda: routing_figures.saturation(
        [1e3, 5e4, 2e5],
        {"top-1": RNG.random((3, L)), "top-8": RNG.random((3, L))},
        LAYERS,
        chance={"top-1": 1 / 64, "top-8": 1 / 8},
    ),
    "coactivation": lambda: routing_figures.coactivation(
        [COACTIVATION_EE, COACTIVATION_EE],
        [routing.most_coactive(COACTIVATION_EE, number) for number in (16, 32)],
        [0, 7],
        chance=7 / 39,
    ),
    "language heatmap": lambda: routing_figures.language_heatmap(
        VECTOR_GX, CODES, FAMILIES, LAYERS
    ),
    "dendrogram": lambda: routing_figures.dendrogram(
        languages.linkage(languages.distances(VECTOR_GX)), CODES, FAMILIES
    ),
    "language map": lambda: routing_figures.language_map(
        RNG.normal(size=(len(CODES), 2)), CODES, FAMILIES
    ),
    "vocabulary": lambda: routing_figures.vocabulary_specialisation(
        LAYERS, {"input id": [0.2, 0.4, 0.6]}, chance={"input id": [0.1, 0.1, 0.2]}
    ),
    "gates": lambda: routing_figures.gate_ratios(
        LAYERS, {"first to second": QUARTILE_L3, "second to third": QUARTILE_L3**0.5}
    ),
}


def texts(figure):
    """The texts that are seen, apart from the ticks beyond the ends of an axis."""
    figure.draw_without_rendering()
    ticks = [tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
             for tick in axis.get_major_ticks() + axis.get_minor_ticks()]  # fmt: skip
    unseen = {label for tick in ticks for label in (tick.label1, tick.label2)}
    seen = {
        tick.label1 for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
        for tick in axis._update_ticks() if axis.get_visible()
    }  # fmt: skip
    return [
        text
        for text in figure.findobj(matplotlib.text.Text)
        if text.get_text().strip() and text.get_visible() and text not in unseen - seen
    ]


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_small_in_400_pixels_cut_off_or_over_another(name):
    figure = FIGURES[name]()
    found, width = texts(figure), figure.get_size_inches()[0]
    assert len(found) > 5
    assert min(text.get_size() for text in found) * 400 / 72 / width >= 9
    boxes = [text.get_window_extent() for text in found]
    for text, box in zip(found, boxes, strict=True):
        inside = figure.bbox.padded(1)
        assert inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1), text
    for (a, one), (b, other) in itertools.combinations(zip(found, boxes, strict=True), 2):
        # The box of a text has room above and below its letters.
        near = one.shrunk(0.95, 0.75).overlaps(other.shrunk(0.95, 0.75))
        assert not near, (a.get_text(), b.get_text())


def test_a_figure_is_saved_as_the_same_two_files_each_time(tmp_path):
    for number in "12":
        routing_figures.save(FIGURES["gates"](), tmp_path / f"gates.{number}")
    for suffix in ("png", "svg"):
        first, second = ((tmp_path / f"gates.{n}.{suffix}").read_bytes() for n in "12")
        assert first == second and len(first) > 1000
    svg = (tmp_path / "gates.1.svg").read_text()
    assert "<text" in svg and not re.search(r"dc:date>\d", svg)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"gates.{n}.{suffix}" for n in "12" for suffix in ("png", "svg")
    ]


def test_every_family_with_relatives_has_a_look_of_its_own():
    looks = routing_figures._Families.of(FAMILIES).looks
    own = [name for name in looks if FAMILIES.count(name) > 1]
    assert len(own) == 10
    assert len({tuple(looks[name].values()) for name in own}) == 10
    assert len({(looks[name]["color"], looks[name]["marker"]) for name in own}) == 10
    assert len({(looks[name]["color"], looks[name]["hatch"]) for name in own}) == 10
    assert all(looks[name] is routing_figures.ALONE for name in looks if name not in own)


def test_the_labels_of_a_crowded_map_do_not_touch():
    figure = routing_figures.language_map(
        np.zeros((9, 2)) + 1e-3 * np.eye(9, 2), CODES[:9], FAMILIES[:9]
    )
    labels = [text for text in texts(figure) if text.get_text() in CODES]
    assert 1 <= len(labels) < 9


def test_bars_stand_at_their_shares():
    figure = FIGURES["share of few labels"]()
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    np.testing.assert_allclose(heights, 100 * SHARE_LGE[0].ravel())
    assert figure.axes[0].lines[0].get_ydata()[0] == 100 / E
    colours = {patch.get_facecolor() for patch in figure.axes[0].patches}
    assert len(colours) == 5 <= len(records.COLOURS)


def test_rows_of_the_language_heatmap_are_sorted_by_family():
    figure = FIGURES["language heatmap"]()
    axes = figure.axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    families = [language_families.FAMILIES[row] for row in rows]
    assert (
        len([*itertools.groupby(families)]) == len(set(families)) and families[0] == "Indo-European"
    )
    np.testing.assert_allclose(
        axes.images[0].get_array(), E * VECTOR_GX[[CODES.index(row) for row in rows]]
    )
