"""Initial values of a router's kernel [D, E]."""

import dataclasses

import jax
import jax.numpy as jnp

STANDARD_DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class RouterContext:
    """The sizes, the key and the statistics of the parent that an initialiser may use."""

    key: jax.Array
    D: int
    E: int
    granularity: int = 1  # the number of experts that hold the shards of one feed-forward
    centroids_ED: jax.Array | None = None  # cluster centres of the router's inputs


def normal(context: RouterContext) -> jax.Array:
    """N(0, 0.02²), drawn expert by expert: the first experts' columns do not depend on E."""
    return STANDARD_DEVIATION * jax.random.normal(context.key, (context.E, context.D)).T


def centred_uniform(context: RouterContext) -> jax.Array:
    """Uniform of standard deviation 0.02 minus its own mean (Drop-Upcycling's released code)."""
    uniform_DE = jax.random.uniform(context.key, (context.E, context.D)).T
    return (uniform_DE - jnp.mean(uniform_DE)) * STANDARD_DEVIATION * 12**0.5


def grouped(context: RouterContext) -> jax.Array:
    """One normal column for each virtual group (He et al., arXiv 2410.07524).

    The G experts of a group, which together hold a whole feed-forward, have the same logits.
    """
    one_each = dataclasses.replace(context, E=context.E // context.granularity)
    return jnp.repeat(normal(one_each), context.granularity, axis=1)


def zero(context: RouterContext) -> jax.Array:
    """All logits are zero (LLaMA-MoE, arXiv 2406.16554; ties go to the lowest index)."""
    return jnp.zeros((context.D, context.E))


def torch_linear(context: RouterContext) -> jax.Array:
    """PyTorch's default for a linear layer, uniform up to 1/sqrt(D), for LLaMA-MoE's MLP router."""
    uniform_ED = jax.random.uniform(context.key, (context.E, context.D), minval=-1)
    return uniform_ED.T / context.D**0.5


def centroids(context: RouterContext) -> jax.Array:
    """Cluster centres of the layer's inputs, with the root-mean-square norm of a normal column.

    Their mean and all components along it are removed: what all inputs share favours no expert.
    """
    assert context.centroids_ED is not None  # the plan refuses this initialiser without them
    centroids_ED = context.centroids_ED
    mean_D = jnp.mean(centroids_ED, axis=0)
    mean_D /= jnp.maximum(jnp.linalg.norm(mean_D), jnp.finfo(jnp.float32).tiny)
    apart_ED = centroids_ED - jnp.outer(centroids_ED @ mean_D, mean_D)
    apart_ED -= jnp.mean(apart_ED, axis=0)
    length_E1 = jnp.linalg.norm(apart_ED, axis=1, keepdims=True)
    unit_ED = apart_ED / jnp.maximum(length_E1, jnp.finfo(jnp.float32).tiny)
    return (STANDARD_DEVIATION * context.D**0.5 * unit_ED).T


ROUTER_INITIALISERS = {
    initialiser.__name__: initialiser
    for initialiser in (normal, centred_uniform, grouped, zero, torch_linear, centroids)
}
COPIED = "copied"  # the MoE parent's own columns, averaged like its experts
