"""The coupling of experts and router rows against loops and cases worked by hand."""

import numpy as np

from moe_jax.analysis import coupling


def test_coupling_is_that_of_loops_and_finds_experts_that_answer_their_rows():
    rng = np.random.default_rng(6)
    kernel_DE, gate_EDF = rng.normal(size=(5, 3)), rng.normal(size=(3, 5, 4))
    found = coupling.coupling(kernel_DE, {"gate": gate_EDF, "up": 0 * gate_EDF})
    looped = [[np.linalg.norm(kernel_DE[:, i] @ gate_EDF[j]) for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(found.norm_EE, looped, rtol=1e-5)
    tuned = np.einsum("de,f->edf", kernel_DE, np.ones(4))  # W_j answers R_j with |R_j|^2
    tuned /= np.linalg.norm(kernel_DE, axis=0)[:, None, None]
    assert coupling.coupling(kernel_DE, {"up": tuned}).rows == 1


def test_coupling_by_hand():
    """R = unit rows, W_0 = diag(1, 3), W_1 = diag(2, 1): row 0 answers W_1 most, row 1 W_0."""
    found = coupling.coupling(np.eye(2), {"up": np.array([np.diag([1.0, 3]), np.diag([2.0, 1])])})
    assert found.norm_EE.tolist() == [[1, 2], [3, 1]]
    assert (found.rows, found.columns) == (0, 0)
