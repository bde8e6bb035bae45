"""Chooses how much text of each label a tokenizer is trained on."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping

from moe_jax.data.document import Document


def quotas(
    characters: Mapping[str, int], total: int, alpha: float, named: Mapping[str, int]
) -> dict[str, float]:
    """The characters to take of each label.

    With `named` (LLM-jp's way), the labels in it have that many, and others none. Otherwise, label
    l with n_l characters gets the share n_l^alpha / sum n^alpha of `total`: alpha=1 keeps the
    proportions, 0 gives equal shares (Conneau and Lample, arXiv 1901.07291, section 3.1). With
    total=0 and no `named`, all text is taken. A label has at most all its characters.

    Raises: ValueError for a named label that the text does not have.
    """
    if unknown := named.keys() - characters.keys():
        raise ValueError(
            f"--characters: no text is labelled {min(unknown)!r}; there are: "
            f"{', '.join(sorted(characters))}"
        )
    weights = {label: n**alpha if n else 0 for label, n in characters.items()}
    if named:
        wanted: Mapping[str, float] = named
    elif total:
        wanted = {label: total * w / sum(weights.values()) for label, w in weights.items()}
    else:
        wanted = characters
    return {label: min(wanted.get(label, 0), n) for label, n in characters.items()}


def sample(
    documents: Iterable[Document], characters: Mapping[str, int], quotas: Mapping[str, float]
) -> Iterator[Document]:
    """Documents chosen by a hash of their text, so that about the quota of each label is taken.

    Args:
      characters: the number of characters of each label in all documents.
    """
    for document in documents:
        share = quotas[document.label] / max(characters[document.label], 1)
        drawn = int.from_bytes(hashlib.sha256(document.text.encode()).digest()[-8:], "big") / 2**64
        if drawn < share:
            yield document
