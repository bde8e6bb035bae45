"""Small transforms of one expert: a layer's feed-forward weights and a key to new weights.

An FFN here is a dict of one layer's matrices, `gate` DF (if any), `up` DF, `down` FD, and of its
biases if any, `gate_bias` F, `up_bias` F, `down_bias` D. Each function is the
unit that every path shares (in memory, sharded): run inside `jax.lax.map`, never `vmap`, the
results are bitwise the same everywhere.
"""

import math

import jax
import jax.numpy as jnp

from moe_jax.parallel import naming

FFN = dict[str, jax.Array]

# The axis along which an array has one slice for each hidden neuron.
NEURON_AXIS = {"gate": 1, "up": 1, "down": 0, "gate_bias": 0, "up_bias": 0}
MATRICES = ("gate", "up", "down")


def num_neurons(ffn: FFN) -> int:
    return ffn["up"].shape[NEURON_AXIS["up"]]


def permute_neurons(ffn: FFN, key: jax.Array) -> FFN:
    """The same function with its neurons in another order."""
    order_F = jax.random.permutation(naming.fold_in(key, "order"), num_neurons(ffn))
    return {
        name: jnp.take(w, order_F, axis=NEURON_AXIS[name]) if name in NEURON_AXIS else w
        for name, w in ffn.items()
    }


def redraw_neurons(ffn: FFN, key: jax.Array, *, ratio: float, index_sharing: str) -> FFN:
    """Redraws floor(ratio·F) neurons from normals with the mean and deviation of what they replace.

    Mean and unbiased standard deviation are two scalars for each matrix, over all entries of its
    selected slices (Nakamura et al., Drop-Upcycling, arXiv 2502.19261, §3). Biases are kept.

    Args:
      index_sharing: "neuron": the three matrices share one set of neurons (the paper's text);
        "per_matrix": each draws its own (the released code).
    """
    F = num_neurons(ffn)
    count = math.floor(ratio * F)
    if count == 0:
        return ffn
    redrawn = dict(ffn)
    for name in MATRICES:
        if name not in ffn:
            continue
        w = ffn[name]
        key_matrix = naming.fold_in(key, name)
        key_index = {"neuron": key, "per_matrix": key_matrix}[index_sharing]
        index = jax.random.permutation(naming.fold_in(key_index, "neurons"), F)[:count]
        index = (slice(None),) * NEURON_AXIS[name] + (index,)
        block = w[index].astype(jnp.float32)
        values = jax.random.normal(naming.fold_in(key_matrix, "values"), block.shape)
        values = jnp.mean(block) + jnp.std(block, ddof=1) * values
        redrawn[name] = w.at[index].set(values.astype(w.dtype))
    return redrawn
