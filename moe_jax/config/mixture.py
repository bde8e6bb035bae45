"""The section `data.mixture` of a run's config: several sources of text and their weights."""

import dataclasses
from collections.abc import Iterator

from moe_jax import spelling
from moe_jax.config import checks
from moe_jax.config.checks import NOT_NEGATIVE, SHARE
from moe_jax.config.section import Section, key
from moe_jax.data.shares import WEIGHTS
from moe_jax.model.fields import Need

EVERY = "*"  # in `most_epochs`, every source that it does not name
MIXED = Need(lambda run: run.data.mixture.is_set, "config.data.mixture.sources")


def _with_weights(name: str) -> Need:
    return Need(
        lambda run: run.data.mixture.weights == name, f"config.data.mixture.weights={name!r}"
    )


BY_SIZE = Need(
    lambda run: run.data.mixture.weights != "fixed",
    "config.data.mixture.weights='proportional', 'temperature' or 'uniform'",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Section, path="data.mixture", fixed=False):
    """Keys that may change when a run is resumed: its sources go on where they were."""

    sources: tuple = key(
        (),
        "(name, text) pairs, a text as for data.source; '' for the text takes data.source with the "
        "name for {name}, as for a source that only shares names",
        checks.named_texts,
    )
    by_label: bool = key(
        False,
        "makes each label (language) of each source, or of data.source, a source of its own, named "
        "label or source/label; it holds 12 bytes per document in memory",
    )
    weights: str = key(
        "fixed",
        "kind of the shares: " + "; ".join(f"{n} are {row.about}" for n, row in WEIGHTS.items()),
        checks.OneOf(lambda: tuple(WEIGHTS)),
        MIXED,
    )
    shares: tuple = key(
        (),
        "(name, weight) pairs in any unit; a source without one is held-out text only",
        checks.named_numbers,
        _with_weights("fixed"),
    )
    exponent: float = key(0.3, "exponent of temperature", SHARE, _with_weights("temperature"))
    minimum_documents: int = key(
        0, "leaves out sources with fewer documents of training text", NOT_NEGATIVE, BY_SIZE
    )
    most_epochs: tuple = key(
        (),
        "(name, number) pairs: a source stops after so many passes, and the others share what it "
        "leaves; the name '*' stands for all that have no pair",
        checks.named_numbers,
        MIXED,
    )
    stages: tuple = key(
        (),
        "(step, shares) pairs: from that step on, the shares are these (name, weight) pairs; "
        "batches that are left out count as steps",
        checks.stages,
        MIXED,
    )

    @property
    def is_set(self) -> bool:
        return bool(self.names) or self.by_label

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources; without any, `data.source` is the only one."""
        shares = () if self.by_label else self.shares
        return tuple(dict.fromkeys(name for name, _ in (*self.sources, *shares)))

    def problems(self) -> Iterator[str]:
        if self.is_set and self.weights == "fixed" and not any(w for _, w in self.shares):
            yield (
                "config.data.mixture.weights='fixed' needs mixture.shares with a positive weight; "
                "give (name, weight) pairs, or use 'proportional', 'temperature' or 'uniform'"
            )
        for step, shares in self.stages:
            if not any(weight for _, weight in shares):
                yield f"config.data.mixture.stages, step {step}, has no positive weight; give one"
        if self.names and not self.by_label:
            yield from self.unknown(self.names)

    def unknown(self, known: tuple[str, ...]) -> Iterator[str]:
        """A line for each name that is none of the known sources."""
        places = {
            "shares": self.shares,
            "most_epochs": [pair for pair in self.most_epochs if pair[0] != EVERY],
            **{f"stages, step {step}": shares for step, shares in self.stages},
        }
        for place, pairs in places.items():
            for name, _ in pairs:
                if name not in known:
                    yield spelling.unknown(f"config.data.mixture.{place}: source", name, known)
