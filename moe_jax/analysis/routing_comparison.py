"""Two routers on one text: saturation between checkpoints, and stability between seeds."""

from typing import Any

import numpy as np

from moe_jax.analysis import decisions, routing, routing_counts


def compare(found: decisions.Decisions, other: decisions.Decisions) -> dict[int, dict[str, Any]]:
    """By sparse layer, the agreement of two routers with intervals over stretches of text.

    `top_1` and `top_k` are router saturation if the other is the final checkpoint: the part of a
    token's experts that the other has too (OLMoE, arXiv 2409.02060, §5.1). `matched` is stability
    if the other has another seed: the same after the best matching of experts
    (`routing.stability`). Each has `…_chance`, the level of independent routers with these loads,
    and `…_interval`, 95 % over `units` stretches, for this matching.

    Raises: ValueError if the two are not of the same text, layers and number of experts.
    """
    check_comparable(other, found.facts)
    unit_N = found.stretches()
    return {layer: _of_layer(found, other, layer, unit_N) for layer in found.facts.layers}


def check_comparable(other: decisions.Decisions, facts: decisions.Facts) -> None:
    """Raises: ValueError if routing with these facts cannot be compared token by token."""
    names = ("text_digest", "layers", "num_experts", "num_experts_per_tok")
    other.check_same(**{name: getattr(facts, name) for name in names})


def _of_layer(
    found: decisions.Decisions, other: decisions.Decisions, layer: int, unit_N: np.ndarray
) -> dict[str, Any]:
    E, N, k = (
        getattr(found.facts, n) for n in ("num_experts", "num_tokens", "num_experts_per_tok")
    )
    tokens_U = np.bincount(unit_N)
    load_2E = {size: np.zeros((2, E), np.int64) for size in (1, k)}
    joint_EE = np.zeros((E, E), np.int64)
    for ours_NA, theirs_NA in _pairs(found, other, layer):
        joint_EE += np.asarray(routing_counts.count_joint(ours_NA, theirs_NA, num_experts=E))
        for size, load in load_2E.items():
            both = ours_NA[:, :size], theirs_NA[:, :size]
            load += [np.bincount(one.ravel(), minlength=E + 1)[:E] for one in both]
    matching = routing.stability(joint_EE, N * k)
    # Two independent routers with these loads agree so often; k/E if both are even.
    chance = {
        size: float(ours_E / N @ theirs_E / (N * size))
        for size, (ours_E, theirs_E) in load_2E.items()
    }
    row: dict[str, Any] = {"n": N, "units": len(tokens_U)}
    # The number of an unused slot becomes one that the other has not.
    unmatched_E, matched_E = (np.append(x_E, -1) for x_E in (np.arange(E), matching.matched_E))
    agreements = {
        "top_1": (1, unmatched_E, chance[1]),
        "top_k": (k, unmatched_E, chance[k]),
        "matched": (k, matched_E, matching.chance),
    }
    parts: dict[str, list] = {name: [] for name in agreements}
    for ours_NA, theirs_NA in _pairs(found, other, layer):
        for name, (size, renamed_E, _) in agreements.items():
            both = renamed_E[ours_NA[:, :size]], theirs_NA[:, :size]
            parts[name].append(routing_counts.count_shared(*both))
    for name, (size, _, level) in agreements.items():
        shared_N = np.concatenate(parts[name])
        shared_U = np.bincount(unit_N, weights=shared_N)
        row[name] = int(shared_N.sum(dtype=np.int64)) / (N * size)
        row[f"{name}_interval"] = routing.interval(shared_U, size * tokens_U)
        row[f"{name}_chance"] = level
    return row


def _pairs(found: decisions.Decisions, other: decisions.Decisions, layer: int):
    """Both routers' experts of some tokens at a time, [N, A]."""
    for pair in zip(found.chunks(layer), other.chunks(layer), strict=True):
        yield tuple(chosen.expert_NA.astype(np.int32) for _, chosen in pair)
