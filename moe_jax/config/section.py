"""A section of a config: a frozen dataclass whose fields are keys with explanations and checks."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from moe_jax.config.checks import ConfigError
from moe_jax.model.fields import Need


def key(
    default: Any,
    explanation: str,
    check: Callable | None = None,
    *needs: Need,
    fixed: bool | None = None,
) -> Any:
    """A field that is a key of the config; `check(name, value)` raises ConfigError.

    needs: conditions on the whole `Run` without which nothing reads the key.
    fixed: True if the key decides which text a step sees, so that it may not change in a resumed
      run; None takes the section's value.
    """
    metadata = {"explanation": explanation, "check": check, "needs": needs, "fixed": fixed}
    return dataclasses.field(default=default, metadata=metadata)


def key_names(section: "type[Section]") -> list[str]:
    """The keys of a section, without those of its subsections."""
    return [f.name for f in dataclasses.fields(section) if "explanation" in f.metadata]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a config at the dotted `path`; it checks its values when it is created."""

    path: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]  # needs of all its keys
    fixed: ClassVar[bool | None]  # default for its keys; None takes the enclosing section's value

    def __init_subclass__(cls, path: str, needs: tuple[Need, ...] = (), fixed: bool | None = None):
        cls.path, cls.needs, cls.fixed = path, needs, fixed

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if check := field.metadata.get("check"):
                name = f"{self.path}.{field.name}".removeprefix(".")
                check(f"config.{name}", getattr(self, field.name))
        for problem in self.problems():
            raise ConfigError(problem)

    def problems(self) -> Iterator[str]:
        """A line for each mistake that involves several values."""
        yield from ()


def part(section: type[Section]) -> Any:
    """A field that is a subsection."""
    return dataclasses.field(default_factory=section)


def section_of(field: dataclasses.Field) -> type[Section] | None:
    """The class of a field that is a subsection; None for any other field."""
    factory = field.default_factory
    return factory if isinstance(factory, type) and issubclass(factory, Section) else None
