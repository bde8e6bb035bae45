"""Multiple choice by log-likelihood: raw, per byte and per token."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.data import tokenizers
from moe_jax.evaluation import json_lines, outcomes, scoring

# The divisor of a choice's log-likelihood, by the name of the accuracy. `accuracy_per_byte` is the
# harness's acc_bytes; its acc_norm divides by characters.
DIVISORS: dict[str, Callable[[str, scoring.Score], int]] = {
    "accuracy": lambda choice, score: 1,
    "accuracy_per_byte": lambda choice, score: len(choice.encode()),
    "accuracy_per_token": lambda choice, score: score.num_tokens,
}


@dataclasses.dataclass(frozen=True)
class Item:
    """A context, the texts that may follow it, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int
    label: str = ""


def parse(values: dict[str, Any]) -> Item:
    """The item of a line {"context", "choices", "answer"[, "label"]}; other keys are not read.

    Raises: ValueError for a missing or wrong value, an empty choice, or an answer that is not the
      index of a choice.
    """
    choices, answer = json_lines.texts(values, "choices", least=2), values.get("answer")
    if "" in choices:
        raise ValueError(f"choice {choices.index('')} is empty; it has no probability")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f"'answer' is {answer!r}; use the index of one of the {len(choices)} choices, "
            f"0 to {len(choices) - 1}"
        )
    label = json_lines.text(values, "label", "")
    return Item(json_lines.text(values, "context"), choices, answer, label)


def evaluate(
    items: Sequence[Item],
    tokenizer: tokenizers.Tokenizer,
    score: Callable[[list[scoring.Pair]], list[scoring.Score]],
) -> outcomes.Outcomes:
    """1 for each item whose right choice has the largest log-likelihood, else 0, by divisor.

    The first of equally likely choices counts as chosen. A choice follows its context as it is
    written: where words are separated by spaces, it begins with one.
    """
    pairs = [
        scoring.pair(tokenizer, item.context, choice) for item in items for choice in item.choices
    ]
    scores = iter(score(pairs))
    values: dict[str, list[bool]] = {name: [] for name in DIVISORS}
    left_out = 0
    for item in items:
        own = [(choice, next(scores)) for choice in item.choices]
        left_out += sum(found.left_out > 0 for _, found in own)
        for name, divisor in DIVISORS.items():
            means = [found.log_likelihood / divisor(choice, found) for choice, found in own]
            values[name].append(int(np.argmax(means)) == item.answer)
    chance = float(np.mean([1 / len(item.choices) for item in items]))
    return outcomes.Outcomes(
        tuple(item.label for item in items),
        {name: np.array(found, np.float64) for name, found in values.items()},
        {"chance": chance, "contexts_cut": left_out},
    )
