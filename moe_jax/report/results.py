"""The results of figures in words, from the numbers that they show: their alternative texts."""

from collections.abc import Sequence

import numpy as np

from moe_jax.analysis import answers, measures
from moe_jax.report import comparisons
from moe_jax.report.records import Group, Record, groups

MOST_NAMED = 7  # runs in a sentence


def arms(records: Sequence[Record]) -> list[Group]:
    """The groups of sparse runs and of those that start from another run, or all if there are none.

    All runs are grouped first: without their parents, seeds of one arm would look like other arms.
    """
    every = groups(records)
    return [g for g in every if g.first.is_sparse or g.first.sources] or every


def flops_of(record: Record) -> float:
    """Training FLOPs with the parents'."""
    return record.result["training_flops"] + record.result["parent_training_flops"]


def sparse(records: Sequence[Record]) -> list[Group]:
    """The groups of the sparse runs."""
    return [group for group in groups(records) if group.first.is_sparse]


def least_even(load_LE: np.ndarray) -> int:
    """The layer in which the largest share is the farthest above an even load."""
    return int(np.argmax(load_LE.max(axis=1)))


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    shown = "; ".join(f"{name} {value}" for name, value in pairs[:MOST_NAMED])
    rest = len(pairs) - MOST_NAMED
    return shown + (f"; and {rest} more" if rest > 0 else "")


def _ranked(every: Sequence[Group]) -> list[Group]:
    return sorted(every, key=lambda group: group.mean_bits)


def _bits(group: Group) -> str:
    return f"{group.mean_bits:.3f}" if len(group.bits) else "unknown"


def of_loss(records: list[Record]) -> str:
    ranked = _ranked(arms(records))
    pairs = [(group.name, _bits(group)) for group in ranked]
    return f"Final held-out bits per byte, lowest first: {_listed(pairs)}."


def of_loss_against_flops(records: list[Record]) -> str:
    ranked = _ranked(groups(records))
    pairs = [
        (g.name, f"{_bits(g)} at {g.first.result['training_flops']:.3g} FLOP alone and "
         f"{flops_of(g.first):.3g} with its parents")
        for g in ranked
    ]  # fmt: skip
    return f"Held-out bits per byte at the end: {_listed(pairs)}."


def of_languages(records: list[Record]) -> str:
    best = comparisons.best(groups(records))
    table = best.first.result["per_language"] if best else {}
    bits = {label: row["bits_per_byte"] for label, row in table.items() if row["bits_per_byte"]}
    if not best or not bits:
        return "No run has losses by label."
    easy, hard = min(bits, key=bits.__getitem__), max(bits, key=bits.__getitem__)
    return (
        f"In {best.name}, the run with the lowest loss, bits per byte go from {bits[easy]:.3f} "
        f"({easy}) to {bits[hard]:.3f} ({hard})."
    )


def of_preferences(records: list[Record]) -> str:
    found = [(g.name, g.averages(answers.columns)["preference_accuracy"]) for g in groups(records)]
    pairs = [(name, f"{100 * value:.1f} %") for name, value in found if value is not None]
    return f"Held-out pairs whose chosen answer has the larger reward: {_listed(pairs)}."


def of_expert_load(records: list[Record]) -> str:
    pairs = []
    for group in sparse(records):
        load_LE = 100 * np.array(group.first.result["tokens_per_expert"], np.float64)
        pairs.append((group.name, f"{load_LE.min():.1f} to {load_LE.max():.1f} %"))
    return f"The shares of the experts over all layers: {_listed(pairs)}."


def of_load_over_training(records: list[Record]) -> str:
    pairs = []
    for group in sparse(records):
        load_LE = 100 * np.array(group.first.result["tokens_per_expert"], np.float64)
        layer = least_even(load_LE)
        even = 100 / load_LE.shape[1]
        pairs.append((group.name, f"{load_LE[layer].max():.1f} % (even: {even:.1f} %)"))
    return f"The largest share of an expert at the end: {_listed(pairs)}."


def of_drop_rates(records: list[Record]) -> str:
    pairs = []
    for group in sparse(records):
        rates = [r["router"]["virtual_drop_rate"] for r in group.first.rows if r.get("router")]
        if rates:
            words = f"{100 * max(rates[-1]):.1f} % in the layer that would drop most"
            pairs.append((group.name, words))
    return f"Virtual drop rate at the end: {_listed(pairs)}."


def of_router_health(records: list[Record]) -> str:
    ranked = _ranked(groups(records))
    found = [(g.name, measures.columns(g.first.result)["effective_experts"]) for g in ranked]
    pairs = [(name, f"{value:.2f}") for name, value in found if value != ""]
    return f"Effective experts at the end, mean of the layers: {_listed(pairs)}."


def of_experts_by_layer(records: list[Record]) -> str:
    pairs = []
    for group in sparse(records):
        similarity, drift = (
            group.first.result.get(key) or [] for key in ("expert_similarity", "router_drift")
        )
        if len(similarity) and len(drift):
            words = f"similarity {np.mean(similarity):.3f}, drift {np.mean(drift):.2f}"
            pairs.append((group.name, words))
    return f"Means of the layers: {_listed(pairs)}."


def of_parent_similarity(records: list[Record]) -> str:
    pairs = []
    for group in groups(records):
        tokens, values = group.curve("layers", "parent_similarity")
        if len(tokens):
            words = f"{values[:, 0].mean():.3f} at the start, {values[:, -1].mean():.3f} at the end"
            pairs.append((group.name, words))
    return f"Cosine similarity to the parent's weights: {_listed(pairs)}."


def of_training_flops(records: list[Record]) -> str:
    pairs = [
        (
            g.name,
            f"{g.first.result['training_flops']:.3g}, with its parents {flops_of(g.first):.3g}",
        )
        for g in groups(records)
    ]
    return f"Training FLOPs: {_listed(pairs)}."
