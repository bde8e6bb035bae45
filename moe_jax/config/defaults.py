"""The config that every config file starts from."""

import dataclasses
import types
import typing

from ml_collections import ConfigDict, config_dict

from moe_jax.config.resolved import Run
from moe_jax.config.sections import section_of
from moe_jax.model.config import ModelConfig
from moe_jax.upcycle import recipes


def default() -> ConfigDict:
    """All sections with their defaults; a None is a typed place holder ("not set").

    It is locked: a key that it does not have cannot be set.
    """
    config = {}
    for field in dataclasses.fields(Run):
        if field.name == "model":
            config["model"] = {"preset": "", **_model_placeholders()}
        elif section := section_of(field):
            config[field.name] = dataclasses.asdict(section())
        elif "explanation" in field.metadata:
            config[field.name] = field.default
    upcycle = config["init"]["upcycle"]
    del upcycle["parameters"]
    upcycle.update(_recipe_placeholders())
    return ConfigDict(config).lock()


def _model_placeholders() -> dict:
    hints = typing.get_type_hints(ModelConfig)
    return {
        field.name: config_dict.placeholder(plain_type(hints[field.name]))
        for field in dataclasses.fields(ModelConfig)
    }


def _recipe_placeholders() -> dict:
    defaults = {}
    for recipe in recipes.RECIPES.values():
        defaults |= recipe.defaults
    return {name: config_dict.placeholder(type(value)) for name, value in defaults.items()}


def plain_type(hint: typing.Any) -> type:
    """The type of a field's values: `int | None` is int, `tuple[str, ...]` is tuple."""
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    return typing.get_origin(hint) or hint
