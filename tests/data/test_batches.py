"""Batches against the text that they were made of."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data import batches as text_batches
from moe_jax.data.batches import Batch
from moe_jax.data.packing import RowPlan
from tests.data.test_prepare import BYTES, RECORDS

T, B = 16, 4


def batches(corpus, number, **kwargs):
    plan = RowPlan(corpus.pairs, sequence_length=T, seed=kwargs.pop("seed", 0))
    made = text_batches.batches(corpus, plan, **{"batch_size": B, **kwargs})
    return list(itertools.islice(made, number))


def evaluation_batches(corpus, **kwargs):
    arguments = {"sequence_length": T, "batch_size": B, **kwargs}
    return list(text_batches.evaluation_batches(corpus, **arguments))


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(first, second):
    return any((a.tokens_BT != b.tokens_BT).any() for a, b in zip(first, second, strict=True))


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


def test_all_arrays_have_the_documented_types_and_shape(corpus):
    rows = jnp.zeros((B, T + 1), jnp.int32)
    for batch in (*batches(corpus, 1), evaluation_batches(corpus)[-1], Batch.of_rows(rows)):
        assert batch.reference_BT is None
        for name, array in vars(batch.replace(reference_BT=batch.tokens_BT)).items():
            assert array.dtype == (np.float32 if name == "weights_BT" else np.int32)
            assert array.shape == (B, T)


def test_a_target_weighs_1_and_padding_0(corpus):
    made = [*batches(corpus, 3), *evaluation_batches(corpus)]
    rows = jnp.zeros((2, 3), jnp.int32)
    made.append(Batch.of_rows(rows, jnp.array([[1, 1], [1, 0]])))
    for batch in made:
        np.testing.assert_array_equal(batch.weights_BT, batch.segment_ids_BT > 0)


def segments(batch):
    """(tokens, targets, positions, labels) of each segment of each row."""
    for row, ids in enumerate(batch.segment_ids_BT):
        for segment in range(1, ids.max() + 1):
            there = ids == segment
            arrays = (batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.labels_BT)
            yield [array_BT[row][there].tolist() for array_BT in arrays]


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
        for row, ids in enumerate(batch.segment_ids_BT):
            size = np.count_nonzero(ids)
            padded += size < T
            assert (ids[size:] == 0).all()
            assert set(np.diff(ids[:size], prepend=0).tolist()) <= {0, 1}
            for array in jax.tree.leaves(batch):
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
    num_rows = sum(np.count_nonzero(batch.segment_ids_BT[:, 0]) for batch in held_out)
    assert num_rows % B
    for batches_of_pass in (held_out, batches(corpus, -(-num_rows // B))):
        joined = jax.tree.map(lambda *rows: np.concatenate(rows)[:num_rows], *batches_of_pass)
        valid = joined.segment_ids_BT > 0
        columns = (
            x[valid].tolist() for x in (joined.labels_BT, joined.tokens_BT, joined.targets_BT)
        )
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
    on_device = text_batches.to_device(batch, sharding, np.arange(8), 8)
    assert_equal([on_device], [batch])
    assert all(array.sharding == sharding for array in jax.tree.leaves(on_device))


@pytest.mark.parametrize(
    ("left_out", "numbers"),
    [
        ((), [0, 1, 2, 3]),
        (((0, 0),), [1, 2, 3, 4]),
        (((2, 3), (5, 5)), [0, 1, 4, 6]),
        (((5, 5), (2, 3)), [0, 1, 4, 6]),
        (((0, 5), (3, 8)), [9, 10, 11, 12]),
        (((1, 2), (3, 4)), [0, 5, 6, 7]),
        (((1, 9), (3, 4)), [0, 10, 11, 12]),
    ],
)
def test_batches_that_are_left_out_do_not_count(left_out, numbers):
    assert [text_batches.number(n, left_out) for n in range(4)] == numbers
    out = {n for first, last in left_out for n in range(first, last + 1)}
    assert numbers == [n for n in range(99) if n not in out][:4]
