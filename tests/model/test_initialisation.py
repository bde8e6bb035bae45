"""The distributions of a new model's weights."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import model, tree
from moe_jax.model.config import DENSE, MOE

# Each kind of feed-forward; wide enough for a deviation of 500 numbers to be known to 10 %.
MIXED = model.ModelConfig(
    *(64, 32, 48, 2, 4),
    num_experts=4,
    num_experts_per_tok=2,
    layers=(DENSE, MOE),
    shared_expert_intermediate_size=48,
)


def weights(config):
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))
    return {n: np.asarray(w) for n, w in tree.flatten(params).items() if not n.endswith("scale")}


NORMAL = weights(MIXED)


def test_scaled_outputs_divide_what_is_added_to_the_residual_stream_by_sqrt_2l():
    scaled = weights(dataclasses.replace(MIXED, initializer="scaled_outputs"))
    outputs = {n for n in scaled if n.endswith(("attention/wo", "/down"))}
    assert len(outputs) == 2 + 3  # attention twice; dense, experts', shared feed-forward
    for name, w in scaled.items():
        if name in outputs:
            np.testing.assert_allclose(w * np.sqrt(2 * 2), NORMAL[name], rtol=1e-6)
            assert w.std() == pytest.approx(0.02 / 2, rel=0.1)
        else:
            np.testing.assert_array_equal(w, NORMAL[name])


def test_truncated_normals_have_the_shape_of_a_normal_and_nothing_beyond_three():
    together = np.concatenate([w.ravel() for w in NORMAL.values()])
    assert (np.abs(together) > 3 * 0.02).any()
    for name, w in weights(dataclasses.replace(MIXED, initializer="truncated_normal")).items():
        assert 2 * 0.02 < np.abs(w).max() <= 3 * 0.02, name
        # sqrt(1 - 2 · 3 φ(3) / (1 - 2 Φ(-3))) = 0.9867 of the deviation is left.
        assert w.std() == pytest.approx(0.9867 * 0.02, rel=0.1), name
