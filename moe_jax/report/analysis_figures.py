"""The figures of one routing folder, from the counts that `analysis/routing_summary.py` makes."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from moe_jax.analysis import decisions, language_families, languages, routing, routing_summary
from moe_jax.report import routing_figures

PANELS = 4  # layers of the figures that have a panel for each layer
COACTIVE = 16  # experts in a heatmap of co-activation, as in OLMoE (arXiv 2409.02060, figure 19)


def write(
    folder: pathlib.Path,
    facts: decisions.Facts,
    layers: Mapping[int, routing_summary.Layer],
    *,
    steps: Mapping[int, Mapping[int, Mapping]],
    seed: int = 0,
) -> None:
    """Writes each figure as PNG and SVG into the folder.

    Args: steps: by step and layer, the rows of `routing_comparison.compare` of earlier checkpoints.
    """
    folder.mkdir()
    if steps:
        routing_figures.save(_saturation(facts, steps), folder / "saturation")
    for name, figure in _figures(facts, layers, seed):
        routing_figures.save(figure, folder / name)


def _figures(
    facts: decisions.Facts, layers: Mapping[int, routing_summary.Layer], seed: int
) -> Iterator[tuple[str, Figure]]:
    counts = [layer.counts for layer in layers.values()]
    there = np.flatnonzero(counts[0].tokens_G)
    labels, numbers = [facts.labels[g] for g in there], list(layers)
    shown = _spread(len(numbers))
    chosen = [numbers[i] for i in shown]
    share_LGE = np.stack([routing.share(np.asarray(counts[i].label_GE)[there]) for i in shown])
    yield "expert_share", routing_figures.expert_share(share_LGE, labels, chosen)
    if facts.num_experts_per_tok > 1:
        matrices = [routing.coactivation(np.asarray(counts[i].pairs_EE)) for i in shown]
        orders = [routing.most_coactive(matrix, COACTIVE) for matrix in matrices]
        chance = (facts.num_experts_per_tok - 1) / (facts.num_experts - 1)
        heatmaps = routing_figures.coactivation(matrices, orders, chosen, chance=chance)
        yield "coactivation", heatmaps
    by_kind = {
        kind: [layer.vocabulary[kind] for layer in layers.values()]
        for kind in routing_summary.VOCABULARIES
    }
    yield (
        "vocabulary",
        routing_figures.vocabulary_specialisation(
            numbers,
            {kind: [layer.mean for layer in of_layers] for kind, of_layers in by_kind.items()},
            chance={kind: [own.chance for own in of_layers] for kind, of_layers in by_kind.items()},
        ),
    )
    quartiles_LRQ = np.stack([routing.gates(own).quartiles_RQ for own in counts])
    names = ("first to second", "second to third")[: quartiles_LRQ.shape[1]]
    ratios = {name: quartiles_LRQ[:, i] for i, name in enumerate(names)}
    yield "gate_ratios", routing_figures.gate_ratios(numbers, ratios)
    yield from _of_languages(facts, layers, seed)


def _saturation(facts: decisions.Facts, steps: Mapping[int, Mapping[int, Mapping]]) -> Figure:
    k, E = facts.num_experts_per_tok, facts.num_experts
    kinds = {"top-1": ("top_1", 1 / E), f"top-{k}": ("top_k", k / E)}
    panels = {
        kind: np.array([[rows[layer][name] for layer in facts.layers] for rows in steps.values()])
        for kind, (name, _) in kinds.items()
    }
    chance = {kind: even for kind, (_, even) in kinds.items()}
    return routing_figures.saturation(list(steps), panels, facts.layers, chance=chance)


def _spread(number: int) -> Sequence[int]:
    """At most PANELS of the first `number` indices, from the first to the last."""
    return np.unique(np.linspace(0, number - 1, min(PANELS, number)).round().astype(int)).tolist()


def _of_languages(
    facts: decisions.Facts, layers: Mapping[int, routing_summary.Layer], seed: int
) -> Iterator[tuple[str, Figure]]:
    known = routing_summary.known_languages(facts, layers)
    if len(known) < routing_summary.FEWEST_LANGUAGES:
        return
    names = [facts.labels[g] for g in known]
    families = [str(language_families.family(name)) for name in names]
    vector_GX = routing_summary.language_vectors(layers, known)
    linkage = languages.linkage(languages.distances(vector_GX))
    looks = names, families
    yield "languages", routing_figures.language_heatmap(vector_GX, *looks, list(layers))
    yield "language_tree", routing_figures.dendrogram(linkage, *looks)
    position_G2 = languages.tsne(vector_GX, seed=seed)
    yield "language_map", routing_figures.language_map(position_G2, *looks)
