"""The places of the assistant's turns in a conversation whose template does not mark them.

A turn is what its rendering adds to the rendering of the messages before it, as a prompt; both must
be beginnings of the text of the whole conversation. Some templates write earlier turns in another
way than the last one (Qwen3 leaves out their thoughts); such a turn ends with the token that ends
the template's turns, if this stands once between the prompt and the next message's content. Where
the text does not begin with the prompt either, a turn is what stands at the place of the message's
content, up to and with the first special token. A template for which none holds exactly is refused.
"""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_jax.data.chat_template import ChatTemplate, Message

ASSISTANT = "assistant"
CONTENT = "content"  # a key that is kept if it is null: templates read it in each message

Span = tuple[int, int]  # characters [start, stop)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, and the tools that a template may describe.

    Attributes:
      first: the number of messages that are the prompt of a record with "prompt" and "completion";
        only the assistant's messages from there on are trained.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    first: int = 0


def spans(
    template: ChatTemplate,
    talk: Conversation,
    turns: Sequence[int],
    text: str,
    special: Sequence[str],
    ends: Callable[[], Sequence[str]],
) -> tuple[Span, ...]:
    """The spans of the assistant's messages with the numbers `turns` in the text of a conversation.

    Args:
      special: the special tokens of the tokenizer.
      ends: gives those that end a turn in this template.

    Raises: ValueError if the template does not show one exactly.
    """
    found: dict[int, Span | None] = dict.fromkeys(turns)
    for turn in turns:
        prompt = _prompt(template, talk, turn)
        if prompt is not None and text.startswith(prompt):
            stop = _end_by_rendering(template, talk, turn, text, len(prompt))
            if stop is None:
                stop = _end_by_token(template, talk, turn, text, len(prompt), ends)
            found[turn] = None if stop is None else (len(prompt), stop)
    if missing := [turn for turn in turns if not found[turn]]:
        # The text that the model writes before a content, such as a space, in the last exact turn.
        exact = {turn: span for turn, span in found.items() if span}
        last = list(exact)[-1:]
        both = zip(last, _by_contents(template, talk, last, text, special) or (), strict=False)
        lead = next((text[exact[turn][0] : start] for turn, (start, _) in both), "")
        contents = _by_contents(template, talk, missing, text, special) or ()
        for turn, (start, stop) in zip(missing, contents, strict=False):
            begins = start - len(lead) if text.endswith(lead, 0, start) else start
            found[turn] = (begins, stop)
    for turn, span in found.items():
        if not span:
            raise ValueError(_unknown(template, talk, turn))
    return tuple(span for span in found.values() if span)


def _unknown(template: ChatTemplate, talk: Conversation, turn: int) -> str:
    """The message that refuses a template in which a turn is not found."""
    why = "neither its rendering as an answer nor its content stands there exactly"
    if not turn:
        why = "the conversation begins with it, so that no prompt shows where it begins"
    elif not talk.messages[turn].get(CONTENT):
        why = "it has no content by which to find it"
    return (
        f"the chat template of {template.place} does not show where the assistant's turns are "
        f"(message {turn + 1}: {why}); mark them in it by "
        "{% generation %} … {% endgeneration %}"
    )


def _prompt(template: ChatTemplate, talk: Conversation, turn: int) -> str | None:
    """The text that a model is given to write an assistant's message.

    Many templates write the header of an answer only after a message, or fail without any. The
    header of a message that begins the conversation is what is before that which the template adds
    for the same message after a user's, or else what a prompt adds to that.
    """
    if turn:
        return template.render(talk.messages[:turn], tools=talk.tools, prompt=True).text
    asked = ({"role": "user", CONTENT: secrets.token_hex(16)},)
    alone = template.render(talk.messages[:1], tools=talk.tools).text
    prompt = template.render(asked, tools=talk.tools, prompt=True).text
    both = template.render((*asked, talk.messages[0]), tools=talk.tools).text
    added = both.removeprefix(prompt)
    if both.startswith(prompt) and added and alone.endswith(added):
        return alone.removesuffix(added)
    before = template.render(asked, tools=talk.tools).text
    header = prompt.removeprefix(before)
    if prompt.startswith(before) and header and alone.count(header) == 1:
        return alone.partition(header)[0] + header
    return None


def _end_by_rendering(
    template: ChatTemplate, talk: Conversation, turn: int, text: str, start: int
) -> int | None:
    """The end of the turn that begins at `start`; None if its rendering does not continue."""
    if turn + 1 == len(talk.messages):
        return len(text)
    until = template.render(talk.messages[: turn + 1], tools=talk.tools).text
    return len(until) if text.startswith(until) and len(until) >= start else None


def _end_by_token(
    template: ChatTemplate,
    talk: Conversation,
    turn: int,
    text: str,
    start: int,
    ends: Callable[[], Sequence[str]],
) -> int | None:
    """The end of the token that ends a turn, or None if it is not the only one before the content
    of the next message."""
    if turn + 1 == len(talk.messages):
        return None
    word = secrets.token_hex(16)
    follows = {**talk.messages[turn + 1], CONTENT: word}
    replaced = (*talk.messages[: turn + 1], follows, *talk.messages[turn + 2 :])
    before, found, _ = template.render(replaced, tools=talk.tools).text.partition(word)
    if not found or not text.startswith(before):
        return None
    for end in ends():
        if text.count(end, start, len(before)) == 1:
            return text.index(end, start) + len(end)
    return None


def _by_contents(
    template: ChatTemplate,
    talk: Conversation,
    turns: Sequence[int],
    text: str,
    special: Sequence[str],
) -> list[Span] | None:
    """The spans from each content to the end of the special token after it.

    The contents are replaced by words that do not occur; None if the text with the contents at the
    places of these words is not the text, or if no special token follows.
    """
    words = {turn: secrets.token_hex(16) for turn in turns}
    replaced = [
        {**message, "content": words[i]} if i in words else message
        for i, message in enumerate(talk.messages)
    ]
    rest = template.render(replaced, tools=talk.tools).text
    made, spans = "", []
    for turn in turns:
        before, found, rest = rest.partition(words[turn])
        content = talk.messages[turn]["content"]
        if not found or not isinstance(content, str):
            return None
        for shown in (content, content.strip()):
            if text.startswith(made + before + shown):
                break
        else:
            return None
        made += before
        start, made = len(made), made + shown
        ends = [rest.index(token) + len(token) for token in special if token in rest]
        if not ends:
            return None
        spans.append((start, len(made) + min(ends)))
    return spans if made + rest == text else None
