"""First values of a router's [D, E] kernel."""

import jax
import jax.numpy as jnp

STANDARD_DEVIATION = 0.02


def normal(key: jax.Array, D: int, E: int) -> jax.Array:
    """N(0, 0.02²), drawn expert by expert: the first experts' columns do not depend on E."""
    return STANDARD_DEVIATION * jax.random.normal(key, (E, D)).T


def centred_uniform(key: jax.Array, D: int, E: int) -> jax.Array:
    """Uniform of standard deviation 0.02 minus its own mean (Drop-Upcycling's released code)."""
    uniform_DE = jax.random.uniform(key, (E, D)).T
    return (uniform_DE - jnp.mean(uniform_DE)) * STANDARD_DEVIATION * 12**0.5


ROUTER_INITIALISERS = {"normal": normal, "centred_uniform": centred_uniform}
