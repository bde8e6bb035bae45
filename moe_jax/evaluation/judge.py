"""Prompt-based quality estimation: a model is asked for a score, and its answer is read.

The method is unstable: the same model gives other scores for another wording or place of the text,
refuses, or answers without a number (Qian et al., arXiv 2410.06338). So each text is judged once
for each of several templates, and every answer is counted by its kind.
"""

import dataclasses
import enum
import math
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from moe_jax.evaluation.answers import Settings
from moe_jax.evaluation.likelihood import Remembered
from moe_jax.evaluation.samples import Sample
from moe_jax.evaluation.subject import Subject

SCALE = 1.0, 10.0
NUM_TOKENS = 32  # of an answer
# The task before the text, and after it.
TEMPLATES = (
    "Rate the quality of the text below from 1 (worst) to 10 (best). Answer with one number.\n\n"
    "Prompt: {prompt}\n\nText: {text}\n\nScore:",
    "Prompt: {prompt}\n\nText: {text}\n\nHow good is this text, from 1 (worst) to 10 (best)? "
    "Answer with one number.\nScore:",
)
_FIELD = re.compile(r"\{(text|prompt|source)\}")
# `\d` and `float` read the digits of every script. A digit in a word such as GPT4 is no number.
_NUMBER = r"(?<![A-Za-z\d.])-?\d+(?:\.\d+)?"
_OF = re.compile(rf"({_NUMBER})\s*(?:/|out of)\s*({_NUMBER})", re.IGNORECASE)
_RANGE = r"(?!\d|\.\d|\s*(?:-|–|to\b|or\b)\s*\d)"  # "7-8", "7 or 8"
_NAMED = re.compile(rf"(?:score|rating)\W*(?:is\W+)?({_NUMBER}){_RANGE}", re.IGNORECASE)
_REFUSAL = re.compile(
    r"\b(?:can(?:no|')t|can not|won't|will not|unable|not able|decline|refuse|sorry|as an ai)\b",
    re.IGNORECASE,
)


class Kind(enum.Enum):
    SCORE = "score"
    REFUSAL = "refusal"
    UNPARSABLE = "unparsable"
    OUT_OF_RANGE = "out of range"
    CUT = "cut"  # the question is longer than the judge can read


@dataclasses.dataclass(frozen=True)
class Answer:
    kind: Kind
    score: float = np.nan


def parse(answer: str, lowest: float = SCALE[0], highest: float = SCALE[1]) -> Answer:
    """Reads a score from an answer: from its first line that has a digit.

    In this order, the line's score is
      1. the only number X in "X/N" or "X out of N"; N must be `highest`, else it is unparsable;
      2. the only number after "score" or "rating";
      3. the only number, after mentions of the scale itself ("from 1 to 10") are removed.
    A number that is repeated counts once; two different ones are unparsable, and so are no number
    and an empty answer. A number outside the scale is out of range: it is never clipped. An answer
    that says sorry, cannot, as an AI and the like, up to the end of that line, is a refusal, unless
    it has a score of the first or second form.
    """
    answer = answer.replace("’", "'")
    lines = answer.splitlines()
    end = next((i for i, line in enumerate(lines) if re.search(r"\d", line)), len(lines))
    line, refuses = "".join(lines[end : end + 1]), _REFUSAL.search("\n".join(lines[: end + 1]))
    scale = rf"\b{lowest:g}\b[^\d\n]{{0,12}}(?:to|and|-|–)[^\d\n]{{0,12}}\b{highest:g}\b"
    line = re.sub(scale, "", line)
    fractions, named = _OF.findall(line), _NAMED.findall(line)
    if fractions:
        found = {float(score) if float(of) == highest else np.nan for score, of in fractions}
    elif named:
        found = {float(number) for number in named}
    elif refuses:
        return Answer(Kind.REFUSAL)
    else:
        found = {float(number) for number in re.findall(_NUMBER, line)}
    if len(found) != 1 or np.isnan(score := found.pop()):
        return Answer(Kind.UNPARSABLE)
    if not lowest <= score <= highest:
        return Answer(Kind.OUT_OF_RANGE)
    return Answer(Kind.SCORE, score)


def read_template(path: str) -> str:
    """The template in a file. Raises: ValueError for one without {text}, or not UTF-8."""
    try:
        template = pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}); convert it") from None
    if "{text}" not in template:
        raise ValueError(f"{path} has no {{text}}; {{prompt}} and {{source}} are optional")
    return template


def scale(text: str) -> tuple[float, float]:
    """The lowest and the highest score of a scale "LOW,HIGH". Raises: ValueError for others."""
    try:
        lowest, highest = map(float, text.split(","))
    except ValueError:
        lowest = highest = math.nan
    if not -math.inf < lowest < highest < math.inf:
        raise ValueError(f"--judge_scale={text} is not two rising numbers, as in 1,10")
    return lowest, highest


def filled(template: str, sample: Sample) -> str:
    """The template with the sample's fields; a missing one is empty. Braces in a text are text."""
    return _FIELD.sub(lambda match: getattr(sample, match[1]) or "", template)


@dataclasses.dataclass(frozen=True)
class Judge:
    """The scale is inclusive.

    ask: returns the judging model's answer to each question; None for one that is too long for it.
    """

    ask: Callable[[list[str]], list[str | None]]
    templates: Sequence[str] = TEMPLATES
    scale: tuple[float, float] = SCALE

    def answers(self, samples: Sequence[Sample]) -> list[list[Answer]]:
        """The answers about each sample, one a template."""
        questions = [filled(template, s) for s in samples for template in self.templates]
        read = [
            Answer(Kind.CUT) if answer is None else parse(answer, *self.scale)
            for answer in self.ask(questions)
        ]
        return [read[i : i + len(self.templates)] for i in range(0, len(read), len(self.templates))]

    def scores(self, samples: Sequence[Sample]) -> np.ndarray:
        """[K, 2]: the mean of a text's scores, and 1; zeros for a text without any score."""
        rows = [(np.mean(row), 1) if row else (0, 0) for row in self._scores(samples)]
        return np.array(rows, np.float64)

    def share(self, samples: Sequence[Sample], kind: Kind) -> np.ndarray:
        """[K, 2]: the number of a text's answers of this kind, and of all."""
        rows = [(sum(a.kind is kind for a in row), len(row)) for row in self.answers(samples)]
        return np.array(rows, np.float64)

    def disagreement(self, samples: Sequence[Sample]) -> np.ndarray:
        """[K, 2]: the range of a text's scores as a share of the scale, and 1; zeros for a text
        with fewer than two scores."""
        width = self.scale[1] - self.scale[0]
        rows = [(np.ptp(s) / width, 1) if len(s) > 1 else (0, 0) for s in self._scores(samples)]
        return np.array(rows, np.float64)

    def _scores(self, samples: Sequence[Sample]) -> list[list[float]]:
        return [[a.score for a in row if a.kind is Kind.SCORE] for row in self.answers(samples)]


def asking(load: Callable[[], Subject]) -> Callable[[list[str]], list[str | None]]:
    """`Judge.ask` of the model that `load` returns, which answers greedily."""

    def ask(questions: list[str]) -> list[str | None]:
        found = load().answer(questions, Settings(NUM_TOKENS))
        return [None if answer.left_out else answer.text for answer in found]

    return Remembered(ask)
