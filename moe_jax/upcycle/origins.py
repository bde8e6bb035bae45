"""Where a leaf of an upcycled model comes from, as data.

`path` is a leaf of the parents in the same layer, without "blocks/SLOT/": the leaf that it is made
of, or for a fresh router and for zeros the one whose dtype it takes.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kept:
    """The parents' leaf; the mean of it where there are several `parents`."""

    path: str
    parents: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stacked:
    """One expert after the other: expert e is the leaf of parent `parents[e]`."""

    path: str
    parents: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert after the other: the recipe makes expert e of the FFN of parent `parents[e]`."""

    path: str
    parents: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Averages of a mixture's experts, in the shares that `Plan.shares` has for the layer."""

    path: str


@dataclasses.dataclass(frozen=True)
class CopiedRouter:
    """A mixture's router, in the shares of its experts, with noise on the copies."""

    path: str


@dataclasses.dataclass(frozen=True)
class FreshRouter:
    """A [D, E] kernel of `initialiser`, whose key is folded in by `name` and layer."""

    path: str
    name: str
    initialiser: str
    num_experts: int


@dataclasses.dataclass(frozen=True)
class Zeros:
    path: str
    shape: tuple[int, ...]  # in one layer


Origin = Kept | Stacked | Expert | Mixture | CopiedRouter | FreshRouter | Zeros
