"""The questions of a study, as its config file states them in get_study().

from moe_jax.experiments import study

def get_study():
    gains = study.against(["naive", "drop"], "dense_continued")
    return study.Study(questions=(study.Question("Does upcycling gain?", gains),))
"""

import dataclasses
from collections.abc import Iterable, Mapping

BITS = "test_bits_per_byte"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A contrast of groups: the sum of their values times these weights, which sum to zero; or the
    mean of one group, which is compared with zero."""

    label: str
    weights: Mapping[str, float]


def minus(a: str, b: str) -> Comparison:
    """Group `a` minus group `b`."""
    return Comparison(f"{a} − {b}", {a: 1.0, b: -1.0})


def against(names: Iterable[str], control: str) -> tuple[Comparison, ...]:
    """Each of these groups minus the control."""
    return tuple(minus(name, control) for name in names)


def alone(names: Iterable[str]) -> tuple[Comparison, ...]:
    """Each of these groups, compared with zero."""
    return tuple(Comparison(name, {name: 1.0}) for name in names)


def difference(a: Comparison, b: Comparison) -> Comparison:
    """How much larger `a` is than `b`: the interaction of two factors, if each is an effect."""
    names = dict.fromkeys([*a.weights, *b.weights])
    weights = {name: a.weights.get(name, 0.0) - b.weights.get(name, 0.0) for name in names}
    return Comparison(f"({a.label}) − ({b.label})", weights)


@dataclasses.dataclass(frozen=True)
class Question:
    """Comparisons of one measure that answer a question; their tests are corrected together.

    measure: a row of `page.MEASURES`, or "label/NAME" for the loss of one label of the text.
    """

    text: str
    comparisons: tuple[Comparison, ...]
    measure: str = BITS


@dataclasses.dataclass(frozen=True)
class Study:
    """A study's questions, the pairs of groups whose curves may cross, and its conclusion.

    control: the group that the figure shows the others' differences from; "" for no figure.
    conclusion: what its authors say follows, written by hand when the runs are done. Its numbers
      with a point are those of the page's tables, without signs.
    """

    questions: tuple[Question, ...]
    control: str = ""
    crossings: tuple[tuple[str, str], ...] = ()
    conclusion: str = ""
