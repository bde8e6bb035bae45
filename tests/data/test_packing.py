"""The row plan against what it must hold whatever the records: all pairs once, no state."""

import collections

import hypothesis
import numpy as np
from hypothesis import strategies as st

from moe_jax.data.packing import RowPlan

# Records without pairs, and longer than a row; more of them than a block has.
num_pairs = st.integers(0, 2) | st.integers(0, 25)
sizes = {
    "pairs": st.lists(num_pairs, min_size=1, max_size=12).filter(any),
    "sequence_length": st.integers(1, 12),
    "seed": st.integers(0, 2**31 - 1),
    "block_size": st.integers(1, 15),
}


def make(pairs, *, sequence_length=7, seed=0, **kwargs):
    return RowPlan(np.array(pairs, np.int32), sequence_length=sequence_length, seed=seed, **kwargs)


def epoch(plan, n=0):
    return [plan.row(n * plan.rows_per_epoch + i) for i in range(plan.rows_per_epoch)]


def pairs_in(rows):
    return collections.Counter(
        (piece.record, at) for row in rows for piece in row for at in range(piece.start, piece.stop)
    )


def length(row):
    return sum(piece.stop - piece.start for piece in row)


@hypothesis.given(n=st.integers(0, 5), **sizes)
@hypothesis.settings(deadline=None, max_examples=25)
def test_every_pair_is_seen_exactly_once_an_epoch(n, pairs, **kwargs):
    rows = epoch(make(pairs, **kwargs), n)
    assert pairs_in(rows) == collections.Counter(
        (record, at) for record, size in enumerate(pairs) for at in range(size)
    )


@hypothesis.given(**sizes)
@hypothesis.settings(deadline=None, max_examples=25)
def test_a_row_is_full_unless_it_is_the_last_of_its_block(pairs, sequence_length, block_size, seed):
    plan = make(pairs, sequence_length=sequence_length, block_size=block_size, seed=seed)
    of_block = collections.defaultdict(list)
    for row in epoch(plan):
        (block,) = {piece.record // block_size for piece in row}
        of_block[block].append(length(row))
    for block, lengths in of_block.items():
        total = sum(pairs[block * block_size : (block + 1) * block_size])
        full, rest = divmod(total, sequence_length)
        assert sorted(lengths, reverse=True) == [sequence_length] * full + [rest] * (rest > 0)


@hypothesis.given(**sizes)
@hypothesis.settings(deadline=None, max_examples=25)
def test_a_piece_is_never_empty_and_a_record_is_cut_at_row_ends_only(pairs, **kwargs):
    for row in epoch(make(pairs, **kwargs)):
        assert all(piece.start < piece.stop for piece in row)
        for piece in row[1:]:
            assert piece.start == 0
        for piece in row[:-1]:
            assert piece.stop == pairs[piece.record]


def test_a_row_does_not_depend_on_what_was_asked_before():
    pairs = np.random.default_rng(0).integers(0, 30, 200)
    asked = np.random.default_rng(1).permutation(1500)
    in_order = make(pairs, block_size=16)
    rows = [in_order.row(g) for g in range(1500)]
    assert 1500 > 2 * in_order.rows_per_epoch
    at_random = make(pairs.tolist(), block_size=16)
    assert all(at_random.row(int(g)) == rows[g] for g in asked)
    assert make(pairs, block_size=16).row(10**12) == in_order.row(10**12)


def test_lengths_on_disk_are_as_good_as_in_memory(tmp_path):
    pairs = np.random.default_rng(0).integers(0, 30, 50, np.int32)
    np.save(tmp_path / "pairs.npy", pairs)
    mapped = np.load(tmp_path / "pairs.npy", mmap_mode="r")
    plan = RowPlan(mapped, sequence_length=7, seed=0, block_size=16)
    assert epoch(plan) == epoch(make(pairs, block_size=16))


def test_each_epoch_and_each_seed_has_an_order_and_neighbours_of_its_own():
    plan = make([5] * 100, sequence_length=20)
    orders = [epoch(plan, 0), epoch(plan, 1), epoch(make([5] * 100, sequence_length=20, seed=1))]
    neighbours = [{frozenset(p.record for p in row) for row in rows} for rows in orders]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert orders[i] != orders[j]
        # Two partitions of 100 records into 25 rows of four share next to no row by chance.
        assert len(neighbours[i] & neighbours[j]) < 3


def test_rows_of_all_blocks_are_shuffled_together_anew_each_epoch():
    """Else every epoch would go through the corpus front to back, or in one and the same order."""

    def blocks(seed, n):
        plan = make([7] * 256, sequence_length=7, seed=seed, block_size=16)
        return np.array([row[0].record // 16 for row in epoch(plan, n)])

    orders = [blocks(seed=0, n=0), blocks(seed=0, n=1), blocks(seed=1, n=0)]
    for order in orders:
        # 256 draws of 16 blocks; the standard deviation of a half's mean is 0.3.
        assert abs(order[:128].mean() - order[128:].mean()) < 2
        assert len(set(order[:16])) > 5
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(orders[i] == orders[j]) < 0.2  # by chance 1/16


def test_a_total_beyond_32_bits_does_not_overflow():
    plan = make([2**30] * 5, sequence_length=2**20, block_size=4)
    assert plan.rows_per_epoch == 5 * 2**10
    assert all(length(plan.row(g)) == 2**20 for g in (0, 1234, 5 * 2**10 - 1))
