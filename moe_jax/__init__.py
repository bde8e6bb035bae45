"""Mixture-of-Experts language models in JAX: train, upcycle, shard, look inside."""

from moe_jax import model, upcycle

__all__ = ["model", "upcycle"]
__version__ = "0.1.0"
