"""Mixture-of-Experts language models in JAX: train, upcycle, shard, look inside."""

import importlib

__all__ = ["hf", "model", "upcycle"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # Imported on first use, so that a mistake on the command line is reported without loading jax.
    if name in __all__:
        return importlib.import_module(f"moe_jax.{name}")
    raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
