"""Checks of a config's values; each refuses an invalid value with a one-line message.

A check is a function of a key's full name and its value, kept in the metadata of the key's field in
`sections.py`.
"""

import contextlib
import dataclasses
import math
import re
import reprlib
from collections.abc import Callable, Iterator
from typing import Any

from moe_jax import files, spelling


class ConfigError(ValueError):
    """A mistake in a config or on the command line; its message is the one line to print."""


@contextlib.contextmanager
def refusing(before: str = "", after: str = "") -> Iterator[None]:
    """Turns a ValueError or OSError in the block into a ConfigError: before + message + after."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split()) + files.fix(error)
        raise ConfigError(f"{before}{text}{after}") from error


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number for which `holds` is true."""

    complaint: str
    holds: Callable[[float], bool]

    def __call__(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise ConfigError(f"{name}={value} is not a finite number; it {self.complaint}")
        if not self.holds(value):
            raise ConfigError(f"{name}={value} {self.complaint}")


POSITIVE = Number("must be more than 0", lambda v: v > 0)
NOT_NEGATIVE = Number("must not be negative", lambda v: v >= 0)
SHARE = Number("must be from 0 to 1", lambda v: 0 <= v <= 1)
DECAY_RATE = Number("must be from 0 to less than 1", lambda v: 0 <= v < 1)
AXIS_SIZE = Number("must be at least 1, or -1 to fill", lambda v: v >= 1 or v == -1)


def seed(name: str, value: int) -> None:
    NOT_NEGATIVE(name, value)
    if value >= 2**31:
        raise ConfigError(f"{name}={value} must be less than 2**31")


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of `choices()`, which is called at each check because a table of choices may grow."""

    choices: Callable[[], tuple[str, ...]]

    def __call__(self, name: str, value: str) -> None:
        if value not in (choices := self.choices()):
            raise ConfigError(spelling.unknown(name, value, choices))


def one_of(*choices: str) -> OneOf:
    return OneOf(lambda: choices)


def pattern(name: str, value: str) -> None:
    """Refuses a string that is not a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(f"{name}={value!r} is not a regular expression: {error}") from None


def texts(name: str, value: tuple) -> None:
    """Refuses all but texts; the flag library takes digits for a number."""
    for text in value:
        if not isinstance(text, str):
            raise ConfigError(
                f"{name}={value!r} has {text!r}, which is no text: use \"('{text}',)\""
            )


def rules(name: str, value: tuple) -> None:
    """Refuses anything but pairs of a regular expression and a factor."""
    for rule in value:
        match rule:
            case (str(expression), int() | float() as factor) if 0 <= factor < math.inf:
                pattern(name, expression)
            case _:
                need = "pairs of a regular expression and a factor of at least 0"
                raise ConfigError(f"{name} has {rule!r}; use {need}")


def ranges(name: str, value: tuple) -> None:
    """Refuses anything but pairs (first, last) of whole numbers."""
    for pair in value:
        match pair:
            case (int() as first, int() as last) if 0 <= first <= last:
                continue
        need = 'pairs (first, last) of whole numbers, such as "((1200, 1249),)"'
        raise ConfigError(f"{name} has {pair!r}; use {need}")


def intervals(name: str, value: tuple) -> None:
    """Refuses anything but pairs of a name and a number of steps."""
    for pair in value:
        match pair:
            case (str(), int() as every) if every >= 0 and not isinstance(every, bool):
                continue
        need = "pairs of an evaluator's name and a whole number of steps of at least 0"
        raise ConfigError(f"{name} has {pair!r}; use {need}")


def named_texts(name: str, value: tuple) -> None:
    """Refuses anything but pairs of a name and a text."""
    need = "pairs (name, text) with different names, such as \"(('wiki', 'wiki.jsonl'),)\""
    _refuse_unless(_is_table(value, lambda text: isinstance(text, str)), name, value, need)


def named_numbers(name: str, value: tuple) -> None:
    """Refuses anything but pairs of a name and a finite number of at least 0."""
    need = "pairs (name, number of at least 0) with different names, such as \"(('wiki', 0.5),)\""
    _refuse_unless(_is_table(value, _is_weight), name, value, need)


def stages(name: str, value: tuple) -> None:
    """Refuses anything but pairs of a step and a table for `named_numbers`, by growing steps."""
    need = "pairs (step, shares) of growing steps above 0, such as \"((9000, (('wiki', 1),)),)\""
    before = 0
    for stage in value:
        match stage:
            case (int() as step, tuple() as shares) if step > before and shares:
                _refuse_unless(_is_table(shares, _is_weight), name, stage, need)
                before = step
            case _:
                _refuse_unless(False, name, stage, need)


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_table(pairs: tuple, is_value: Callable[[Any], bool]) -> bool:
    try:
        names = [
            name for name, value in pairs if isinstance(name, str) and name and is_value(value)
        ]
    except (ValueError, TypeError):  # they are not pairs
        return False
    return len(set(names)) == len(pairs)


def _refuse_unless(right: bool, name: str, value: object, need: str) -> None:
    if not right:
        raise ConfigError(f"{name} has {reprlib.repr(value)}; use {need}")


def steps(name: str, value: tuple) -> None:
    """Refuses anything but (first, last) with 1 <= first <= last, or nothing."""
    match value:
        case () | []:
            return
        case (int() as first, int() as last) if 1 <= first <= last and not isinstance(first, bool):
            return
    raise ConfigError(f'{name}={value!r} is no pair of steps; use (first, last), such as "(5,7)"')
