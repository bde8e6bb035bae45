"""Dense parameters to MoE parameters: a pure pytree transform."""

from moe_jax.upcycle.params import upcycle

__all__ = ["upcycle"]
