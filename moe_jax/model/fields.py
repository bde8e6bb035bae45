"""The fields of a model's config: what each belongs to, which values it may have, and its needs.

A need is a condition without which a field, or a key of a config, is not read at all.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from moe_jax import spelling


class Need(NamedTuple):
    """A condition without which a field is not read: a test of the config, and what to set."""

    holds: Callable[[Any], bool]
    setting: str


SPARSE = Need(lambda config: config.num_experts > 0, "num_experts")
ROUTED = Need(lambda config: config.dispatch != "merge", "dispatch='dropless' or 'capacity'")
CAPACITY = Need(lambda config: config.dispatch == "capacity", "dispatch='capacity'")
MERGED = Need(lambda config: config.dispatch == "merge", "dispatch='merge'")
GROUPS = Need(lambda config: config.num_expert_groups > 1, "num_expert_groups of 2 or more")
SLIDING = Need(
    lambda config: config.layer_types is None or "sliding_attention" in config.layer_types,
    "'sliding_attention' in layer_types",
)
ROTARY = Need(lambda config: config.position_embedding == "rotary", "position_embedding='rotary'")


# Every field of ModelConfig belongs to one of these groups. The group decides whether the field is
# compared between two models, and whether a sparse model sets it for itself.
ARCHITECTURE, ROPE, ORIGIN, EXPERTS = "architecture", "rope", "origin", "experts"
ROUTER, ATTENTION_EXPERTS, COMPUTATION = "router", "attention_experts", "computation"
# The needs that all fields of a group share.
NEEDS_OF = {ROPE: (ROTARY,), EXPERTS: (SPARSE,), ROUTER: (SPARSE, ROUTED)}


def field(
    about: str,
    default=dataclasses.MISSING,
    belongs: str = ARCHITECTURE,
    *needs: Need,
    at_least: int | None = None,
    at_most: float = math.inf,
    positive: bool = False,
    choices: Collection[str] = (),
):
    """A field of ModelConfig: what it is, the group it belongs to, and which values it may have.

    needs: the conditions, besides those of its group, without which the field is not read.
    at_least, at_most: the smallest and the largest integer allowed. positive: the value must be
      finite and above 0.
    choices: the names allowed; a table passed here may grow later.
    """
    needs = (*NEEDS_OF.get(belongs, ()), *needs)
    of_value = {"at_least": at_least, "at_most": at_most, "positive": positive, "choices": choices}
    choice = f" (one of {', '.join(choices)})" if choices else ""
    metadata = {"belongs": belongs, "needs": needs, "explanation": about + choice, **of_value}
    return dataclasses.field(default=default, metadata=metadata)


def out_of_range(config: Any) -> Iterator[str]:
    """A line for each field of a ModelConfig with a value that it may not have."""
    for each in dataclasses.fields(config):
        name, value, allowed = each.name, getattr(config, each.name), each.metadata
        if value is None:
            continue
        if allowed["at_least"] is not None and value < allowed["at_least"]:
            yield f"{name}={value} must be at least {allowed['at_least']}"
        if allowed["at_most"] < math.inf and value > allowed["at_most"]:
            yield f"{name}={value} must be at most {allowed['at_most']}"
        if allowed["positive"] and not 0 < value < math.inf:
            yield f"{name}={value} must be a finite number more than 0"
        if allowed["choices"] and value not in allowed["choices"]:
            yield spelling.unknown(name, value, allowed["choices"])


def without_effect(config: Any, names: Iterable[str], prefix: str) -> Iterator[str]:
    """A line for each of these fields of a ModelConfig that differs from its default but is not
    read."""
    for name in names:
        each, value = config.__dataclass_fields__[name], getattr(config, name)
        if value != each.default:
            yield from no_effect(prefix + name, value, each.metadata["needs"], config)


def unread(config: Any, key: str, table: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    """A line for each of these fields that differs from its default but is not read by the row of
    `table` that the field `key` chooses."""
    chosen = getattr(config, key)
    for name in names:
        value = getattr(config, name)
        if name not in table[chosen].reads and value != config.__dataclass_fields__[name].default:
            readers = ", ".join(other for other, row in table.items() if name in row.reads)
            yield (
                f"{name}={value!r} has no effect with {key}={chosen!r}; leave it out, or use one "
                f"that reads it: {readers}"
            )


def no_effect(name: str, value: Any, needs: Iterable[Need], config: Any) -> Iterator[str]:
    """The line that refuses a value without effect; none if all its needs are met."""
    for need in needs:
        if not need.holds(config):
            without = f"has no effect without {need.setting}; set it, or leave this out"
            yield f"{name}={value!r} {without}"
            return
