"""Documents as tokens: a text between begin and end token, a conversation by a chat template."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moe_jax import stopping
from moe_jax.data import chat, corpus, tokenizers
from moe_jax.data.document import Document
from moe_jax.data.tokenizers import Tokenizer

TOO_LONG = "conversation that does not fit into a row"
CUT = "message at the end that does not fit into a row"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A document as it is stored.

    ids_N: uint32, with the bit `corpus.NO_LOSS` where a token is not trained.
    text: what the trained tokens say.
    left_out: the number of messages that did not fit.
    """

    ids_N: np.ndarray
    text: str
    left_out: int = 0

    @property
    def targets(self) -> int:
        """The number of predicted tokens that are trained."""
        return int(np.sum(self.ids_N[1:] < corpus.NO_LOSS))


def encode(
    documents: Sequence[Document], tokenizer: Tokenizer, form: chat.Form | None
) -> Iterator[Encoded | Exception | None]:
    """Each document as tokens; the error of one that cannot be tokenized, or None for a
    conversation of which not even the first turn fits."""
    if form is not None:
        special = tuple(tokenizer.special_tokens)
        for document in documents:
            try:
                yield _conversation(document, tokenizer, form, special)
            except Exception as error:  # the libraries raise many types
                stopping.pass_on(error)
                yield error
        return
    for document, ids in zip(documents, _ids(documents, tokenizer), strict=True):
        if isinstance(ids, Exception):
            yield ids
        else:
            around = np.array([tokenizer.bos_id]), ids, np.array([tokenizer.eos_id])
            text = tokenizers.encoded_text(tokenizer, document.text, ids)
            yield Encoded(np.concatenate(around).astype(np.uint32), text)


def _conversation(
    document: Document, tokenizer: Tokenizer, form: chat.Form, special: Sequence[str]
) -> Encoded | None:
    assert document.conversation is not None
    found = form.tokens(document.conversation, tokenizer.with_offsets, special)
    if found is None:
        return None
    flags = np.where(found.weights_N > 0, np.uint32(0), corpus.NO_LOSS)
    return Encoded(found.ids_N.astype(np.uint32) | flags, found.text, found.left_out)


def _ids(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterable[np.ndarray | Exception]:
    try:
        return tokenizer.encode_batch([document.text for document in documents])
    except Exception as error:  # the libraries raise many types
        stopping.pass_on(error)
        return _ids_one_by_one(documents, tokenizer)


def _ids_one_by_one(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> Iterator[np.ndarray | Exception]:
    for document in documents:
        try:
            yield tokenizer.encode(document.text)
        except Exception as error:
            stopping.pass_on(error)
            yield error
