"""What a field of a model, or a key of a config, needs to be read at all."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


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


def without_effect(config: Any, names: Iterable[str], prefix: str) -> Iterator[str]:
    """A line for each of these fields of a ModelConfig that is not its default and is not read."""
    for name in names:
        field, value = config.__dataclass_fields__[name], getattr(config, name)
        if value != field.default:
            yield from no_effect(prefix + name, value, field.metadata["needs"], config)


def no_effect(name: str, value: Any, needs: Iterable[Need], config: Any) -> Iterator[str]:
    """The line that refuses a value that has no effect; none where all that it needs is there."""
    for need in needs:
        if not need.holds(config):
            without = f"has no effect without {need.setting}; set it, or leave this out"
            yield f"{name}={value!r} {without}"
            return
