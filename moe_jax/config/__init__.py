"""A run's config: read from files and flags, resolved into dataclasses that check themselves."""

from moe_jax.config.checks import ConfigError
from moe_jax.config.defaults import default
from moe_jax.config.reading import load, load_json, model_fields, parse, save_json
from moe_jax.config.resolved import Run, resolve
from moe_jax.config.sections import (
    Balance,
    Checkpoint,
    Data,
    Evaluation,
    Init,
    Mesh,
    Objective,
    Optimizer,
    Training,
    Upcycle,
)

__all__ = [
    "Balance",
    "Checkpoint",
    "ConfigError",
    "Data",
    "Evaluation",
    "Init",
    "Mesh",
    "Objective",
    "Optimizer",
    "Run",
    "Training",
    "Upcycle",
    "default",
    "load",
    "load_json",
    "model_fields",
    "parse",
    "resolve",
    "save_json",
]
