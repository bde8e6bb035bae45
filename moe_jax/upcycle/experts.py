"""Small transforms that make one expert's weights from a layer's feed-forward weights and a key.

An FFN here is a dict of one layer's matrices, `gate` [D, F] (if any), `up` [D, F], `down` [F, D],
and of its biases if any, `gate_bias` [F], `up_bias` [F], `down_bias` [D]. All paths (in memory,
sharded, streaming) share these functions: run inside `jax.lax.map`, never `vmap`, they give
bitwise the same result in each.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import tree

FFN = dict[str, jax.Array]

# The axis along which an array has one slice for each hidden neuron.
NEURON_AXIS = {"gate": 1, "up": 1, "down": 0, "gate_bias": 0, "up_bias": 0}
MATRICES = ("gate", "up", "down")


def num_neurons(ffn: FFN) -> int:
    return ffn["up"].shape[NEURON_AXIS["up"]]


def take_neurons(ffn: FFN, index_F: jax.Array) -> FFN:
    """Selects neurons in this order, and scales the output's bias by the fraction selected.

    The parts of a partition therefore add up to the whole.
    """
    share = len(index_F) / num_neurons(ffn)

    def taken(name, w):
        if name in NEURON_AXIS:
            return jnp.take(w, index_F, axis=NEURON_AXIS[name])
        return w if share == 1 else w * share

    return {name: taken(name, w) for name, w in ffn.items()}


def permute_neurons(ffn: FFN, key: jax.Array) -> FFN:
    """The same function, with its neurons in a random order."""
    return take_neurons(ffn, jax.random.permutation(tree.fold_in(key, "order"), num_neurons(ffn)))


def shard(ffn: FFN, index: jax.Array, number: int) -> FFN:
    """Part `index` of the neurons when they are split into `number` contiguous equal parts."""
    size = num_neurons(ffn) // number
    return take_neurons(ffn, index * size + jnp.arange(size))


def _disturbed(
    ffn: FFN, key: jax.Array, disturb: Callable, *, ratio: float, index_sharing: str
) -> FFN:
    """Replaces floor(ratio·F) random neurons of each matrix by `disturb(weights, normals)`.

    With `index_sharing` "neuron" the matrices share one set of neurons; with "per_matrix" each has
    its own.
    """
    F, disturbed = num_neurons(ffn), dict(ffn)
    if not (count := math.floor(ratio * F)):
        return ffn
    for name in MATRICES:
        if name in ffn:
            key_of = {"neuron": key, "per_matrix": tree.fold_in(key, name)}[index_sharing]
            index = jax.random.permutation(tree.fold_in(key_of, "neurons"), F)[:count]
            at = (slice(None),) * NEURON_AXIS[name] + (index,)
            block = ffn[name][at].astype(jnp.float32)
            key_of_values = tree.fold_in(tree.fold_in(key, name), "values")
            block = disturb(block, jax.random.normal(key_of_values, block.shape))
            disturbed[name] = ffn[name].at[at].set(block.astype(ffn[name].dtype))
    return disturbed


def redraw_neurons(ffn: FFN, key: jax.Array, *, ratio: float, index_sharing: str) -> FFN:
    """Redraws a fraction of the neurons from a normal with the mean and deviation of the old ones.

    The mean and the unbiased standard deviation are two scalars per matrix, over all entries of its
    selected neurons (Nakamura et al., Drop-Upcycling, arXiv 2502.19261, §3). Biases are kept.
    """

    def redraw(block, normals):
        return jnp.mean(block) + jnp.std(block, ddof=1) * normals

    return _disturbed(ffn, key, redraw, ratio=ratio, index_sharing=index_sharing)


def add_noise(ffn: FFN, key: jax.Array, *, std: float, ratio: float, index_sharing: str) -> FFN:
    """Adds N(0, std²) noise to the weights of a fraction of the neurons."""

    def add(block, normals):
        return block + std * normals

    return _disturbed(ffn, key, add, ratio=ratio, index_sharing=index_sharing)


# A factor on the output is spread over the matrices. The table gives each matrix's exponent by the
# kind of FFN: "gated", "squared" (ungated, squared ReLU) or "plain" (any other ungated). "paper"
# follows He et al. (arXiv 2410.07524), who treat act(gate) of a gated FFN as linear; "exact"
# multiplies the output by exactly the factor in all three.
SCALINGS: dict[str, dict[str, dict[str, float]]] = {
    "none": dict.fromkeys(("gated", "squared", "plain"), {}),
    "down": dict.fromkeys(("gated", "squared", "plain"), {"down": 1}),
    "paper": {
        "gated": {"gate": 1 / 3, "up": 1 / 3, "down": 1 / 3},
        "squared": {"up": 1 / 3, "down": 1 / 3},
        "plain": {"up": 1 / 2, "down": 1 / 2},
    },
    "exact": {
        "gated": {"up": 1 / 2, "down": 1 / 2},
        "squared": {"up": 1 / 3, "down": 1 / 3},
        "plain": {"down": 1},
    },
}


def shape_of_scaling(*, gated: bool, hidden_act: str) -> str:
    return "gated" if gated else "squared" if hidden_act == "relu2" else "plain"


def scale(ffn: FFN, factor: float, *, scaling: str, hidden_act: str) -> FFN:
    """Multiplies the output by about `factor`, spread over the matrices as `scaling` says.

    A bias before the activation is scaled like its matrix, the output's bias by the whole factor.
    """
    exponents = SCALINGS[scaling][shape_of_scaling(gated="gate" in ffn, hidden_act=hidden_act)]
    if not exponents or factor == 1:
        return ffn
    of_leaf = {f"{name}_bias": power for name, power in exponents.items()} | exponents
    of_leaf["down_bias"] = 1
    return {
        name: (w * factor ** of_leaf[name]).astype(w.dtype) if name in of_leaf else w
        for name, w in ffn.items()
    }


def silence(ffn: FFN) -> FFN:
    """Zeroes the output but keeps the inner weights, so that the expert can learn."""
    return {n: jnp.zeros_like(w) if n.startswith("down") else w for n, w in ffn.items()}


def reflect_residual(ffn: FFN, key: jax.Array, *, rank_ratio: float) -> FFN:
    """Keeps each matrix's leading singular directions and flips the others with probability 1/2.

    Singular values and vectors are the parent's: experts differ only in the signs of the smaller
    components.
    """
    reflected = dict(ffn)
    for name in MATRICES:
        if name not in ffn:
            continue
        u, s_R, v = jnp.linalg.svd(ffn[name].astype(jnp.float32), full_matrices=False)
        flips_R = jax.random.rademacher(tree.fold_in(key, name), s_R.shape)
        kept_R = jnp.arange(s_R.size) < math.floor(rank_ratio * s_R.size)
        signed_R = jnp.where(kept_R, s_R, s_R * flips_R)
        product = jnp.matmul(u * signed_R, v, precision="highest")
        reflected[name] = product.astype(ffn[name].dtype)
    return reflected
