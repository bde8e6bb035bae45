"""The cache of tokens, and batches against the text they were made of."""

import collections
import functools
import itertools
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest

from moe_jax.data import pipeline, tokenizers

BYTES = tokenizers.ByteTokenizer()
T, B = 16, 4
# Languages of unequal size; texts without a byte, shorter than a row, and longer than a record.
RECORDS = [
    {"text": f"{language} {i}: " + word * (i * i % 23), "language": language, "doc": i}
    for language, word, number in (("en", "word ", 20), ("ru", "слово ", 12), ("zh", "字", 7))
    for i in range(number)
] + [{"text": "", "language": "en", "doc": "empty"}]
RECORD_TOKENS = 50


def write(path: pathlib.Path, records=RECORDS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def open_corpus(source, cache, *, split="train", tokenizer=BYTES, fraction=0.0):
    return pipeline.open_corpus(source, split, tokenizer, validation_fraction=fraction, cache=cache)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "RECORD_TOKENS", RECORD_TOKENS)
        corpus = open_corpus(write(folder / "text.jsonl"), folder)
    assert len(corpus.pairs) > len(RECORDS)
    return corpus


def batches(corpus, number, **kwargs):
    arguments = {"sequence_length": T, "batch_size": B, "seed": 0, **kwargs}
    return list(itertools.islice(pipeline.batches(corpus, **arguments), number))


def evaluation_batches(corpus, **kwargs):
    arguments = {"sequence_length": T, "batch_size": B, **kwargs}
    return list(pipeline.evaluation_batches(corpus, **arguments))


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(first, second):
    return any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, second, strict=True))


# the cache ----------------------------------------------------------------------------------------


def test_a_second_opening_tokenizes_nothing_wherever_the_text_lies(tmp_path, monkeypatch):
    first = open_corpus(write(tmp_path / "here" / "a.jsonl"), tmp_path)

    def refuse(*arguments):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(pipeline, "_tokenize", refuse)
    again = open_corpus(write(tmp_path / "moved" / "a.jsonl"), tmp_path)
    assert again.folder == first.folder
    assert_equal(batches(again, 3), batches(first, 3))


def test_another_text_tokenizer_split_or_fraction_is_kept_elsewhere(tmp_path):
    bpe = tmp_path / "bpe.model"
    tokenizers.train_bpe([r["text"] for r in RECORDS], 290, bpe)
    source = write(tmp_path / "a.jsonl")
    edited = write(tmp_path / "edited" / "a.jsonl", [{**RECORDS[0], "text": "!"}, *RECORDS[1:]])
    corpora = [
        open_corpus(source, tmp_path, fraction=0.5),
        open_corpus(edited, tmp_path, fraction=0.5),
        open_corpus(source, tmp_path, fraction=0.5, tokenizer=tokenizers.load(str(bpe))),
        open_corpus(source, tmp_path, fraction=0.5, split="validation"),
        open_corpus(source, tmp_path, fraction=0.4),
    ]
    assert len({corpus.folder for corpus in corpora}) == len(corpora)


class Interrupting(tokenizers.ByteTokenizer):
    def encode(self, text):
        if "9" in text:
            raise KeyboardInterrupt
        return super().encode(text)


def test_an_interrupted_tokenization_leaves_nothing_and_is_done_over(tmp_path):
    source = write(tmp_path / "a.jsonl")
    with pytest.raises(KeyboardInterrupt):
        open_corpus(source, tmp_path, tokenizer=Interrupting())
    assert not list((tmp_path / "tokens").iterdir())
    assert len(open_corpus(source, tmp_path).pairs) == len(RECORDS)


def test_two_processes_that_tokenize_at_once_end_with_one_folder(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl")
    tokenize = pipeline._tokenize

    def overtaken(*arguments):
        monkeypatch.setattr(pipeline, "_tokenize", tokenize)
        open_corpus(source, tmp_path)
        return tokenize(*arguments)

    monkeypatch.setattr(pipeline, "_tokenize", overtaken)
    corpus = open_corpus(source, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == [corpus.folder]
    assert len(batches(corpus, 1)) == 1


def test_a_split_without_documents_is_refused_and_not_kept(tmp_path):
    source = write(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="has no validation documents; set config.data"):
        open_corpus(source, tmp_path, split="validation")
    assert not list((tmp_path / "tokens").iterdir())


def test_the_cache_is_the_users_unless_a_folder_is_given(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert pipeline.cache_folder("") == pathlib.Path("/xdg/moe_jax")
    assert pipeline.cache_folder("mine") == pathlib.Path("mine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert pipeline.cache_folder("") == pathlib.Path.home() / ".cache" / "moe_jax"


@pytest.mark.parametrize("keep", [0, 100, 2**16, 0.5, -1])
def test_a_truncated_cache_is_called_damaged(keep, tmp_path):
    folder = open_corpus(write(tmp_path / "a.jsonl"), tmp_path).folder
    path = folder / "tokens.array_record"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else keep])
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(folder))} is damaged .*; delete the"
    ) as error:
        batches(open_corpus(write(tmp_path / "a.jsonl"), tmp_path), 1)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_called_damage_or_lies_in_padding(tmp_path):
    source = write(tmp_path / "a.jsonl")
    corpus = open_corpus(source, tmp_path)
    expected = [corpus.tokens(i).tolist() for i in range(len(corpus.pairs))]
    path = corpus.folder / "tokens.array_record"
    content = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = 0
    # Where the records lie, then anywhere.
    for at in (*random.integers(64, 2000, 20), *random.integers(0, len(content), 10)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        reader = open_corpus(source, tmp_path)
        try:
            assert [reader.tokens(i).tolist() for i in range(len(reader.pairs))] == expected
        except ValueError as error:
            assert "is damaged" in str(error)
            damaged += 1
    assert damaged >= 20


def test_records_of_another_text_are_called_damage(tmp_path):
    source = write(tmp_path / "a.jsonl")
    corpus = open_corpus(source, tmp_path)
    other = open_corpus(write(tmp_path / "b.jsonl", RECORDS[::-1]), tmp_path)
    (other.folder / "tokens.array_record").rename(corpus.folder / "tokens.array_record")
    with pytest.raises(ValueError, match=r"is damaged \(record \d+\); delete the folder"):
        batches(open_corpus(source, tmp_path), 1)


# what is known of a corpus ------------------------------------------------------------------------


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


# batches ------------------------------------------------------------------------------------------


def test_batch_n_is_the_same_from_wherever_one_starts(corpus):
    sequence = batches(corpus, 12)
    for start in (0, 1, 5, 11):
        assert_equal(batches(corpus, 12 - start, start_step=start), sequence[start:])
    far = 10**9  # epochs that nobody has gone through
    assert_equal(batches(corpus, 1, start_step=far + 1), batches(corpus, 2, start_step=far)[1:])


def test_the_number_of_threads_changes_nothing(corpus):
    assert_equal(batches(corpus, 10, num_threads=1), batches(corpus, 10, num_threads=4))


@pytest.mark.parametrize("rows", [[0, 1], [1, 3], [2]])
def test_some_rows_of_a_batch_are_those_of_the_whole_batch(corpus, rows):
    for make in (
        functools.partial(batches, corpus, 3),
        functools.partial(evaluation_batches, corpus),
    ):
        assert_equal(make(rows=rows), jax.tree.map(lambda x: x[rows], make()))


def test_each_seed_and_epoch_has_an_order_of_its_own(corpus):
    number = len(evaluation_batches(corpus))
    first = batches(corpus, number)
    assert differ(first, batches(corpus, number, seed=1))
    assert differ(first, batches(corpus, 2 * number)[number:])


def test_all_arrays_are_int32_of_the_documented_shape(corpus):
    for batch in (*batches(corpus, 1), evaluation_batches(corpus)[-1]):
        assert sorted(batch) == ["labels", "positions", "segment_ids", "targets", "tokens"]
        for array in batch.values():
            assert array.dtype == np.int32 and array.shape == (B, T)


def segments(batch):
    """(tokens, targets, positions, labels) of each segment of each row."""
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            there = ids == segment
            names = ("tokens", "targets", "positions", "labels")
            yield [batch[name][row][there].tolist() for name in names]


def test_a_segment_is_a_piece_of_one_document_with_its_next_tokens(corpus):
    texts = collections.defaultdict(list)
    for record in RECORDS:
        ids = [BYTES.bos_id, *BYTES.encode(record["text"]), BYTES.eos_id]
        texts[corpus.labels.index(record["language"])].append(" ".join(map(str, ids)) + " ")
    for batch in batches(corpus, 30):
        for tokens, targets, positions, labels in segments(batch):
            assert targets[:-1] == tokens[1:]
            assert positions == list(range(len(tokens)))
            (label,) = set(labels)
            piece = " ".join(map(str, [*tokens, targets[-1]])) + " "
            assert any(piece in text for text in texts[label])


def test_segments_are_numbered_along_a_row_and_padding_is_zero_at_its_end(corpus):
    padded = 0
    for batch in evaluation_batches(corpus):
        for row, ids in enumerate(batch["segment_ids"]):
            size = np.count_nonzero(ids)
            padded += size < T
            assert (ids[size:] == 0).all()
            assert set(np.diff(ids[:size], prepend=0).tolist()) <= {0, 1}
            for array in batch.values():
                assert (array[row, size:] == 0).all()
    assert padded


def test_evaluations_and_epochs_predict_every_token_of_every_document_exactly_once(corpus):
    expected = collections.Counter()
    for record in RECORDS:
        ids = [BYTES.bos_id, *BYTES.encode(record["text"]).tolist(), BYTES.eos_id]
        label = corpus.labels.index(record["language"])
        expected.update((label, *pair) for pair in itertools.pairwise(ids))
    assert expected.total() == corpus.num_tokens

    held_out = evaluation_batches(corpus)
    num_rows = sum(np.count_nonzero(batch["segment_ids"][:, 0]) for batch in held_out)
    assert num_rows % B
    for batches_of_pass in (held_out, batches(corpus, -(-num_rows // B))):
        joined = jax.tree.map(lambda *rows: np.concatenate(rows)[:num_rows], *batches_of_pass)
        valid = joined["segment_ids"] > 0
        columns = (joined[name][valid].tolist() for name in ("labels", "tokens", "targets"))
        assert collections.Counter(zip(*columns, strict=True)) == expected


def test_a_part_of_an_evaluation_is_its_beginning(corpus):
    whole = evaluation_batches(corpus)
    assert_equal(evaluation_batches(corpus, max_batches=2), whole[:2])
    assert_equal(evaluation_batches(corpus, max_batches=0), whole)
    assert_equal(evaluation_batches(corpus, max_batches=10**6), whole)


def test_global_arrays_hold_the_rows_in_order(corpus):
    (batch,) = batches(corpus, 1, batch_size=8)
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    on_device = pipeline.to_device(batch, sharding, np.arange(8), 8)
    assert_equal([on_device], [batch])
    assert all(array.sharding == sharding for array in on_device.values())
