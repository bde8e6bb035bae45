"""Short answers by greedy generation: exact match and character F1."""

import collections
import dataclasses
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.evaluation import json_lines, outcomes
from moe_jax.evaluation.answers import Answer


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt and its right answers, each of which is enough."""

    prompt: str
    answers: tuple[str, ...]
    label: str = ""


def parse(values: dict[str, Any]) -> Item:
    """The item of a line {"prompt", "answers"[, "label"]}; other keys are not read.

    Raises: ValueError for a missing or wrong value.
    """
    answers = json_lines.texts(values, "answers", least=1)
    label = json_lines.text(values, "label", "")
    return Item(json_lines.text(values, "prompt"), answers, label)


def normalised(text: str) -> str:
    """The text in one form: compatible characters (NFKC) and cases are equal, punctuation is left
    out, and each run of spaces is one space.

    Rajpurkar et al. (arXiv 1606.05250) leave out English articles too; this form is for any
    language.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = (c for c in folded if not unicodedata.category(c).startswith("P"))
    return " ".join("".join(kept).split())


def exact_match(answer: str, right: str) -> float:
    """1 if both are equal after normalisation, else 0."""
    return float(normalised(answer) == normalised(right))


def character_f1(answer: str, right: str) -> float:
    """The harmonic mean of precision and recall of the characters, without spaces.

    It is the F1 of Rajpurkar et al. (arXiv 1606.05250, §6.1) with characters for tokens, so that
    languages without spaces are measured too: twice the characters in common, counted as often as
    both have them, over the number in both. 1 for two texts without characters.
    """
    a, b = (normalised(text).replace(" ", "") for text in (answer, right))
    common = (collections.Counter(a) & collections.Counter(b)).total()
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


MEASURES: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "character_f1": character_f1,
}


def evaluate(
    items: Sequence[Item], answer: Callable[[list[str]], list[Answer]]
) -> outcomes.Outcomes:
    """The measures of each item's answer against the right answer that it is most like."""
    found = answer([item.prompt for item in items])
    values = {
        name: np.array(
            [
                max(measure(given.text, right) for right in item.answers)
                for item, given in zip(items, found, strict=True)
            ]
        )
        for name, measure in MEASURES.items()
    }
    cut = sum(given.left_out > 0 for given in found)
    return outcomes.Outcomes(tuple(item.label for item in items), values, {"contexts_cut": cut})
