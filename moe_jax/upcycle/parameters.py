"""The types of the recipes' parameters, each annotated with the values that it allows."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated

from moe_jax import spelling
from moe_jax.upcycle import experts


@dataclasses.dataclass(frozen=True)
class Parameter:
    """The values of a recipe's keyword argument of type `Annotated[type, Parameter(...)]`.

    choices: the strings that it may be.
    share_of: if set, it is a number from 0 to 1, the fraction of the things named here.
    deviation: if True, it is a finite number of at least 0.
    statistics: choice -> the statistic that this choice needs.
    of_copied: the leaf of a copied router that it changes.
    for_moments: its value when the recipe transforms Adam's moments, which follow their weights
      but are not redrawn, scaled or disturbed; None is the value used for the weights.
    """

    choices: tuple[str, ...] = ()
    share_of: str = ""
    deviation: bool = False
    statistics: Mapping[str, str] = dataclasses.field(default_factory=dict)
    of_copied: str = ""
    for_moments: object = None

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.share_of:
            return f"a share of the {self.share_of.removeprefix('the ')}, from 0 to 1"
        return "a finite number of at least 0" if self.deviation else ""

    def check(self, name: str, value) -> None:
        """Raises: ValueError for a value that is not allowed."""
        if (of := self.share_of) and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is not a share of {of}; use a value from 0 to 1")
        if self.deviation and not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be a finite number of at least 0")
        if self.choices and value not in self.choices:
            raise ValueError(spelling.unknown(name, value, self.choices))


def limits(annotation) -> Parameter:
    """The `Parameter` of an annotated type; a type without one allows any value."""
    return next(iter(getattr(annotation, "__metadata__", ())), Parameter())


Ratio = Annotated[float, Parameter(share_of="neurons", for_moments=0.0)]
RankRatio = Annotated[float, Parameter(share_of="singular directions")]
Deviation = Annotated[float, Parameter(deviation=True)]
RouterNoise = Annotated[float, Parameter(deviation=True, of_copied="kernel", for_moments=0.0)]
BiasNoise = Annotated[float, Parameter(deviation=True, of_copied="bias", for_moments=0.0)]
IndexSharing = Annotated[str, Parameter(choices=("neuron", "per_matrix"))]
Scaling = Annotated[str, Parameter(choices=tuple(experts.SCALINGS), for_moments="none")]
Partition = Annotated[
    str,
    Parameter(choices=("random", "contiguous", "statistics"), statistics={"statistics": "neurons"}),
]
