"""Dense parameters to MoE parameters: a pure pytree transform."""

from moe_jax.upcycle.transform import upcycle

__all__ = ["upcycle"]
