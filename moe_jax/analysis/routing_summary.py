"""Everything that `analyze` says about a routing folder, as plain data for tables and JSON."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax import untrusted
from moe_jax.analysis import (
    committee,
    decisions,
    language_families,
    languages,
    routing,
    routing_counts,
)
from moe_jax.analysis.routing_counts import Counts

VOCABULARIES = ("input", "target", "predicted")  # whose ids: OLMoE, arXiv 2409.02060, §5.4
FEWEST_LANGUAGES = 4
IN_LAYERS = 999  # permutations for each layer alone
COMMITTEE_DRAWS = 199  # of labels, for each layer: a p-value is at least 0.005
MOST_LABELS = 64  # of a committee, whose cost grows with their square


@dataclasses.dataclass(frozen=True)
class Layer:
    """One sparse layer: its counts, and vocabulary specialisation by the kind of id."""

    counts: Counts
    vocabulary: Mapping[str, routing.Vocabulary]
    num_dropped: int

    @functools.cached_property
    def divergence_GG(self) -> np.ndarray:
        """The divergences between the labels that have tokens."""
        there = np.asarray(self.counts.tokens_G) > 0
        return routing.label_divergences(np.asarray(self.counts.label_GE)[there])


def layers_of(found: decisions.Decisions) -> dict[int, Layer]:
    """The counts of each sparse layer, added up over chunks of tokens."""
    return {layer: _layer(found, layer) for layer in found.facts.layers}


def _layer(found: decisions.Decisions, layer: int) -> Layer:
    facts = found.facts
    V, E = facts.vocab_size, facts.num_experts
    counts = routing_counts.no_counts(len(facts.labels), E, facts.num_experts_per_tok)
    count_KVE = {kind: np.zeros((V, E), np.int64) for kind in VOCABULARIES}
    for tokens, chosen in found.chunks(layer):
        # Narrow integers would wrap where E, an unused slot, is compared or used as an index.
        expert_NA = chosen.expert_NA.astype(np.int32)
        counts += routing_counts.count(
            *(expert_NA, chosen.weight_NA, chosen.probability_NP, tokens.label_N),
            num_labels=len(facts.labels),
            num_experts=E,
        )
        for kind, count_VE in count_KVE.items():
            id_N = getattr(tokens, f"{kind}_N")
            count_VE += np.asarray(
                routing_counts.count_vocabulary(id_N, expert_NA[:, 0], vocab_size=V, num_experts=E)
            )
    vocabulary = {kind: routing.vocabulary(count_VE) for kind, count_VE in count_KVE.items()}
    return Layer(counts, vocabulary, found.num_dropped.get(layer, 0))


def row_of_layer(layer: Layer, num_tokens: int) -> dict[str, Any]:
    """The measures of one layer; `label_divergence` is the mean over pairs of labels, in bits."""
    counts = layer.counts
    load_E, gates = np.asarray(counts.label_GE).sum(axis=0), routing.gates(counts)
    return {
        "effective_experts": float(routing.effective_experts(load_E)),
        "busiest_two_share": float(routing.busiest_share(load_E)),
        "rarely_used": routing.rarely_used(load_E[None]),
        "label_divergence": _mean_of_pairs(layer.divergence_GG),
        "confidence": float(gates.probability_P[0]),
        "gate_ratios": gates.of_means_R.tolist(),
        "gate_ratio_quartiles": gates.quartiles_RQ.tolist(),
        "vocabulary": {
            kind: {
                "mean": own.mean,
                "chance": own.chance,
                "mean_frequent": own.mean_frequent,
                "ids": own.num_ids,
            }
            for kind, own in layer.vocabulary.items()
        },
        "dropped": layer.num_dropped / max(int(load_E.sum()), 1),
        "n": num_tokens,
    }


def _mean_of_pairs(divergence_GG: np.ndarray) -> float | None:
    G = len(divergence_GG)
    return float(divergence_GG[np.triu_indices(G, 1)].mean()) if G > 1 else None


def committees(
    found: decisions.Decisions, *, permutations: int, seed: int = 0
) -> dict[int, committee.Committee]:
    """The standing committee of each sparse layer over the labels; {} for a single label.

    A top group has as many experts as a token, and a unit is a stretch of text. Of many labels
    those with the most tokens count.
    """
    facts, tokens, unit_N = found.facts, found.tokens(), found.stretches()
    label_U = tokens.label_N[np.flatnonzero(np.diff(unit_N, prepend=-1))]
    tokens_G = np.bincount(tokens.label_N, minlength=len(facts.labels))
    largest = [g for g in np.argsort(-tokens_G, kind="stable")[:MOST_LABELS] if tokens_G[g]]
    if len(largest) < 2:
        return {}
    kept_U = np.isin(label_U, largest)
    return {
        layer: committee.committee(
            _counts_of_units(found, layer, unit_N)[kept_U],
            label_U[kept_U],
            num_labels=len(facts.labels),
            size=min(facts.num_experts_per_tok, facts.num_experts - 1),
            draws=min(permutations, COMMITTEE_DRAWS),
            seed=seed,
        )
        for layer in facts.layers
    }


def _counts_of_units(found: decisions.Decisions, layer: int, unit_N: np.ndarray) -> np.ndarray:
    """int64 [U, E]: the assignments of each unit to each expert."""
    # One more column for unused slots.
    count_UE = np.zeros((int(unit_N[-1]) + 1, found.facts.num_experts + 1), np.int64)
    start = 0
    for _, chosen in found.chunks(layer):
        end = start + len(chosen.expert_NA)
        np.add.at(count_UE, (unit_N[start:end, None], chosen.expert_NA.astype(np.int64)), 1)
        start = end
    return count_UE[:, :-1]


def rows_of_labels(facts: decisions.Facts, layers: Mapping[int, Layer]) -> dict[str, dict]:
    """For each label with tokens: means over layers of its load and of its distance to others.

    `largest_share` is the largest share that one expert of any layer has of the label's
    assignments, and `specialisation` the largest part of its tokens that have one expert in their
    set (OLMoE, arXiv 2409.02060, §5.3), whose base line is k/E.
    """
    tokens_G = np.asarray(next(iter(layers.values())).counts.tokens_G)
    there = np.flatnonzero(tokens_G)
    count_LGE = np.stack([np.asarray(layer.counts.label_GE)[there] for layer in layers.values()])
    divergence_GG = np.mean([layer.divergence_GG for layer in layers.values()], axis=0)
    effective_G = routing.effective_experts(count_LGE).mean(axis=0)
    largest_G = routing.share(count_LGE).max(axis=(0, 2))
    special_LGE = [routing.specialisation(count_GE, tokens_G[there]) for count_GE in count_LGE]
    special_G = np.max(special_LGE, axis=(0, 2))
    rows = {}
    for i, label in enumerate(facts.labels[g] for g in there):
        others = np.delete(np.arange(len(there)), i)
        nearest = others[divergence_GG[i, others].argmin()] if others.size else None
        rows[label] = {
            "family": language_families.family(label),
            "tokens": int(tokens_G[there[i]]),
            "effective_experts": float(effective_G[i]),
            "largest_share": float(largest_G[i]),
            "specialisation": float(special_G[i]),
            "divergence": float(divergence_GG[i, others].mean()) if others.size else None,
            "nearest": None if nearest is None else facts.labels[there[nearest]],
        }
    return rows


def known_languages(facts: decisions.Facts, layers: Mapping[int, Layer]) -> list[int]:
    """The labels with tokens that name a language whose family is known."""
    tokens_G = next(iter(layers.values())).counts.tokens_G
    there = np.flatnonzero(tokens_G).tolist()
    return [g for g in there if language_families.family(facts.labels[g])]


def language_vectors(layers: Mapping[int, Layer], known: list[int]) -> np.ndarray:
    """[G, X]: LOLA's vectors of some labels, from the first expert of each token."""
    first_LGE = [np.asarray(layer.counts.first_GE)[known] for layer in layers.values()]
    return languages.vectors(first_LGE)


def language_statistics(
    facts: decisions.Facts,
    layers: Mapping[int, Layer],
    *,
    distances: languages.NamedDistances | None = None,
    permutations: int = 9999,
    seed: int = 0,
) -> dict | None:
    """Findings about the labels that are known languages, in all layers and in each; None if they
    are too few, or have no relatives among them.

    Distances are LOLA's, from the first expert of each token (arXiv 2409.11272).
    """
    known = known_languages(facts, layers)
    names = [facts.labels[g] for g in known]
    own = [str(language_families.family(name)) for name in names]
    has_relatives = len(known) >= FEWEST_LANGUAGES and 1 < len(set(own)) < len(own)
    if not has_relatives and distances is None:
        return None
    vector_GX = language_vectors(layers, known)
    distance_GG = languages.distances(vector_GX)
    report: dict[str, Any] = {"labels": names, "families": own}
    if has_relatives:
        by_layer = languages.layer_distances(vector_GX, len(layers))
        report |= _findings(distance_GG, own, permutations, seed)
        report["layers"] = {
            layer: _findings(of_layer_GG, own, min(permutations, IN_LAYERS), seed)
            for layer, of_layer_GG in zip(layers, by_layer, strict=True)
        }
    if distances is not None:
        both = languages.align(names, distances.names)
        if len(both.ours) < FEWEST_LANGUAGES:
            raise ValueError(
                f"the distances name {len(both.ours)} of the {len(names)} languages of the text "
                f"({', '.join(map(untrusted.label, names[:5]))}, …); name at least "
                f"{FEWEST_LANGUAGES} of them"
            )
        ours_GG = distance_GG[np.ix_(both.ours, both.ours)]
        theirs_GG = distances.distance_GG[np.ix_(both.theirs, both.theirs)]
        report["given_distances"] = dataclasses.asdict(
            languages.mantel(ours_GG, theirs_GG, permutations=permutations, seed=seed)
        )
        report["left_out"] = [*both.only_ours, *both.only_theirs]
    return report


def _findings(distance_GG: np.ndarray, families: list[str], permutations: int, seed: int) -> dict:
    how: dict[str, Any] = {"permutations": permutations, "seed": seed}
    same_GG = languages.same_family(families)
    found = {
        "silhouette": languages.family_silhouette(distance_GG, families, **how),
        "purity": languages.knn_purity(distance_GG, families, **how),
    }
    if np.ptp(distance_GG[np.triu_indices(len(distance_GG), 1)]) > 0:
        found["mantel"] = languages.mantel(distance_GG, same_GG, **how)
    return {name: dataclasses.asdict(finding) for name, finding in found.items()}


def arrays(layers: Mapping[int, Layer]) -> dict[str, np.ndarray]:
    """The counts of all layers, stacked, for a file."""
    own = [layer.counts for layer in layers.values()]
    names = [field.name for field in dataclasses.fields(Counts)]
    stacked = {name: np.stack([np.asarray(getattr(c, name)) for c in own]) for name in names}
    return {"layers": np.array(list(layers)), **stacked}
