"""The transformer: configuration, parameters, forward pass."""

from moe_jax.model.config import ModelConfig
from moe_jax.model.presets import PRESETS
from moe_jax.model.transformer import Output, apply, count_parameters, init

__all__ = ["PRESETS", "ModelConfig", "Output", "apply", "count_parameters", "init"]
