"""Batch N is the same bytes on any number of hosts, by any number of workers, after any resume."""

import collections
import contextlib
import functools
import hashlib
import itertools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.data import batches as text_batches
from moe_jax.data.packing import PACKINGS, RowPlan

T, B, NUMBER = 32, 8, 200
HOSTS = (1, 2, 4)
each_packing = pytest.mark.parametrize("packing", PACKINGS)


class Documents:
    """Record d holds the tokens 100 d, 100 d + 1, …; some records have no pair."""

    def __init__(self, number):
        self.pairs = np.random.default_rng(0).integers(0, 80, number).astype(np.int32)
        self.label_ids = np.arange(number) % 7

    def tokens(self, record):
        return np.arange(100 * record, 100 * record + self.pairs[record] + 1, dtype=np.uint32)


def make(corpus, packing, **how):
    plan = RowPlan(corpus.pairs, sequence_length=T, seed=3, packing=packing, cell_size=130)
    return text_batches.batches(corpus, plan, batch_size=B, **how)


def hashes(made, number):
    """A hash of each batch's bytes."""
    with contextlib.closing(made):
        return [
            hashlib.sha256(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(batch))).digest()
            for batch in itertools.islice(made, number)
        ]


def joined(parts):
    """The batches of all hosts, host by host."""
    for of_hosts in zip(*parts, strict=True):
        yield jax.tree.map(lambda *rows: np.concatenate(rows), *of_hosts)


def rows_of(host, hosts):
    return np.arange(B).reshape(hosts, -1)[host]


@functools.cache
def whole(packing):
    """The hashes of the first batches, which span more than one epoch."""
    corpus = Documents(800)
    plan = RowPlan(corpus.pairs, sequence_length=T, seed=3, packing=packing, cell_size=130)
    assert plan.num_cells > 5 and plan.rows_per_epoch < NUMBER * B
    return hashes(make(corpus, packing), NUMBER)


@pytest.mark.parametrize("hosts", HOSTS[1:])
@each_packing
def test_the_first_200_batches_are_the_same_bytes_on_any_number_of_hosts(packing, hosts):
    corpus = Documents(800)
    parts = [make(corpus, packing, rows=rows_of(host, hosts)) for host in range(hosts)]
    assert hashes(joined(parts), NUMBER) == whole(packing)


@hypothesis.given(
    packing=st.sampled_from(sorted(PACKINGS)),
    start=st.integers(0, NUMBER - 2),
    hosts=st.sampled_from(HOSTS),
    threads=st.integers(1, 4),
)
@hypothesis.settings(deadline=None, max_examples=15)
def test_a_resumed_run_gets_the_same_bytes_from_any_step_on(packing, start, hosts, threads):
    corpus, how = Documents(800), {"start_step": start, "num_threads": threads}
    parts = [make(corpus, packing, rows=rows_of(host, hosts), **how) for host in range(hosts)]
    number = min(6, NUMBER - start)
    assert hashes(joined(parts), number) == whole(packing)[start : start + number]


@pytest.mark.parametrize(
    ("packing", "workers"),
    [
        ("best_fit", 1),
        *(pytest.param(packing, 4, marks=pytest.mark.long) for packing in PACKINGS),
    ],
)
def test_worker_processes_make_the_same_bytes(packing, workers, corpus):
    from_threads = hashes(make(corpus, packing, start_step=5), NUMBER)
    assert hashes(make(corpus, packing, start_step=5, workers=workers), NUMBER) == from_threads


@pytest.mark.parametrize("hosts", HOSTS)
@each_packing
def test_every_document_appears_exactly_once_an_epoch(packing, hosts):
    corpus = Documents(800)
    plan = RowPlan(corpus.pairs, sequence_length=T, seed=3, packing=packing, cell_size=130)
    number = -(-plan.rows_per_epoch // B)
    parts = [make(corpus, packing, rows=rows_of(host, hosts)) for host in range(hosts)]
    rows = itertools.islice(joined(parts), number)
    joint = jax.tree.map(lambda *rows: np.concatenate(rows)[: plan.rows_per_epoch], *rows)
    there = joint.segment_ids_BT > 0
    documents = collections.defaultdict(list)
    for token, target in zip(joint.tokens_BT[there], joint.targets_BT[there], strict=True):
        assert target == token + 1
        documents[int(token) // 100].append(int(token))

    def digest(tokens):
        return hashlib.sha256(np.array(sorted(tokens)).tobytes()).digest()

    expected = (corpus.tokens(record)[:-1].astype(np.int64) for record in range(800))
    assert collections.Counter(map(digest, documents.values())) == collections.Counter(
        digest(tokens) for tokens in expected if len(tokens)
    )


@each_packing
def test_without_a_document_mask_a_row_is_one_segment_and_nothing_else_changes(packing):
    corpus = Documents(100)
    pairs = zip(make(corpus, packing), make(corpus, packing, document_mask=False), strict=False)
    for masked, open_ in itertools.islice(pairs, 20):
        np.testing.assert_array_equal(open_.segment_ids_BT, masked.segment_ids_BT > 0)
        replaced = open_.replace(segment_ids_BT=masked.segment_ids_BT)
        jax.tree.map(np.testing.assert_array_equal, replaced, masked)


@each_packing
def test_positions_that_are_not_reset_count_over_the_row(packing):
    made = make(Documents(100), packing, reset_positions=False)
    for batch in itertools.islice(made, 20):
        there = batch.segment_ids_BT > 0
        np.testing.assert_array_equal(batch.positions_BT, np.arange(T) * there)


def test_a_batch_is_put_on_the_devices_before_the_one_ahead_of_it_is_used():
    done = []
    text = text_batches._ahead(range(4), lambda n: done.append(f"put {n}") or n)
    for n in text:
        done.append(f"use {n}")
    assert done == ["put 0", "put 1", "use 0", "put 2", "use 1", "put 3", "use 2", "use 3"]
