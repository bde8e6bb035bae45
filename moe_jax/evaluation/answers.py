"""Answers to prompts as text: until an end token, a stop string or a number of tokens."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import tqdm

from moe_jax import model
from moe_jax.data import tokenizers
from moe_jax.evaluation import generate, scoring
from moe_jax.evaluation.sampling import GREEDY, Sampling


@dataclasses.dataclass(frozen=True)
class Settings:
    """How texts are continued; the default is greedy.

    stops: strings that end an answer and do not belong to it.
    end_ids: tokens that end an answer.
    sampling, seed: how tokens are drawn.
    """

    num_tokens: int
    stops: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()
    sampling: Sampling = GREEDY
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """`ids` ends before an end token; `left_out` counts the prompt's first tokens that did not fit
    into the model's limit together with the answer."""

    text: str
    ids: np.ndarray
    left_out: int


def answers(
    params: dict,
    config: model.ModelConfig,
    tokenizer: tokenizers.Tokenizer,
    prompts: Sequence[str],
    settings: Settings,
    *,
    batch_size: int,
    limit: int,
    progress: bool = False,
) -> list[Answer]:
    """The answer to each prompt, in their order.

    A sampled answer depends on the seed and on the order and number of the prompts.

    Args:
      params: on one device.
      limit: the largest number of tokens that the model reads at once.

    Raises: ValueError if the tokens of an answer leave no room for a prompt.
    """
    room = limit - settings.num_tokens
    if room < 1 or settings.num_tokens < 1:
        raise ValueError(
            f"an answer of {settings.num_tokens} tokens must have at least one, and leave room for "
            f"a prompt in the model's limit of {limit}"
        )
    whole = [tokenizer.prompt(prompt) for prompt in prompts]
    ids = [one[-room:] for one in whole]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    found: dict[int, Answer] = {}
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for number, batch in enumerate(tqdm.tqdm(batches, "generating", disable=not progress)):
        rows = [ids[i] for i in batch]
        continued = generate.generate_until(
            params,
            config,
            rows + [rows[-1][:1]] * (batch_size - len(rows)),  # the last batch has this shape too
            lambda new: _has_ended(new, tokenizer, settings),
            num_tokens=settings.num_tokens,
            sampling=settings.sampling,
            key=jax.random.fold_in(jax.random.key(settings.seed), number),
            length=scoring.row_length(len(rows[0]), room),
            rows=len(rows),
        )
        for i, new in zip(batch, continued, strict=True):
            kept = new[: _end(new, settings.end_ids)]
            text = _before(tokenizer.decode(kept), settings.stops)
            found[i] = Answer(text, kept, len(whole[i]) - len(ids[i]))
    return [found[i] for i in range(len(prompts))]


def _end(ids: np.ndarray, end_ids: tuple[int, ...]) -> int:
    """The number of ids before the first end token."""
    ends = np.isin(ids, end_ids)
    return int(np.argmax(ends)) if ends.any() else len(ids)


def _before(text: str, stops: tuple[str, ...]) -> str:
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text


def _has_ended(ids: np.ndarray, tokenizer: tokenizers.Tokenizer, settings: Settings) -> bool:
    if _end(ids, settings.end_ids) < len(ids):
        return True
    text = tokenizer.decode(ids) if settings.stops else ""
    return _before(text, settings.stops) != text
