"""First values of a router's [D, E] kernel."""

import dataclasses

import jax
import jax.numpy as jnp

STANDARD_DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class RouterPlace:
    """What a router's first values may be made of."""

    key: jax.Array
    D: int
    E: int
    granularity: int = 1  # experts that hold the shards of one feed-forward
    centroids_ED: jax.Array | None = None  # of the router's inputs


def normal(place: RouterPlace) -> jax.Array:
    """N(0, 0.02²), drawn expert by expert: the first experts' columns do not depend on E."""
    return STANDARD_DEVIATION * jax.random.normal(place.key, (place.E, place.D)).T


def centred_uniform(place: RouterPlace) -> jax.Array:
    """Uniform of standard deviation 0.02 minus its own mean (Drop-Upcycling's released code)."""
    uniform_DE = jax.random.uniform(place.key, (place.E, place.D)).T
    return (uniform_DE - jnp.mean(uniform_DE)) * STANDARD_DEVIATION * 12**0.5


def grouped(place: RouterPlace) -> jax.Array:
    """One normal column for each virtual group (He et al., arXiv 2410.07524).

    The G experts of a group, which together hold a whole feed-forward, have the same logits.
    """
    one_each = dataclasses.replace(place, E=place.E // place.granularity)
    return jnp.repeat(normal(one_each), place.granularity, axis=1)


def zero(place: RouterPlace) -> jax.Array:
    """Every expert alike (LLaMA-MoE, arXiv 2406.16554; ties go to the lowest index)."""
    return jnp.zeros((place.D, place.E))


def centroids(place: RouterPlace) -> jax.Array:
    """Clusters of the layer's inputs, as long as a normal column would be.

    Less their mean and what lies along it: what all inputs have in common favours no expert.
    """
    mean_D = jnp.mean(place.centroids_ED, axis=0)
    mean_D /= jnp.maximum(jnp.linalg.norm(mean_D), jnp.finfo(jnp.float32).tiny)
    apart_ED = place.centroids_ED - jnp.outer(place.centroids_ED @ mean_D, mean_D)
    apart_ED -= jnp.mean(apart_ED, axis=0)
    length_E1 = jnp.linalg.norm(apart_ED, axis=1, keepdims=True)
    unit_ED = apart_ED / jnp.maximum(length_E1, jnp.finfo(jnp.float32).tiny)
    return (STANDARD_DEVIATION * place.D**0.5 * unit_ED).T


ROUTER_INITIALISERS = {
    "normal": normal,
    "centred_uniform": centred_uniform,
    "grouped": grouped,
    "zero": zero,
    "centroids": centroids,
}
COPIED = "copied"  # the parent mixture's own columns, shared out as its experts are
