"""Text that any JSON reader reads, whatever the numbers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import strict_json


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (np.float32(0.1), 0.1),
        (float("nan"), None),
        (-np.inf, None),
        (jnp.array([1.0, jnp.inf]), [1.0, None]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([[1], [1, 2], []], [[1], [1, 2], []]),
        ({"a": None, "b": True, "c": (1, "x")}, {"a": None, "b": True, "c": [1, "x"]}),
        ([{"a": np.nan}, {"b": [np.int64(3)]}], [{"a": None}, {"b": [3]}]),
    ],
)
def test_values_are_read_back_and_numbers_that_are_not_finite_are_null(value, read):
    text = strict_json.text(value)
    assert json.loads(text, parse_constant=pytest.fail) == read
