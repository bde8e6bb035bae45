"""Lists all keys of a config with their defaults and explanations, and resolved configs."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from moe_jax import spelling
from moe_jax.config.checks import ConfigError
from moe_jax.config.run import Run
from moe_jax.config.section import section_of
from moe_jax.model.config import ModelConfig
from moe_jax.upcycle import recipes


class Key(NamedTuple):
    name: str  # the dotted name, "optimizer.learning_rate"
    default: object
    explanation: str


def keys(section: str = "") -> list[Key]:
    """The keys of a section ("optimizer"), or of all sections.

    Raises: ConfigError for a section that does not exist.
    """
    found = list(_keys_of(Run, ""))
    inside = [key for key in found if not section or key.name.startswith(f"{section}.")]
    if not inside:
        sections = dict.fromkeys(k.name.rpartition(".")[0] for k in found if "." in k.name)
        raise ConfigError(spelling.unknown("section", section, sections))
    return inside


def _keys_of(kind: type, before: str) -> Iterator[Key]:
    for field in dataclasses.fields(kind):
        name = f"{before}{field.name}"
        if section := section_of(field):
            yield from _keys_of(section, f"{name}.")
        elif name == "model":
            yield Key(
                "model.preset", "", "published model that sets the defaults of model's fields"
            )
            yield from _keys_of(ModelConfig, "model.")
        elif "explanation" in field.metadata:
            default = None if field.default is dataclasses.MISSING else field.default
            yield Key(name, default, field.metadata["explanation"])
    if before == "init.upcycle.":
        yield from _parameters_of_recipes()


def _parameters_of_recipes() -> Iterator[Key]:
    owners: dict[str, dict[str, object]] = {}
    for recipe, row in recipes.RECIPES.items():
        for name, value in row.defaults.items():
            owners.setdefault(name, {})[recipe] = value
    for name, defaults in owners.items():
        shown = ", ".join(f"{recipe} ({value})" for recipe, value in defaults.items())
        yield Key(f"init.upcycle.{name}", None, f"parameter of {shown}")


def text(section: str = "") -> str:
    """The keys as lines of text for a terminal."""
    lines = (f"{k.name}={shown(k.default)}\n    {k.explanation}" for k in keys(section))
    return "\n".join(lines)


def page() -> str:
    """The keys as a Markdown table."""
    rows = [(f"`{k.name}`", f"`{shown(k.default)}`", k.explanation) for k in keys()]
    lines = [("key", "default", "meaning"), ("---",) * 3, *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)


def shown(value: object) -> str:
    """A value as text for lines and tables."""
    if value is None:
        return "none"
    return repr(value) if isinstance(value, str | tuple) else str(value)


def resolved(run: Run) -> dict[str, object]:
    """The value of every key of a run, including the fields of its model."""
    values = dataclasses.asdict(dataclasses.replace(run, config=ConfigDict()))
    del values["config"]
    upcycle = values["init"]["upcycle"]
    upcycle |= upcycle.pop("parameters")
    return dict(_flat(values, ""))


def _flat(values: dict, before: str) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def difference(a: Run, b: Run) -> list[tuple[str, object, object]]:
    """The keys in which two runs differ, with both values."""
    first, second = resolved(a), resolved(b)
    names = [*first, *(name for name in second if name not in first)]
    both = ((name, first.get(name), second.get(name)) for name in names)
    return [row for row in both if row[1] != row[2]]
