"""The transformer: configuration, parameters, forward pass."""

import typing

from moe_jax.model.config import ModelConfig
from moe_jax.model.presets import PRESETS

if typing.TYPE_CHECKING:
    from moe_jax.model.transformer import Output, apply, count_parameters, init

__all__ = ["PRESETS", "ModelConfig", "Output", "apply", "count_parameters", "init"]


def __getattr__(name: str):
    # Imported on first use: reading a config must not import Flax and the kernels.
    if name in __all__:
        from moe_jax.model import transformer

        return getattr(transformer, name)
    raise AttributeError(f"module 'moe_jax.model' has no attribute {name!r}")
