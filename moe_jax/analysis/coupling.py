"""The coupling of experts and router rows: does an expert answer its own row the most?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis import recording
from moe_jax.model import layout

DRAWS = 9999


@dataclasses.dataclass(frozen=True)
class Coupling:
    """The coupling of one layer's router rows and experts.

    norm_EE: entry (i, j) is the norm of expert j's inner activations for the router row of i.
    rows, columns: the fraction of rows, and of columns, whose largest entry is on the diagonal: 1
      if each expert responds most to its own row. The base line is 1/E.
    p: that as many rows or more are answered by their own expert if rows and experts are paired at
      random, by permutation.
    """

    norm_EE: np.ndarray
    rows: float
    columns: float
    p: float


def of_model(weights: recording.Weights) -> dict[int, Coupling]:
    """The coupling of each sparse layer; it reads the routers and the experts' first matrices.

    Raises: ValueError for a model whose routers have no rows.
    """
    found = {}
    for layer in layout.sparse_layers(weights.config):
        slot, row = layout.slots(weights.config.block_kinds)[layer]
        at, index = f"blocks/{slot}/moe", (slice(row, row + 1),)
        if f"{at}/router/kernel" not in weights.paths:
            raise ValueError("the model's routers have no rows, so no expert can answer its own")
        name = "gate" if f"{at}/experts/gate" in weights.paths else "up"
        [kernel_DE], [matrix_EDF] = (
            weights.leaf(f"{at}/{path}", index) for path in ("router/kernel", f"experts/{name}")
        )
        found[layer] = coupling(jnp.asarray(kernel_DE), {name: jnp.asarray(matrix_EDF)})
    return found


def coupling(kernel_DE: jax.Array, experts: dict) -> Coupling:
    """The matrix M_ij = |R_i W_j| of the expert-router coupling loss (arXiv 2512.23447).

    R_i is the router's row of expert i, and W_j is expert j's gate matrix, or its first matrix if
    it has no gate. The loss draws the rows with noise; this measure leaves them as they are.

    Args:
      kernel_DE: the router's kernel, one column per expert.
      experts: the experts' matrices by name, `gate` or `up` [E, D, F].
    """
    norm_EE = np.asarray(_norms(kernel_DE, experts["gate" if "gate" in experts else "up"]))
    own_E = np.arange(len(norm_EE))
    rows, columns = (np.mean(norm_EE.argmax(axis=axis) == own_E) for axis in (1, 0))
    drawn_DE = np.random.default_rng(0).permuted(np.tile(own_E, (DRAWS, 1)), axis=1)
    as_many_D = (drawn_DE == norm_EE.argmax(axis=1)).mean(axis=1) >= rows
    p = (1 + int(as_many_D.sum())) / (1 + DRAWS)
    return Coupling(norm_EE, rows=float(rows), columns=float(columns), p=p)


@jax.jit
def _norms(kernel_DE: jax.Array, matrix_EDF: jax.Array) -> jax.Array:
    row_ED = kernel_DE.T.astype(jnp.float32)

    def of_expert(matrix_DF):
        inner_EF = jnp.matmul(row_ED, matrix_DF.astype(jnp.float32), precision="highest")
        return jnp.linalg.norm(inner_EF, axis=1)

    return jax.lax.map(of_expert, matrix_EDF).T
