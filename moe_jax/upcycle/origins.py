"""The origin of each leaf of an upcycled model, as data."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Origin:
    """`path` is a leaf of the parents in the same layer, without "blocks/SLOT/".

    The new leaf is made of it, or in the case of a fresh router has its dtype.
    """

    path: str


@dataclasses.dataclass(frozen=True)
class OfParents(Origin):
    """A leaf made of the same leaf of some parents; `parents` are their numbers."""

    parents: tuple[int, ...]


class Kept(OfParents):
    """The parents' leaf; the mean of it where there are several `parents`."""


class Stacked(OfParents):
    """One expert after the other: expert e is the leaf of parent `parents[e]`."""


class Expert(OfParents):
    """One expert after the other: the recipe makes expert e of the FFN of parent `parents[e]`."""


class Mixture(Origin):
    """Averages of a mixture's experts, in the shares that `Plan.shares` has for the layer."""


class CopiedRouter(Origin):
    """A mixture's router, in the shares of its experts, with noise on the copies."""


@dataclasses.dataclass(frozen=True)
class FreshRouter(Origin):
    """A kernel by an initialiser, whose key is folded in by `name` and layer; else zeros."""

    name: str
    shape: tuple[int, ...]  # in one layer
    initialiser: str = ""
