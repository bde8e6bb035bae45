"""Similarity of a layer's experts to each other, to the dense parent, and over time.

If the experts of an MoE stay alike, it is no better than its parent. Skywork-MoE monitors the mean
over pairs (Wei et al., arXiv 2406.06563), He et al. the similarity to the parent (arXiv
2410.07524). Cosine similarities and distances compare weights at the same index, so they say
nothing about experts whose neurons are permuted; for these there is the fraction of intact neurons.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model import layout
from moe_jax.model.config import MOE, ModelConfig
from moe_jax.upcycle.experts import MATRICES, NEURON_AXIS

TINY = 1e-15  # replaces a norm of zero; its square is not 0 in float32
MANY_LAYERS = 12  # with more, a table shows the first, middle and last layer and the mean


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of one sparse layer; mappings are by matrix ("gate", "up", "down").

    pairwise: mean over pairs of experts of the cosine similarity of the whole matrices; nan for a
      single expert.
    parent_cosine, parent_distance: mean over experts of the cosine similarity to the parent's
      matrix and of |expert - parent| / |parent|; empty without a parent of the same width.
    intact: fraction of an expert's neurons that equal some neuron of the parent's layer bitwise in
      all matrices, mean over experts; None without a parent.
    """

    layer: int
    pairwise: Mapping[str, float]
    parent_cosine: Mapping[str, float] = dataclasses.field(default_factory=dict)
    parent_distance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    intact: float | None = None

    @property
    def columns(self) -> dict[str, float]:
        named = {f"pairs {name}": value for name, value in self.pairwise.items()}
        named |= {f"parent {name}": value for name, value in self.parent_cosine.items()}
        named |= {f"away {name}": value for name, value in self.parent_distance.items()}
        return named if self.intact is None else {**named, "intact": self.intact}


@dataclasses.dataclass(frozen=True)
class Drift:
    """The change of one layer's router between two checkpoints.

    distance: |new - old| / |old| for the whole kernel.
    cosine: mean over experts of the cosine similarity between an expert's old and new column.
    """

    layer: int
    distance: float
    cosine: float

    @property
    def columns(self) -> dict[str, float]:
        return {"router distance": self.distance, "router cosine": self.cosine}


def experts(
    params: dict, config: ModelConfig, parent: tuple[dict, ModelConfig] | None = None
) -> list[Experts]:
    """One row for each sparse layer, in the model's order.

    `parent` has the parameters and the config of a dense model with the same number of layers and
    hidden size. If its feed-forwards are wider than the experts, which are then parts of them, only
    the fraction of intact neurons is compared with it.

    Raises: ValueError for any other parent.
    """
    if parent is not None:
        check_parent(config, parent[1])
    rows = []
    for layer in layout.sparse_layers(config):
        source = None if parent is None else layout.layer(*parent, layer, "mlp")
        rows.append(of_layer(layer, layout.layer(params, config, layer, "moe", "experts"), source))
    return rows


def of_layer(layer: int, ffn_E: dict, parent: dict | None = None) -> Experts:
    """The row for one layer, from its experts' weights and its parent's FFN."""
    ffn_E = _matrices(ffn_E)
    row = Experts(layer, {name: float(_mean_of_pairs(w)) for name, w in ffn_E.items()})
    if parent is None:
        return row
    parent = _matrices(parent)
    row = dataclasses.replace(row, intact=_intact(ffn_E, parent))
    if ffn_E["up"].shape[1:] != parent["up"].shape:
        return row
    cosine, distance = _compared(ffn_E, parent)
    return dataclasses.replace(row, parent_cosine=cosine, parent_distance=distance)


def to_parent(
    params: dict, config: ModelConfig, parent: tuple[dict, ModelConfig]
) -> dict[str, list[float]]:
    """By sparse layer, the experts' `parent_similarity`, which is their cosine similarity to the
    dense parent, and `parent_distance`, relative to its norm (He et al., arXiv 2410.07524).

    Both are means over experts and matrices: see `Experts`. `parent` is as in `experts`, with
    feed-forwards of an expert's width.

    Raises: ValueError for any other parent.
    """
    check_parent(config, parent[1], of_width=True)
    found: dict[str, list[float]] = {"parent_similarity": [], "parent_distance": []}
    for layer in layout.sparse_layers(config):
        ffn_E = _matrices(layout.layer(params, config, layer, "moe", "experts"))
        theirs = _matrices(layout.layer(*parent, layer, "mlp"))
        for name, values in zip(found, _compared(ffn_E, theirs), strict=True):
            found[name].append(round(float(np.mean(list(values.values()))), 5))
    return found


def _compared(ffn_E: dict, parent: dict) -> tuple[dict[str, float], dict[str, float]]:
    """The cosine similarity to the parent and the distance from it, by matrix."""
    found = {name: _to_parent(w, parent[name]) for name, w in ffn_E.items()}
    cosine = {name: float(cosine) for name, (cosine, _) in found.items()}
    return cosine, {name: float(distance) for name, (_, distance) in found.items()}


def of_layers(params: dict, config: ModelConfig) -> list[float] | None:
    """The mean similarity of pairs of experts in each sparse layer, averaged over the matrices.

    None if there are no pairs: in a dense model, or with a single expert.
    """
    if config.num_experts < 2:
        return None
    rows = experts(params, config)
    return [round(float(np.mean(list(row.pairwise.values()))), 5) for row in rows]


def routers(params: dict, config: ModelConfig) -> dict[int, np.ndarray]:
    """Each sparse layer's router kernel [D, E]."""
    return {
        layer: np.asarray(layout.layer(params, config, layer, "moe", "router")["kernel"])
        for layer in layout.sparse_layers(config)
    }


def router_drift(old: dict[int, np.ndarray], new: dict[int, np.ndarray]) -> list[Drift]:
    """One row for each sparse layer, from `routers` of two checkpoints of a model."""
    rows = []
    for layer in old:
        before, after = (np.asarray(kernels[layer], np.float64) for kernels in (old, new))
        distance = np.linalg.norm(after - before) / np.maximum(np.linalg.norm(before), TINY)
        norms_E = np.linalg.norm(before, axis=0) * np.linalg.norm(after, axis=0)
        cosine_E = (before * after).sum(axis=0) / np.maximum(norms_E, TINY)
        rows.append(Drift(layer, float(distance), float(cosine_E.mean())))
    return rows


LEGEND = {
    "pairs": "cosine similarity of pairs of experts, weights place by place",
    "parent": "cosine similarity to the dense parent",
    "away": "distance to the parent, in units of its norm",
    "intact": "share of neurons that are bit for bit the parent's, in any order",
    "router": "of the router's weights at the end to those at the start",
}


def legend(rows: Sequence[Experts | Drift]) -> str:
    """A line that explains each kind of column of `table`."""
    kinds = dict.fromkeys(name.split()[0] for name in rows[0].columns)
    return "\n".join(f"{kind:>8}  {LEGEND[kind]}" for kind in kinds)


def table(rows: Sequence[Experts | Drift]) -> str:
    """An aligned line for each layer; with many layers, for the first, middle, last and mean."""
    if not rows:
        return "no sparse layers"
    many, names = len(rows) > MANY_LAYERS, list(rows[0].columns)
    shown = (rows[0], rows[len(rows) // 2], rows[-1]) if many else rows
    lines = {str(row.layer): row.columns for row in shown}
    if many:
        lines["mean"] = {n: float(np.mean([row.columns[n] for row in rows])) for n in names}
    above, below = zip(*(name.rpartition(" ")[::2] for name in names), strict=True)
    grid = [["", *above], ["layer", *below]]
    for label, values in lines.items():
        grid.append([label, *("-" if math.isnan(v) else f"{v:.4f}" for v in values.values())])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in grid
    )


def check_parent(config: ModelConfig, parent: ModelConfig, *, of_width: bool = False) -> None:
    """Raises: ValueError for a parent that is sparse, or has other sizes than the mixture; with
    `of_width`, for one whose feed-forwards are wider than an expert, too."""
    if MOE in parent.layer_kinds:
        raise ValueError(f"the parent is sparse (num_experts={parent.num_experts}); give a dense")
    for name in ("num_hidden_layers", "hidden_size", "gated_mlp"):
        theirs, ours = getattr(parent, name), getattr(config, name)
        if theirs != ours:
            raise ValueError(f"{name}={theirs} of the parent differs from {ours}; give its parent")
    if of_width and parent.intermediate_size != config.expert_size:
        raise ValueError(
            f"the parent's feed-forwards have {parent.intermediate_size} neurons, and an expert "
            f"{config.expert_size}: weights are compared place by place"
        )


def _matrices(ffn: dict) -> dict:
    return {name: ffn[name] for name in MATRICES if name in ffn}


@jax.jit
def _mean_of_pairs(w_EXY):
    # With the Gram matrix no array is larger than the experts.
    E = w_EXY.shape[0]
    w_EXY = w_EXY.astype(jnp.float32)
    gram_EE = jnp.einsum("exy,fxy->ef", w_EXY, w_EXY, precision="highest")
    norm_E = jnp.maximum(jnp.sqrt(jnp.diagonal(gram_EE)), TINY)
    cosine_EE = gram_EE / (norm_E[:, None] * norm_E)
    return (jnp.sum(cosine_EE) - jnp.trace(cosine_EE)) / (E * (E - 1))


@jax.jit
def _to_parent(w_EXY, parent_XY):
    """(cosine similarity, relative distance), each a mean over experts, computed one by one."""
    parent_XY = parent_XY.astype(jnp.float32)
    parent_norm = jnp.maximum(jnp.linalg.norm(parent_XY), TINY)

    def of_expert(w_XY):
        w_XY = w_XY.astype(jnp.float32)
        norm = jnp.maximum(jnp.linalg.norm(w_XY), TINY)
        cosine = jnp.sum(w_XY * parent_XY) / (norm * parent_norm)
        return cosine, jnp.linalg.norm(w_XY - parent_XY) / parent_norm

    return tuple(jnp.mean(values_E) for values_E in jax.lax.map(of_expert, w_EXY))


def _intact(ffn: dict, parent: dict) -> float:
    known = set(_neurons(parent))
    shares = [
        np.mean([neuron in known for neuron in _neurons({name: w[e] for name, w in ffn.items()})])
        for e in range(len(ffn["up"]))
    ]
    return float(np.mean(shares))


def _neurons(ffn: dict) -> list[bytes]:
    """A hash of each neuron's weights in all matrices, in float32: widening keeps the values, so
    that neurons of different dtypes can be compared."""
    rows_FX = np.concatenate(
        [np.moveaxis(np.asarray(w, np.float32), NEURON_AXIS[name], 0) for name, w in ffn.items()],
        axis=1,
    )
    return [hashlib.blake2b(row_X.tobytes(), digest_size=16).digest() for row_X in rows_FX]
