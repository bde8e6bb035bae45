"""A bounded, balanced sample of a corpus."""

import dataclasses

import numpy as np
import pytest

from moe_jax.data import batches, sample


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Records whose tokens are consecutive numbers, so that each token tells where it is from."""

    pairs: np.ndarray
    label_ids: np.ndarray
    labels: tuple[str, ...]

    def tokens(self, record):
        return 1000 * record + np.arange(self.pairs[record] + 1, dtype=np.uint32)


CORPUS = Corpus(
    pairs=np.array([5, 30, 2, 8, 40, 4], np.int32),
    label_ids=np.array([0, 1, 0, 2, 1, 2], np.int32),
    labels=("small", "large", "middle"),
)  # 7, 70 and 12 pairs


def tokens_of_labels(part):
    return np.bincount(part.label_ids, part.pairs, minlength=3).astype(int).tolist()


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (9, [3, 3, 3]),  # an equal part each
        (30, [7, 11, 11]),  # `small` has 7 in all, the others share 23
        (40, [7, 21, 12]),  # `middle` is taken whole too
        (1000, [7, 70, 12]),
    ],
)
def test_labels_have_equal_parts_as_far_as_they_have_enough(most, expected):
    assert tokens_of_labels(sample.balanced(CORPUS, most)) == expected


def test_a_sample_is_of_whole_documents_but_the_last_of_a_label():
    part = sample.balanced(CORPUS, 60, seed=3)
    for i, record in enumerate(part.records):
        assert part.tokens(i).tolist() == CORPUS.tokens(record)[: part.pairs[i] + 1].tolist()
    for label in range(3):
        own = part.label_ids == label
        cut = part.pairs[own] < CORPUS.pairs[part.records[own]]
        assert not cut[:-1].any()


def test_batches_read_a_sample_like_a_corpus():
    part = sample.balanced(CORPUS, 30)
    rows = list(batches.evaluation_batches(part, sequence_length=8, batch_size=2))
    valid = np.concatenate([batch.segment_ids_BT.ravel() > 0 for batch in rows])
    labels = np.concatenate([batch.labels_BT.ravel() for batch in rows])[valid]
    assert np.bincount(labels).tolist() == tokens_of_labels(part) == [7, 11, 11]


def test_another_seed_draws_other_documents():
    one, other = (sample.balanced(CORPUS, 9, seed=seed).records.tolist() for seed in (0, 1))
    assert one != other and one == sample.balanced(CORPUS, 9).records.tolist()
