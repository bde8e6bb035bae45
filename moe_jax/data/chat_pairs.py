"""Preferences between answers to a conversation: records with messages, and their tokens.

The prompt is all messages before the answers, and an answer is one message of the assistant. Both
are rendered by a chat template as `data/chat.py` renders conversations, so an answer has the tokens
that are trained in a conversation that ends with it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.data import chat, policy
from moe_jax.data.chat import ASSISTANT, Conversation, Encode, Form


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two conversations that differ in their last message; None for the one that nobody wrote."""

    chosen: Conversation | None
    rejected: Conversation | None

    @property
    def both(self) -> tuple[Conversation, ...]:
        """The conversations that there are, the chosen one first."""
        return tuple(talk for talk in (self.chosen, self.rejected) if talk)


def pair(record: Mapping[str, Any]) -> Pair | None:
    """The pair of a record, or None for a record of another form.

    A record has "chosen" and "rejected", which are whole conversations that share their first
    messages, or answers to "prompt"; or "prompt", "completion" and "label", which is true for a
    chosen completion. A field that is a text stands for one message.

    Raises: ValueError, whose message begins with ":" or a space, for a record that is no pair.
    """
    if not policy.is_preference(record):
        return None
    is_pair = "chosen" in record or "rejected" in record
    names = ("chosen", "rejected") if is_pair else ("completion",)
    for name in names:
        if name not in record:
            raise ValueError(f' has no "{name}"')
    answers = [chat.turns(record, name, ASSISTANT) for name in names]
    prompt = chat.turns(record, "prompt", "user") if "prompt" in record else _shared(answers)
    if not prompt:
        raise ValueError(': "chosen" and "rejected" share no first messages, and have no "prompt"')
    talks = [_answered(record, name, prompt, own) for name, own in zip(names, answers, strict=True)]
    if len(talks) == 2:
        return Pair(*talks)
    if not isinstance(label := record["label"], bool):
        raise ValueError(': "label" of a completion is neither true nor false')
    return Pair(talks[0], None) if label else Pair(None, talks[0])


def _shared(answers: Sequence[Sequence[Any]]) -> list[Any]:
    """The messages with which both conversations begin, up to an answer."""
    chosen, rejected = answers
    number = min(len(chosen), len(rejected)) - 1
    differ = (i for i in range(number) if chosen[i] != rejected[i])
    return list(chosen[: next(differ, number)])


def _answered(
    record: Mapping[str, Any], name: str, prompt: Sequence[Any], answer: Sequence[Any]
) -> Conversation:
    """The prompt and its answer, which may begin with the prompt itself."""
    whole = answer if answer[: len(prompt)] == prompt else [*prompt, *answer]
    added = [message.get("role") for message in whole[len(prompt) :]]
    if added != [ASSISTANT]:
        raise ValueError(
            f': "{name}" adds messages of {added} to the prompt; an answer is one message of the '
            "assistant"
        )
    return chat.of_messages(record, whole, len(prompt))


def ids(
    given: Pair, form: Form, encode: Encode, special: Sequence[str]
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The tokens of the prompt, of the chosen and of the rejected answer.

    Raises: ValueError, whose message begins with ":" or a space, as `chat.render` does, and if the
      prompt's tokens are not the same ones before both answers.
    """
    parts = [_parts(talk, form, encode, special) for talk in given.both]
    prompt = parts[0][0]
    if not all(np.array_equal(prompt, other) for other, _ in parts):
        raise ValueError(
            f": the chat template of {form.template.place} writes the prompt in another way before "
            "each answer"
        )
    answers = iter(answer for _, answer in parts)
    chosen, rejected = (
        None if talk is None else next(answers) for talk in (given.chosen, given.rejected)
    )
    return prompt, chosen, rejected


def _parts(
    talk: Conversation, form: Form, encode: Encode, special: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the prompt and of the answer; what a template writes after it is left out."""
    found = chat.render(form.template, talk, special)
    ids_N, offsets_N2 = encode(found.text)
    answer = np.flatnonzero(chat.weights(offsets_N2, found.spans))
    [(start, _)] = found.spans
    if not len(answer) or not answer[0] or offsets_N2[answer[0] - 1, 1] > start:
        raise ValueError(
            f": the answer {str(talk.messages[-1].get('content'))[:20]!r} has no token that begins "
            "where the prompt ends"
        )
    return ids_N[: answer[0]], ids_N[answer[0] : answer[-1] + 1]
