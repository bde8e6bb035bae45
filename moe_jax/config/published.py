"""The constants of published systems, each next to its value in this repository's config.

`docs/published_configs.csv` has a row for each constant: the config (a file under configs/ and its
argument), the key, the published value and its source and, if the config has another value, what it
does instead.
"""

import csv
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.config import listing, reading, resolved
from moe_jax.config.run import Run
from moe_jax.model.config import MOE

ROOT = pathlib.Path(__file__).parents[2]
TABLE = ROOT / "docs" / "published_configs.csv"
NOT_HERE = "none"


def _of_a_layer(coefficient: str):
    """A function of a run: the weight of one layer's term in the total loss."""

    def weight(run: Run) -> float:
        added = run.balance.over_layers == "sum"
        return getattr(run.balance, coefficient) / (
            1 if added else run.model.layer_kinds.count(MOE)
        )

    return weight


# Constants that are not keys of a config.
DERIVED = {
    "weight of a layer's balancing loss": _of_a_layer("load_balancing_coefficient"),
    "weight of a layer's importance loss": _of_a_layer("importance_coefficient"),
    "weight of a layer's router z-loss": _of_a_layer("router_z_coefficient"),
}


class Row(NamedTuple):
    config: str
    constant: str
    published: str
    here: object
    source: str
    differs: str

    @property
    def agrees(self) -> bool:
        """True if our value equals the published one."""
        try:
            return math.isclose(float(self.published), float(str(self.here)), rel_tol=1e-9)
        except ValueError:
            return self.published == str(self.here)


def rows() -> Iterator[Row]:
    runs: dict[str, Run] = {}
    for row in csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()):
        name, constant = row["config"], row["constant"]
        if name not in runs:
            runs[name] = resolved.resolve(reading.load(str(ROOT / "configs" / name)))
        derived = DERIVED.get(constant)
        values = listing.resolved(runs[name])
        here = derived(runs[name]) if derived else values.get(constant, NOT_HERE)
        yield Row(name, constant, row["published"], here, row["source"], row["differs"])


def page() -> str:
    """The constants as a Markdown table."""
    lines = [Row._fields, ("---",) * len(Row._fields)]
    for row in rows():
        here = "" if row.here == NOT_HERE else str(row.here)
        published, here = (f"`{value}`" if value else "" for value in (row.published, here))
        lines.append((f"`{row.config}`", row.constant, published, here, row.source, row.differs))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
