"""Token records: what is known of them without reading, and damage that is recognised."""

import math
import re

import numpy as np
import pytest

from tests.data.test_batches import batches
from tests.data.test_prepare import BYTES, RECORD_TOKENS, RECORDS, open_corpus, tokens_of, write


def test_records_of_a_document_overlap_by_the_token_that_is_target_then_input(corpus):
    documents, i = [], 0
    while i < len(corpus.pairs):
        tokens = corpus.tokens(i).tolist()
        while tokens[-1] != BYTES.eos_id:
            i += 1
            assert corpus.tokens(i)[0] == tokens[-1]
            tokens.extend(corpus.tokens(i)[1:].tolist())
        documents.append(tokens)
        i += 1
    assert documents == [
        [BYTES.bos_id, *BYTES.encode(record["text"]), BYTES.eos_id] for record in RECORDS
    ]
    assert corpus.pairs.max() == RECORD_TOKENS - 1


def test_pairs_times_bytes_per_token_are_the_bytes_of_the_text_of_each_label(corpus):
    assert corpus.labels == ("en", "ru", "zh")
    for label_id, label in enumerate(corpus.labels):
        texts = [r["text"].encode() for r in RECORDS if r["language"] == label]
        pairs = corpus.pairs[corpus.label_ids == label_id].sum()
        assert pairs == sum(len(text) + 1 for text in texts)  # each byte, and the end
        np.testing.assert_allclose(
            corpus.bytes_per_token[label] * pairs, sum(map(len, texts)), rtol=1e-12
        )
    assert corpus.num_tokens == corpus.pairs.sum()


@pytest.mark.parametrize(
    ("texts", "bits"),
    [
        (["aa", "bc"], 1.5),  # 1/2, 1/4, 1/4
        (["aaaa"], 0.0),
        (["é"], 1.0),  # two bytes
        (["aab"], math.log2(3) - 2 / 3),
        (["", ""], 0.0),
    ],
)
def test_byte_unigram_bits_agree_with_entropies_by_hand(texts, bits, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert open_corpus(source, tmp_path).byte_unigram_bits == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize("keep", [0, 100, 2**16, 0.5, -1])
def test_a_cache_that_is_truncated_after_it_was_opened_is_called_damaged(keep, tmp_path):
    """Before that it is made anew: test_prepare.py."""
    corpus = open_corpus(write(tmp_path / "a.jsonl"), tmp_path)
    path = corpus.folder / "tokens-00000-00000.array_record"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else keep])
    with pytest.raises(
        ValueError,
        match=rf"^{re.escape(str(path))} is damaged at record \d+ .*; remove it, and prep",
    ) as error:
        batches(corpus, 1)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_called_damage_or_lies_in_padding(tmp_path):
    source = write(tmp_path / "a.jsonl")
    corpus = open_corpus(source, tmp_path)
    expected = tokens_of(corpus)
    path = corpus.folder / "tokens-00000-00000.array_record"
    content = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = 0
    # First bytes of the records, then any bytes.
    for at in (*random.integers(64, 2000, 20), *random.integers(0, len(content), 10)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        reader = open_corpus(source, tmp_path)
        try:
            assert tokens_of(reader) == expected
        except ValueError as error:
            assert str(error).startswith(f"{path} is damaged at record ")
            damaged += 1
    assert damaged >= 20


def test_records_of_another_text_are_called_damage(tmp_path):
    source = write(tmp_path / "a.jsonl")
    corpus = open_corpus(source, tmp_path)
    other = open_corpus(write(tmp_path / "b.jsonl", RECORDS[::-1]), tmp_path)
    (other.folder / "tokens-00000-00000.array_record").rename(
        corpus.folder / "tokens-00000-00000.array_record"
    )
    with pytest.raises(ValueError, match=r"at record \d+ \(it has not the \d+ tokens of pairs"):
        batches(open_corpus(source, tmp_path), 1)
