"""Reads and writes Hugging Face folders."""

from moe_jax.hf.folders import load
from moe_jax.hf.writing import save

__all__ = ["load", "save"]
