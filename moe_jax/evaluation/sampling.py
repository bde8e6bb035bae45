"""Draws the next token from the logits: greedy, or by temperature, top-k, top-p and min-p."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """The settings of a draw, which compiled code takes as numbers; the default is greedy.

    They apply in this order, as in Transformers:

    Attributes:
      repetition_penalty: divides the positive logits of the tokens that a text already has, and
        multiplies their negative ones (Keskar et al., arXiv 1909.05858); 1 changes nothing.
      temperature: divides the logits; 0 takes the most probable token, whatever follows.
      top_k: keeps this number of the most probable tokens; 0 keeps all.
      top_p: keeps the fewest tokens with at least this total probability (nucleus sampling,
        Holtzman et al., arXiv 1904.09751).
      min_p: keeps the tokens with at least this share of the highest probability (Nguyen et al.,
        arXiv 2407.01082).
    """

    repetition_penalty: Any = 1.0
    temperature: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0


GREEDY = Sampling()
# Setting -> (a test of its value, the allowed values in words).
RANGES = {
    "repetition_penalty": (lambda x: 0 < x < math.inf, "more than 0"),
    "temperature": (lambda x: 0 <= x < math.inf, "at least 0"),
    "top_k": (lambda x: x >= 0 and x == int(x), "a whole number, at least 0"),
    "top_p": (lambda x: 0 < x <= 1, "more than 0 and up to 1"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
}


def check(sampling: Sampling) -> None:
    """Raises ValueError for a setting out of its range."""
    for name, value in sampling._asdict().items():
        allowed, words = RANGES[name]
        if not allowed(value):
            raise ValueError(f"{name}={value} must be {words}")


def draw(
    logits_BV: jax.Array, sampling: Sampling, key: jax.Array, seen_BV: jax.Array | None = None
) -> jax.Array:
    """A token for each row, [B].

    Args:
      key: a row's draw depends on it and on the row's index.
      seen_BV: True for the tokens that the row's text already has.
    """
    if seen_BV is not None:
        logits_BV = jax.lax.cond(
            sampling.repetition_penalty == 1,
            lambda: logits_BV,
            lambda: _penalised(logits_BV, seen_BV, sampling.repetition_penalty),
        )
    return jax.lax.cond(
        sampling.temperature > 0,
        lambda: _drawn(logits_BV, sampling, key),
        lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    )


def _penalised(logits_BV, seen_BV, penalty):
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, less_BV, logits_BV)


def _drawn(logits_BV, sampling, key):
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits_BV)))
    below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)  # prevents overflow
    scaled_BV = below_BV / jnp.maximum(sampling.temperature, 1e-30)
    order_BV = jnp.argsort(-scaled_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    rank_V = jnp.arange(logits_BV.shape[-1])
    among_V = (rank_V < sampling.top_k) | (sampling.top_k == 0)
    probability_BV = jax.nn.softmax(sorted_BV, where=among_V)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    likely_BV = probability_BV >= sampling.min_p * probability_BV[:, :1]
    # The most probable token is always kept, whatever the settings are.
    kept_BV = among_V & (before_BV < sampling.top_p) & likely_BV | (rank_V == 0)
    place_B = jax.vmap(jax.random.categorical)(rows, jnp.where(kept_BV, sorted_BV, -jnp.inf))
    return jnp.take_along_axis(order_BV, place_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
