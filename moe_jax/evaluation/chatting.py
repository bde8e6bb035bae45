"""Conversations with a model that was tuned on a chat template."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax import model
from moe_jax.data import chat, tokenizers
from moe_jax.data.chat_template import ChatTemplate, Message
from moe_jax.evaluation import generate
from moe_jax.evaluation.sampling import GREEDY, RANGES, Sampling

STREAMED = 4  # tokens that appear at a time
INCOMPLETE = "\ufffd"  # what the first bytes of a character decode to
RESET = "/reset"
# The field of a record that is answered -> the answer that `chat.conversation` finds after it.
EMPTY = {
    "messages": {"role": chat.ASSISTANT, "content": ""},
    "conversations": {"from": "gpt", "value": ""},
}
FORMS = '"messages", "conversations", or "prompt"'


@dataclasses.dataclass(frozen=True)
class Chat:
    """A model that answers; `end_ids` are the tokens that end its turn."""

    params: dict
    config: model.ModelConfig
    tokenizer: tokenizers.Tokenizer
    template: ChatTemplate
    end_ids: tuple[int, ...]
    num_tokens: int
    sampling: Sampling = GREEDY

    def prompt(self, talk: chat.Conversation) -> np.ndarray:
        """The ids that the model continues; raises ValueError if the template fails."""
        text = self.template.render(talk.messages, tools=talk.tools, prompt=True).text
        return self.tokenizer.with_offsets(text)[0]

    def stream(self, messages: Sequence[Message], key: jax.Array) -> Iterator[str]:
        """The answer to a conversation, in parts.

        Raises: ValueError if the model has no room for the conversation and an answer.
        """
        ids, shown = np.zeros(0, np.int32), ""
        prompt = self.prompt(chat.Conversation(tuple(messages)))
        pieces = generate.pieces(
            self.params,
            self.config,
            [prompt],
            num_tokens=self.num_tokens,
            sampling=self.sampling,
            key=key,
            # Few lengths, for each of them is compiled.
            length=self._room(1 << (len(prompt) - 1).bit_length()),
            piece=STREAMED,
        )
        for (more,) in pieces:
            ids = np.concatenate([ids, more])[: self.num_tokens]
            kept = generate.before_end(ids, self.end_ids)
            ended = len(kept) < len(ids) or len(ids) == self.num_tokens
            text = self.tokenizer.decode(kept)
            text = text if ended else text.rstrip(INCOMPLETE)
            if text.startswith(shown):
                yield text[len(shown) :]
                shown = text
            if ended:
                return

    def answers(self, conversations: Sequence[chat.Conversation], key: jax.Array) -> list[str]:
        """The answers to conversations of any lengths, in one batch."""
        found = generate.generate_until(
            self.params,
            self.config,
            [self.prompt(talk) for talk in conversations],
            lambda ids: len(generate.before_end(ids, self.end_ids)) < len(ids),
            num_tokens=self.num_tokens,
            sampling=self.sampling,
            key=key,
        )
        return [self.tokenizer.decode(generate.before_end(ids, self.end_ids)) for ids in found]

    def _room(self, length: int) -> int:
        return min(length, self.config.max_position_embeddings - self.num_tokens)


def asked(record: Mapping[str, Any]) -> chat.Conversation:
    """The conversation of a record in one of the forms of training, for a model to answer.

    It is read as in training, with an empty answer at its end, which is then left out. The
    "completion" after a "prompt" is left out too.

    Raises: ValueError for a record that has none.
    """
    field = next((name for name in (*EMPTY, "prompt") if name in record), None)
    if field is None:
        raise ValueError(f"it has none of {FORMS}; write one of them")
    try:
        if field in EMPTY:
            record = {**record, field: [*chat.messages_of(record, field), EMPTY[field]]}
        else:
            record = {**record, "completion": ""}
        talk = chat.conversation(record)
    except ValueError as error:
        raise ValueError(f"{str(error).lstrip(': ')}; mend it") from None
    return dataclasses.replace(talk, messages=talk.messages[:-1], first=0)


def settings(found: dict[str, Any]) -> Sampling:
    """The sampling that a generation_config.json asks for.

    Raises: ValueError for a setting out of its range.
    """
    if found.get("do_sample") is not True:
        return GREEDY
    given = {name: found[name] for name in Sampling._fields if found.get(name) is not None}
    for name, value in given.items():
        allowed, words = RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
            raise ValueError(f"generation_config.json: {name}={value!r} must be {words}")
    return Sampling(**{"temperature": 1.0, **given})


def talk(
    chat: Chat, lines: Iterable[str], write: Callable[[str], object], *, system: str, seed: int
) -> None:
    """Answers each line, with those before it as the conversation.

    Args:
      lines: what the user says; "/reset" begins anew.
      write: called with parts of the answers.
      system: the system's message; "" is none.
    """
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    for number, line in enumerate(lines):
        if line.strip() == RESET:
            messages = list(beginning)
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        for part in chat.stream(messages, jax.random.key(seed + number)):
            write(part)
            answer += part
        write("\n")
        messages.append({"role": "assistant", "content": answer})
