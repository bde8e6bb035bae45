"""A run's config: read from files and flags, resolved into dataclasses that check themselves."""

from moe_jax.config.checks import ConfigError
from moe_jax.config.reading import default, load, load_json, model_fields, parse, save_json
from moe_jax.config.resolved import Run, of_stored, resolve
from moe_jax.config.sections import Balance, Data, Evaluation, Objective, Optimizer, Training

__all__ = ["ConfigError", "Run", "default", "load", "load_json", "model_fields", "parse"]
__all__ += ["of_stored", "resolve", "save_json"]
__all__ += ["Balance", "Data", "Evaluation", "Objective", "Optimizer", "Training"]
