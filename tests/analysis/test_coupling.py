"""The coupling of experts and router rows against loops and cases worked by hand."""

import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import hf, stores
from moe_jax.analysis import coupling
from moe_jax.model import layout
from moe_jax.parallel import mesh as meshes
from tests.hf.test_golden import GOLDEN


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
    assert found.p == 1  # no fewer rows than none can be expected


def test_the_p_value_is_that_of_a_random_pairing():
    """All of 4 rows are answered by their own expert in one of 4! = 24 pairings."""
    found = coupling.coupling(np.eye(4), {"up": np.stack([np.diag(row) for row in np.eye(4)])})
    assert found.rows == 1 and found.p == pytest.approx(1 / 24, abs=0.01)


def test_a_models_coupling_is_that_of_its_layers(tmp_path):
    weights = stores.weights(configs.Source(GOLDEN / "qwen3_moe_mixed"))
    params = hf.load(GOLDEN / "qwen3_moe_mixed", mesh=meshes.one_device())[1]
    found = coupling.of_model(weights)
    assert list(found) == layout.sparse_layers(weights.config)
    for layer, own in found.items():
        moe = layout.layer(params, weights.config, layer, "moe")
        whole = coupling.coupling(moe["router"]["kernel"], moe["experts"])
        np.testing.assert_allclose(own.norm_EE, whole.norm_EE, rtol=1e-6)
