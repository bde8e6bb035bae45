"""Conversations as training text: which characters the assistant wrote, and which tokens they are.

A model is tuned on the assistant's turns only: all that it would generate itself, with the tokens
that end a turn. Where a template marks this by {% generation %}, the marks decide; elsewhere the
turns are found by rendering parts of the conversation (`data/chat_turns.py`).
"""

import dataclasses
import functools
import hashlib
import pathlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax import strict_json, untrusted
from moe_jax.data import chat_template, chat_turns
from moe_jax.data.chat_template import ChatTemplate
from moe_jax.data.chat_turns import ASSISTANT, CONTENT, Conversation, Span

# ShareGPT's names of the roles (https://huggingface.co/docs/trl/dataset_formats).
SHAREGPT = {
    "human": "user",
    "gpt": ASSISTANT,
    "function_call": ASSISTANT,
    "observation": "tool",
    **{role: role for role in ("system", "user", ASSISTANT, "tool")},
}
RULES = 2  # the version of the rules by which this module makes tokens, for the key of a cache
FORMS = '"messages", "conversations", or "prompt" and "completion"'


def conversation(record: Mapping[str, Any]) -> Conversation:
    """The conversation of a record in one of the three usual forms.

    Raises: ValueError, whose message begins with ":" or a space, for a record that has none.
    """
    prompt = 0
    if "messages" in record:
        messages = messages_of(record, "messages")
    elif "conversations" in record:
        messages = _of_sharegpt(record)
    elif "prompt" in record and "completion" in record:
        asked = turns(record, "prompt", "user")
        messages, prompt = [*asked, *turns(record, "completion", ASSISTANT)], len(asked)
    else:
        raise ValueError(f" has none of {FORMS}")
    return of_messages(record, messages, prompt)


def of_messages(record: Mapping[str, Any], messages: Sequence[Any], first: int) -> Conversation:
    """The conversation of a record's messages, with its tools; `first` is as in `Conversation`.

    Raises: ValueError as `conversation` does.
    """
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str | list | None):
            raise ValueError(f': message {number} has no "role", or a "content" that is no text')
        if content is None and not message.get("tool_calls"):
            raise ValueError(f": message {number} has neither content nor tool calls")
    if not any(message["role"] == ASSISTANT for message in messages[first:]):
        seen = dict.fromkeys(_quoted(message["role"]) for message in messages[first:])
        names = ", ".join(list(seen)[:8])
        raise ValueError(
            f": no message is the assistant's: the roles are {names}; an answer has the role "
            f'"{ASSISTANT}", or in ShareGPT\'s form is from "gpt"'
        )
    return Conversation(tuple(messages), _tools(record), first)


def _tools(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """The tools of a record, which tables often hold as a JSON text; None for no tool."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = strict_json.parse(tools) if tools.strip() else None
        except ValueError:
            pass  # it is refused as a text
    if tools is not None and not (isinstance(tools, list) and all(map(_is_mapping, tools))):
        raise ValueError(': "tools" is not a list of objects, nor the JSON text of one')
    return tuple(without_nulls(tools)) if tools else None


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def messages_of(record: Mapping[str, Any], field: str) -> list[Any]:
    """The list of messages in a field, without nulls; ValueError for anything else."""
    value = record[field]
    if not isinstance(value, list) or not value or not all(map(_is_mapping, value)):
        raise ValueError(f': "{field}" is not a list of messages')
    return [
        {
            key: without_nulls(value)
            for key, value in one.items()
            if value is not None or key == CONTENT
        }
        for one in value
    ]


def without_nulls(value: Any) -> Any:
    """The value without the keys of objects whose value is null.

    A table has all keys in each of its objects, null where a record had none; templates ask whether
    a key is there.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def turns(record: Mapping[str, Any], field: str, role: str) -> list[Any]:
    """The messages of a field that is text or a list of messages."""
    text = record[field]
    return (
        [{"role": role, "content": text}] if isinstance(text, str) else messages_of(record, field)
    )


def _of_sharegpt(record: Mapping[str, Any]) -> list[Any]:
    """The messages of "conversations", after the text of "system", if none of them is its own."""
    messages = []
    for number, message in enumerate(messages_of(record, "conversations"), 1):
        if "from" not in message:  # some files use the names of `messages` here
            messages.append(message)
            continue
        if str(role := message["from"]) not in SHAREGPT:
            raise ValueError(
                f': message {number} is from {_quoted(role)}; the known names of "from" are '
                f"{', '.join(SHAREGPT)}"
            )
        messages.append({"role": SHAREGPT[role], CONTENT: message.get("value")})
    system = record.get("system")
    if system and isinstance(system, str) and messages[0].get("role") != "system":
        return [{"role": "system", CONTENT: system}, *messages]
    return messages


def _quoted(role: Any) -> str:
    return f'"{untrusted.label(str(role)[:40])}"'


@dataclasses.dataclass(frozen=True)
class Answers:
    """The text of a conversation and the spans of its characters that are trained."""

    text: str
    spans: tuple[Span, ...]


def render(template: ChatTemplate, talk: Conversation, special: Sequence[str] = ()) -> Answers:
    """The text of a conversation, with the assistant's turns.

    Args:
      special: the special tokens of the tokenizer, one of which ends a turn.

    Raises: ValueError, whose message begins with ":" or a space, if the template fails, or does not
      show exactly where the assistant's turns are.
    """
    turns = [i for i, one in enumerate(talk.messages) if one["role"] == ASSISTANT]
    trained = [turn for turn in turns if turn >= talk.first]
    try:
        whole = template.render(talk.messages, tools=talk.tools)
        spans = whole.generated[len(turns) - len(trained) :]
        if not template.marks_generation:
            ends = functools.partial(turn_ends, template, special)
            spans = chat_turns.spans(template, talk, trained, whole.text, special, ends)
    except ValueError as error:
        raise ValueError(f": {error}") from None
    if template.marks_generation and len(whole.generated) != len(turns):
        raise ValueError(
            f": the chat template of {template.place} marks {len(whole.generated)} of "
            f"{len(turns)} turns as generated"
        )
    return _answers(template, talk, trained, whole.text, spans)


def _answers(
    template: ChatTemplate,
    talk: Conversation,
    turns: Sequence[int],
    text: str,
    spans: Sequence[Span],
) -> Answers:
    """The answers; ValueError if the template writes nothing of one that says something."""
    for turn, (start, stop) in zip(turns, spans, strict=True):
        message = talk.messages[turn]
        content = message.get(CONTENT) or ""
        said = content.strip() if isinstance(content, str) else content
        if start == stop and (said or message.get("tool_calls")):
            raise ValueError(
                f": the chat template of {template.place} writes nothing of the assistant's answer "
                f"in message {turn + 1}, so it does not show where the assistant's turns are"
            )
    return Answers(text, tuple(spans))


def turn_ends(template: ChatTemplate, special: Sequence[str]) -> tuple[str, ...]:
    """The special token that ends the assistant's turn in this template; () if none does."""
    word = secrets.token_hex(16)
    messages = {"role": "user", "content": "a"}, {"role": ASSISTANT, "content": word}
    rest = template.render(messages).text.partition(word)[2]
    found = {rest.index(token): token for token in special if token in rest}
    return (found[min(found)],) if found else ()


def weights(offsets_N2: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """The loss weight [N] of each token: 1 if all of it is inside of spans, and 0 elsewhere.

    Args:
      offsets_N2: the characters [start, stop) of each token; a token that begins before a span, or
        ends after it, has no weight, because a prompt has a part in it.
    """
    starts_N, stops_N = offsets_N2[:, 0], offsets_N2[:, 1]
    is_answer_C = np.zeros(1 + max([0, *stops_N, *(stop for _, stop in spans)]), bool)
    for start, stop in spans:
        is_answer_C[start:stop] = True
    before_C = np.cumsum(is_answer_C) - is_answer_C  # characters of answers before each one
    inside_N = before_C[stops_N] - before_C[starts_N] == stops_N - starts_N
    return (is_answer_C[starts_N] & inside_N).astype(np.float32)


Encode = Callable[[str], tuple[np.ndarray, np.ndarray]]  # text -> ids [N], offsets [N, 2]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A conversation as a model reads it.

    ids_N, weights_N: the tokens, and the loss weight of each, 1 or 0.
    text: what the tokens with a weight say.
    left_out: the number of messages at the end that did not fit.
    """

    ids_N: np.ndarray
    weights_N: np.ndarray
    text: str
    left_out: int


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of conversations as tokens: their template, and the most tokens of one."""

    template: ChatTemplate
    most: int

    @property
    def key(self) -> list:
        """All that decides the tokens, for the key of a cache."""
        source = hashlib.sha256(self.template.source.encode()).hexdigest()
        return [RULES, source, self.template.tokens, self.most]

    def tokens(self, talk: Conversation, encode: Encode, special: Sequence[str]) -> Tokens | None:
        """The tokens of a conversation; None if not even its first turn fits.

        A conversation that is too long loses its last messages, so that the rest ends with a turn
        of the assistant, with that turn's end.

        Raises: ValueError as `render` does.
        """
        turns = [i for i, one in enumerate(talk.messages) if one["role"] == ASSISTANT]
        for turn in reversed([i for i in turns if i >= talk.first]):
            kept = len(talk.messages) if turn == turns[-1] else turn + 1
            part = dataclasses.replace(talk, messages=talk.messages[:kept])
            answers = render(self.template, part, special)
            ids_N, offsets_N2 = encode(answers.text)
            if len(ids_N) <= self.most:
                text = "".join(answers.text[start:stop] for start, stop in answers.spans)
                weights_N = weights(offsets_N2, answers.spans)
                return Tokens(ids_N, weights_N, text, len(talk.messages) - kept)
        return None


def form_of(data: Any) -> Form | None:
    """The form of the conversations of a run's `config.data`; None for text.

    Raises: ValueError for a template that is not there.
    """
    if not data.conversations:
        return None
    folder = None if data.tokenizer == "bytes" else pathlib.Path(data.tokenizer).parent
    if data.chat_template or folder is None:
        template = chat_template.named(data.chat_template or chat_template.PLAIN.place, folder)
    else:
        template = chat_template.load(folder)
    return Form(template, data.sequence_length + 1)
