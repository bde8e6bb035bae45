"""Everything that `analyze` says about a routing folder, as plain data for tables and JSON."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax import untrusted
from moe_jax.analysis import decisions, language_families, languages, routing, routing_counts
from moe_jax.analysis.routing_counts import Counts

VOCABULARIES = ("input", "target", "predicted")  # whose ids: OLMoE, arXiv 2409.02060, §5.4
FEWEST_LANGUAGES = 4
IN_LAYERS = 999  # permutations for each layer alone


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


def saturation(found: decisions.Decisions, final: decisions.Decisions) -> dict[int, dict]:
    """Router saturation against a later checkpoint, by layer (OLMoE, arXiv 2409.02060, §5.1).

    Raises: ValueError if the two are not of the same text, layers and number of experts.
    """
    facts = found.facts
    check_comparable(final, facts)
    E, N = facts.num_experts, facts.num_tokens
    sizes = {"top_1": 1, "top_k": facts.num_experts_per_tok}
    rows: dict[int, dict] = {}
    for layer in facts.layers:
        shared = dict.fromkeys(sizes, 0)
        load_2E = {name: np.zeros((2, E), np.int64) for name in sizes}
        for pair in zip(found.chunks(layer), final.chunks(layer), strict=True):
            for name, k in sizes.items():
                chosen = [own.expert_NA[:, :k] for _, own in pair]
                shared[name] += int(routing_counts.count_shared(*chosen))
                load_2E[name] += [np.bincount(one.ravel(), minlength=E + 1)[:E] for one in chosen]
        rows[layer] = {"n": N}
        for name, k in sizes.items():
            ours_E, theirs_E = load_2E[name]
            rows[layer][name] = shared[name] / (N * k)
            # Two independent routers with these loads agree so often; k/E if both are even.
            rows[layer][f"{name}_chance"] = float(ours_E / N @ theirs_E / (N * k))
    return rows


def check_comparable(final: decisions.Decisions, facts: decisions.Facts) -> None:
    """Raises: ValueError if routing with these facts cannot be compared token by token."""
    names = ("text_digest", "layers", "num_experts", "num_experts_per_tok")
    final.check_same(**{name: getattr(facts, name) for name in names})


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


def rows_of_labels(facts: decisions.Facts, layers: Mapping[int, Layer]) -> dict[str, dict]:
    """For each label with tokens: means over layers of its load and of its distance to others.

    `largest_share` is the largest share that one expert of any layer has of the label.
    """
    tokens_G = np.asarray(next(iter(layers.values())).counts.tokens_G)
    there = np.flatnonzero(tokens_G)
    count_LGE = np.stack([np.asarray(layer.counts.label_GE)[there] for layer in layers.values()])
    divergence_GG = np.mean([layer.divergence_GG for layer in layers.values()], axis=0)
    effective_G = routing.effective_experts(count_LGE).mean(axis=0)
    largest_G = routing.share(count_LGE).max(axis=(0, 2))
    rows = {}
    for i, label in enumerate(facts.labels[g] for g in there):
        others = np.delete(np.arange(len(there)), i)
        nearest = others[divergence_GG[i, others].argmin()] if others.size else None
        rows[label] = {
            "family": language_families.family(label),
            "tokens": int(tokens_G[there[i]]),
            "effective_experts": float(effective_G[i]),
            "largest_share": float(largest_G[i]),
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
