"""The coupling of experts and router rows: does an expert answer its own row the most?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Coupling:
    """The coupling of one layer's router rows and experts.

    norm_EE: entry (i, j) is the norm of expert j's inner activations for the router row of i.
    rows, columns: the fraction of rows, and of columns, whose largest entry is on the diagonal: 1
      if each expert responds most to its own row. The base line is 1/E.
    """

    norm_EE: np.ndarray
    rows: float
    columns: float


def coupling(kernel_DE: jax.Array, experts: dict) -> Coupling:
    """The matrix M_ij = |R_i W_j| of the expert-router coupling loss (arXiv 2512.23447).

    R_i is the router's row of expert i, and W_j is expert j's gate matrix, or its first matrix if
    it has no gate. The loss draws the rows with noise; this measure leaves them as they are.

    Args:
      kernel_DE: the router's kernel, one column per expert.
      experts: the experts' matrices by name, `gate` or `up` [E, D, F].
    """
    norm_EE = np.asarray(_norms(kernel_DE, experts.get("gate", experts["up"])))
    own_E = np.arange(len(norm_EE))
    rows, columns = (np.mean(norm_EE.argmax(axis=axis) == own_E) for axis in (1, 0))
    return Coupling(norm_EE, rows=float(rows), columns=float(columns))


@jax.jit
def _norms(kernel_DE: jax.Array, matrix_EDF: jax.Array) -> jax.Array:
    row_ED = kernel_DE.T.astype(jnp.float32)

    def of_expert(matrix_DF):
        inner_EF = jnp.matmul(row_ED, matrix_DF.astype(jnp.float32), precision="highest")
        return jnp.linalg.norm(inner_EF, axis=1)

    return jax.lax.map(of_expert, matrix_EDF).T
