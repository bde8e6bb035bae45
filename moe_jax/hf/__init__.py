"""Hugging Face folders in and out."""

from moe_jax.hf.load import load
from moe_jax.hf.save import save

__all__ = ["load", "save"]
