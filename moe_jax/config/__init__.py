"""A run's config: read from files and flags, then resolved into dataclasses with checks."""

from moe_jax.config.checks import ConfigError
from moe_jax.config.data import Data
from moe_jax.config.mixture import Mixture
from moe_jax.config.monitoring import Checkpoint, Evaluation, Guards, Profile
from moe_jax.config.objectives import Objective
from moe_jax.config.reading import default, load, load_json, model_fields, parse, save_json
from moe_jax.config.resolved import AUTO, data_of, model_of, of_stored, resolve, tokenizer_of
from moe_jax.config.run import Run
from moe_jax.config.sections import Balance, Optimizer, Training
from moe_jax.config.source import Source, checkpoints_of, source_of

__all__ = ["AUTO", "ConfigError", "Run", "checkpoints_of", "default", "load", "load_json"]
__all__ += ["data_of", "model_fields", "parse"]
__all__ += ["model_of", "of_stored", "resolve", "save_json", "source_of", "tokenizer_of"]
__all__ += [
    "Balance",
    "Checkpoint",
    "Data",
    "Evaluation",
    "Guards",
    "Mixture",
    "Objective",
    "Optimizer",
]
__all__ += ["Profile", "Source", "Training"]
