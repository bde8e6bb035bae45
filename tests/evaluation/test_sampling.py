"""Draws have the shares that the settings leave, as Transformers' processors leave them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.evaluation import sampling
from moe_jax.evaluation.sampling import Sampling

PROBABILITIES_V = np.array([0.1, 0.4, 0.3, 0.2])
DRAWS = 4000


@jax.jit
def tokens(settings, seen_BV):
    logits_BV = jnp.tile(jnp.log(PROBABILITIES_V), (DRAWS, 1))
    return sampling.draw(logits_BV, settings, jax.random.key(0), seen_BV)


def shares(seen=(), **settings):
    seen_BV = np.tile(np.isin(np.arange(4), seen), (DRAWS, 1))
    return np.bincount(tokens(Sampling(**settings), seen_BV), minlength=4) / DRAWS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBABILITIES_V),
        ({"top_p": 0.6}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_k": 3}, [0, 4 / 9, 3 / 9, 2 / 9]),
        ({"top_k": 9}, PROBABILITIES_V),
        ({"min_p": 0.45}, [0, 4 / 9, 3 / 9, 2 / 9]),
        ({"min_p": 0.6}, [0, 4 / 7, 3 / 7, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        # After top_k the shares are 4/9, 3/9 and 2/9, so that two reach 0.7.
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 3 / 7, 0]),
        ({"temperature": 2.0}, PROBABILITIES_V**0.5 / np.sum(PROBABILITIES_V**0.5)),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1e-38}, [0, 1, 0, 0]),
    ],
)
def test_shares_are_those_that_the_settings_leave(settings, expected):
    # Five standard deviations of a share among 4000 draws are at most 0.04.
    np.testing.assert_allclose(shares(**{"temperature": 1.0} | settings), expected, atol=0.04)


def test_a_repetition_penalty_lowers_what_a_text_has():
    """Logits are negative here, so the penalty multiplies them: 0.4 ** 2 = 0.16."""
    assert shares(seen=[1], repetition_penalty=2.0)[2] == 1
    less_V = np.array([0.1, 0.16, 0.3, 0.2])
    found = shares(seen=[1], repetition_penalty=2.0, temperature=1.0)
    np.testing.assert_allclose(found, less_V / less_V.sum(), atol=0.04)
    positive = sampling.draw(
        jnp.array([[3.0, 2.0]]),
        Sampling(repetition_penalty=2.0),
        jax.random.key(0),
        jnp.array([[True, False]]),
    )
    assert positive[0] == 1  # 3 / 2 is less than 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be "):
        sampling.check(Sampling(**{name: value}))
