"""A run's config: read from files and flags, resolved into dataclasses that check themselves."""

from moe_jax.config.checks import ConfigError
from moe_jax.config.defaults import default
from moe_jax.config.reading import load, load_json, model_fields, parse, save_json
from moe_jax.config.resolved import Run, resolve

__all__ = [
    "ConfigError",
    "Run",
    "default",
    "load",
    "load_json",
    "model_fields",
    "parse",
    "resolve",
    "save_json",
]
