"""The kinds of values in config.json, each with a description and a test."""

import dataclasses
import reprlib
import sys
import typing
from collections.abc import Callable
from typing import Any

from moe_jax.model.comparison import SAME_ACTIVATION
from moe_jax.model.config import FULL_ATTENTION, SLIDING_ATTENTION, ModelConfig, choices


class UnsupportedError(ValueError):
    """A config.json that we cannot read, or a model that no family can hold; a one-line message."""


class Kind(typing.NamedTuple):
    """A kind of value; `words` follow "must be" in an error message."""

    words: str
    fits: Callable[[Any], bool]  # its argument is a value that JSON can hold

    def or_null(self) -> "Kind":
        return Kind(f"{self.words}, or null", lambda value: value is None or self.fits(value))


@dataclasses.dataclass(frozen=True)
class Part:
    """Keys that are read together; `keys`: their name -> (kind, the class's default)."""

    keys: dict[str, tuple]
    read: Callable[[dict], dict]  # gets the values of all the family's keys
    write: Callable[[ModelConfig], dict]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _whole(low: int, high: int = 2**31 - 1) -> Kind:
    return Kind(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def _one_of(choices: tuple[str, ...]) -> Kind:
    return Kind(f"one of {', '.join(choices)}", lambda value: value in choices)


def list_of(kind: Kind) -> Kind:
    return Kind(
        f"a list, each {kind.words}",
        lambda value: type(value) is list and all(map(kind.fits, value)),
    )


COUNT, INDEX = _whole(1), _whole(0)
DEPTH = _whole(1, 256)  # as in ModelConfig
NUMBER = Kind("a number more than 0", lambda value: _is_number(value) and value > 0)
SPREAD = Kind("a number of at least 0", lambda value: _is_number(value) and value >= 0)
FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("a string", lambda value: type(value) is str)
OBJECT = Kind("an object", lambda value: type(value) is dict)
LAYER_TYPES = list_of(_one_of((FULL_ATTENTION, SLIDING_ATTENTION)))

TYPES = typing.get_type_hints(ModelConfig)
KIND_OF_TYPE = {int: COUNT, float: NUMBER, bool: FLAG, str: TEXT}
KIND_OF_FIELD = {
    "num_hidden_layers": DEPTH,
    "initializer_range": SPREAD,
    "hidden_act": _one_of(tuple(dict.fromkeys((*choices("hidden_act"), *SAME_ACTIVATION)))),
}


def kind_of(field: str) -> Kind:
    """The kind of a field of ModelConfig, according to its type."""
    plain, *null = typing.get_args(TYPES[field]) or (TYPES[field],)
    kind = KIND_OF_FIELD.get(field, KIND_OF_TYPE[plain])
    return kind.or_null() if null else kind


def check(name: str, value: object, kind: Kind) -> None:
    if not kind.fits(value):
        raise UnsupportedError(f"{name}={reprlib.repr(value)} must be {kind.words}")
