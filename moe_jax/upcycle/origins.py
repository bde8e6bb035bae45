"""The origin of each leaf of an upcycled model, as data."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Origin:
    """`path` is a leaf of the parents in the same layer, without "blocks/SLOT/".

    The new leaf is made from it; a fresh router only takes its dtype.
    """

    path: str


@dataclasses.dataclass(frozen=True)
class OfParents(Origin):
    """A leaf made from the same leaf of some parents; `parents` are the parents' indices."""

    parents: tuple[int, ...]


class Kept(OfParents):
    """The parent's leaf, or its mean over several `parents`."""


class Stacked(OfParents):
    """A stack of experts: expert e is the leaf of parent `parents[e]`."""


class Expert(OfParents):
    """A stack of experts: the recipe makes expert e from the FFN of parent `parents[e]`."""


class Mixture(Origin):
    """Averages of an MoE's experts, weighted by `Plan.shares` for the layer."""


class CopiedRouter(Origin):
    """The router of an MoE, averaged like its experts, with noise on the copies."""


@dataclasses.dataclass(frozen=True)
class FreshRouter(Origin):
    """A kernel drawn by an initialiser, with `name` and layer folded into the key; else zeros."""

    name: str
    shape: tuple[int, ...]  # for one layer
    initialiser: str = ""
