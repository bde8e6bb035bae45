"""Mixtures: shares hold over any stretch, counts have a closed form, caps and stages are exact."""

import collections
import itertools
import math
import pickle

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.data import batches, published_mixtures, shares
from moe_jax.data.mixed import MixedRecords, MixedText, by_label
from moe_jax.data.mixture import MixturePlan, Schedule, seed_of
from moe_jax.data.packing import RowPlan
from moe_jax.data.shares import WEIGHTS, Size, Stage
from moe_jax.data.spread import WINDOW, Spread
from tests.data.test_prepare import open_corpus, write

weights = st.lists(st.integers(0, 9) | st.floats(1e-6, 1e3), min_size=1, max_size=6).filter(any)
seeds = st.integers(0, 2**31 - 1)
SETTINGS = hypothesis.settings(deadline=None, max_examples=25)


def sources_of(spread, number):
    return np.array([spread.source(n) for n in range(number)])


@hypothesis.given(weights=weights, seed=seeds)
@SETTINGS
def test_counts_in_closed_form_are_those_of_the_rows_one_after_another(weights, seed):
    spread = Spread(weights, [seed])
    sources, before = sources_of(spread, 300).T
    for source in range(len(weights)):
        there = sources == source
        assert before[there].tolist() == list(range(there.sum()))
        for n in (0, 1, WINDOW - 1, WINDOW, 200, 300):
            assert spread.before(source, n) == there[:n].sum()
        for number in (1, there.sum()):
            if 0 < number <= there.sum():
                assert spread.rows_until(source, number) == np.flatnonzero(there)[number - 1] + 1


@hypothesis.given(weights=weights, seed=seeds, n=st.integers(0, 2**60))
@SETTINGS
def test_a_source_is_a_few_rows_from_its_share_after_any_number_of_rows(weights, seed, n):
    spread = Spread(weights, [seed])
    counts = [spread.before(source, n) for source in range(len(weights))]
    assert sum(counts) == n
    expected = np.array(weights) / sum(weights) * n
    # float64 knows a share to 2^-53, so only so much of 2^60 rows.
    np.testing.assert_allclose(counts, expected, rtol=0, atol=40 + n * 2**-48)


@pytest.mark.parametrize("name", ["LLM_JP_3", "OLMOE"])
def test_shares_hold_within_half_a_percent_over_any_10_000_rows(name):
    table = dict(getattr(published_mixtures, name))
    share = np.array(list(table.values())) / sum(table.values())
    sources = sources_of(Spread(list(table.values()), [0]), 30_000)[:, 0]
    for source in range(len(table)):
        seen = np.concatenate([[0], np.cumsum(sources == source)])
        over_10k = (seen[10_000:] - seen[:-10_000]) / 10_000
        assert np.abs(over_10k - share[source]).max() < 0.0025  # half of what is asked for


def test_the_order_is_random_within_a_window_so_that_every_kth_row_has_all_sources():
    """A device, or a microbatch, may get each fourth row of a batch."""
    sources = sources_of(Spread([1, 1, 1, 1], [0]), 8192)[:, 0]
    for first in range(4):
        share = np.bincount(sources[first::4], minlength=4) / 2048
        np.testing.assert_allclose(share, 0.25, atol=0.05)
    for seed in range(3):
        assert (sources != sources_of(Spread([1, 1, 1, 1], [seed + 1]), 8192)[:, 0]).mean() > 0.5


def test_weights_are_the_formulas():
    sizes = {"a": Size(tokens=1000, documents=1), "b": Size(tokens=10, documents=1)}
    of = {kind: row.of({"a": 3, "b": 1}, sizes, 0.5) for kind, row in WEIGHTS.items()}
    found = {kind: shares.normalised(weights) for kind, weights in of.items()}
    root = math.sqrt(1000) / (math.sqrt(1000) + math.sqrt(10))
    assert found == {
        "fixed": {"a": 0.75, "b": 0.25},
        "proportional": {"a": round(1000 / 1010, 9), "b": round(10 / 1010, 9)},
        "temperature": {"a": round(root, 9), "b": round(1 - root, 9)},
        "uniform": {"a": 0.5, "b": 0.5},
    }
    for exponent, kind in ((0, "uniform"), (1, "proportional")):
        weights = WEIGHTS["temperature"].of({}, sizes, exponent)
        assert shares.normalised(weights) == found[kind]


def stage(first_batch=0, most_rows=(), **own):
    return Stage(first_batch, shares.normalised(own), dict(most_rows))


STAGES = [stage(a=3, b=2, c=1, most_rows={"b": 150}), stage(70, c=1, a=1, most_rows={"b": 150})]


def test_a_source_with_a_cap_stops_at_it_and_the_others_share_what_it_leaves_in_proportion():
    schedule = Schedule(STAGES[:1], batch_size=1, seed=0)
    names = [schedule.source(g)[0] for g in range(20_000)]
    assert collections.Counter(names)["b"] == 150
    last = max(g for g, name in enumerate(names) if name == "b")
    assert abs(last - 450) < 20
    after = collections.Counter(names[last + 1 :])
    assert after["a"] / after["c"] == pytest.approx(3, rel=0.01)
    assert schedule.num_rows == math.inf
    ended = Schedule([stage(a=3, b=1, most_rows={"a": 5, "b": 50})], batch_size=1, seed=0)
    assert ended.num_rows == 55 and ended.taken(55) == {"a": 5, "b": 50}
    with pytest.raises(IndexError, match="end with row 55"):
        ended.source(56)


def test_a_row_does_not_depend_on_what_was_asked_before_and_each_source_goes_on_where_it_was():
    schedule = Schedule(STAGES, batch_size=8, seed=5)
    rows = [schedule.source(g) for g in range(1200)]
    other = Schedule(STAGES, batch_size=8, seed=5)
    assert all(other.source(int(g)) == rows[g] for g in np.random.default_rng(0).permutation(1200))
    for name in "abc":
        assert [own for source, own in rows if source == name] == list(
            range(sum(source == name for source, _ in rows))
        )
    for g in (0, 1, 149, 450, 560, 561, 1199):
        assert schedule.taken(g) == {n: sum(s == n for s, _ in rows[:g]) for n in "abc"}
    assert {source for source, _ in rows[560:]} == {"a", "c"}
    other = Schedule(STAGES, batch_size=8, seed=6)
    assert any(other.source(g) != rows[g] for g in range(99))
    sent = pickle.loads(pickle.dumps(schedule))  # as to a worker process
    assert [sent.source(g) for g in range(1200)] == rows


@hypothesis.given(splits=st.lists(st.integers(0, 90), max_size=4), seed=seeds)
@hypothesis.example(splits=[70], seed=0)
@SETTINGS
def test_a_run_resumed_anywhere_has_the_rows_of_the_unbroken_one(splits, seed):
    unbroken = Schedule(STAGES, batch_size=4, seed=seed)
    kept = STAGES
    for batch in sorted(splits):
        kept, changes = shares.resumed([Stage.of_json(s.to_json()) for s in kept], STAGES, batch)
        assert not changes and kept == STAGES
    schedule = Schedule(kept, batch_size=4, seed=seed)
    assert [schedule.source(g) for g in range(380)] == [unbroken.source(g) for g in range(380)]


def test_a_mixture_changed_at_resume_says_what_changed_and_leaves_the_past_as_it_was():
    now = [stage(a=1, d=1), stage(95, d=1)]
    kept, changes = shares.resumed(STAGES, now, 80)
    assert [s.first_batch for s in kept] == [0, 70, 80, 95]
    assert changes == [
        "source c: 0.5 -> 0 from batch 80 on",
        "source d: 0 -> 0.5 from batch 80 on",
        "source b: at most 150 -> any number of rows from batch 80 on",
    ]
    old, new = (Schedule(stages, batch_size=4, seed=0) for stages in (STAGES, kept))
    assert [old.source(g) for g in range(320)] == [new.source(g) for g in range(320)]
    later = [new.source(g) for g in range(320, 400)]
    assert next(own for name, own in later if name == "a") == old.taken(320)["a"]
    assert {name for name, _ in later[:60]} == {"a", "d"} and {n for n, _ in later[60:]} == {"d"}
    # The same history as one that an unbroken run would have had from the start.
    again, changes = shares.resumed(kept, now, 90)
    assert again == kept and not changes
    back, _ = shares.resumed(kept, now, 60)  # from an earlier checkpoint
    assert [s.first_batch for s in back] == [0, 60, 95]


def test_batches_that_are_left_out_give_no_rows():
    schedule = Schedule(STAGES, batch_size=4, seed=0)
    left_out = ((3, 5), (5, 8), (60, 70))
    there = [n for n in range(20) if not 3 <= n <= 8]
    names = [schedule.source(4 * n + i)[0] for n in there for i in range(4)]
    found = schedule.taken_by(20, 4, left_out)
    assert {n: rows for n, rows in found.items() if rows} == collections.Counter(names)


def records(name, number, length):
    return [{"text": f"{name}{i} " * length, "language": f"{name}{i % 2}"} for i in range(number)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    sizes = {"a": (40, 6), "b": (15, 11), "c": (9, 2)}
    return {
        name: open_corpus(write(folder / f"{name}.jsonl", records(name, *size)), folder)
        for name, size in sizes.items()
    }


def plan_of(sources, stages, *, batch_size=4, seed=0, T=4):  # grain's shuffle of few rows is slow
    plans = {
        name: RowPlan(part.pairs, sequence_length=T, seed=seed_of(name, seed))
        for name, part in sources.items()
    }
    mixed = MixedRecords(sources)
    return mixed, MixturePlan(
        Schedule(stages, batch_size=batch_size, seed=seed), plans, mixed.first_record
    )


def made(text, plan, number, **how):
    return list(itertools.islice(batches.batches(text, plan, batch_size=4, **how), number))


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        for name, array in vars(a).items():
            np.testing.assert_array_equal(array, getattr(b, name), err_msg=name)


def test_with_caps_every_document_is_seen_exactly_so_often(corpora):
    epochs = {"a": 1, "b": 3, "c": 2}
    _, plan = plan_of(corpora, [stage(a=1, b=1, c=1)])
    most = {name: epochs[name] * plan.plans[name].rows_per_epoch for name in corpora}
    text, plan = plan_of(corpora, [stage(a=1, b=1, c=1, most_rows=most)])
    assert plan.schedule.num_rows == sum(most.values())
    seen = collections.Counter()
    for g in range(int(plan.schedule.num_rows)):
        for piece in plan.row(g):
            tokens = text.tokens(piece.record)
            seen[tokens.tobytes()] += piece.stop - piece.start
    documents = {
        corpus.tokens(i).tobytes(): epochs[name] * int(corpus.pairs[i])
        for name, corpus in corpora.items()
        for i in range(len(corpus.pairs))
    }
    assert seen == documents


def test_batches_do_not_depend_on_hosts_threads_or_where_one_starts(corpora):
    stages = [stage(a=3, b=1, most_rows={"b": 20}), stage(12, c=1, a=1)]
    whole = made(*plan_of(corpora, stages), 60)
    for rows in ([0, 1], [2, 3], [1], [3]):
        own = made(*plan_of(corpora, stages), 60, rows=rows, num_threads=1)
        assert_same(own, [_some(batch, rows) for batch in whole])
    for start in (1, 11, 12, 50):
        assert_same(made(*plan_of(corpora, stages), 5, start_step=start), whole[start : start + 5])


def _some(batch, rows):
    return jax.tree.map(lambda array: array[rows], batch)


def test_a_mixture_of_one_is_the_plan_of_its_source(corpora):
    text, plan = plan_of({"": corpora["a"]}, [Stage(0, {"": 1.0}, {})])
    alone = RowPlan(corpora["a"].pairs, sequence_length=4, seed=0)
    assert_same(made(text, plan, 30), made(corpora["a"], alone, 30))


def test_a_source_has_the_same_rows_whatever_the_other_sources_are(corpora):
    def rows_of_a(sources, stages):
        text, plan = plan_of(sources, stages)
        rows = [plan.row(g) for g in range(100) if plan.schedule.source(g)[0] == "a"]
        return [[text.tokens(p.record)[p.start : p.stop].tolist() for p in row] for row in rows]

    first = rows_of_a(corpora, [stage(c=1, a=2)])
    second = rows_of_a({"b": corpora["b"], "a": corpora["a"]}, [stage(a=1, b=1)])
    assert len(first) > len(second) > 40
    assert first[: len(second)] == second


def test_labels_of_sources_and_their_counts_are_those_of_the_sources(corpora):
    text = MixedText(corpora)
    assert text.labels == ("a/a0", "a/a1", "b/b0", "b/b1", "c/c0", "c/c1")
    whole = np.asarray(text.label_ids)
    assert [text.label_ids[i] for i in range(len(whole))] == whole.tolist()
    for name, corpus in corpora.items():
        first = text.first_record[name]
        for i in (0, len(corpus.pairs) - 1):
            np.testing.assert_array_equal(text.tokens(first + i), corpus.tokens(i))
            assert text.labels[whole[first + i]] == f"{name}/{corpus.labels[corpus.label_ids[i]]}"
        for label, number in corpus.bytes_per_token.items():
            assert text.bytes_per_token[f"{name}/{label}"] == pytest.approx(number)
    assert text.num_tokens == sum(corpus.num_tokens for corpus in corpora.values())
    assert MixedText({"": corpora["a"]}).labels == corpora["a"].labels


def test_each_label_of_a_corpus_can_be_a_source(corpora):
    corpus = corpora["a"]
    parts = dict(by_label({"": corpus}))
    assert list(parts) == ["a0", "a1"]
    for label, part in parts.items():
        own = [i for i in range(len(corpus.pairs)) if corpus.labels[corpus.label_ids[i]] == label]
        assert [part.tokens(i).tolist() for i in range(len(part.pairs))] == [
            corpus.tokens(i).tolist() for i in own
        ]
        assert part.pairs.tolist() == corpus.pairs[own].tolist()
    text, plan = plan_of(parts, [stage(a0=1, a1=3)])
    of_rows = [{text.label_ids[piece.record] for piece in plan.row(g)} for g in range(400)]
    assert of_rows.count({1}) == pytest.approx(300, abs=10)
    assert of_rows.count({0}) == 400 - of_rows.count({1})
    assert list(dict(by_label(corpora)))[:3] == ["a/a0", "a/a1", "b/b0"]


@pytest.mark.parametrize(
    ("table", "total", "some"),
    [
        ("LLM_JP_3", 100, {"code_stack": 5.5, "en_dolma_cc_head": 29.36, "ko_wiki": 0.02}),
        ("DROP_UPCYCLING_1_5B", 100, {"ja_cc": 49.46, "en_dolma_wiki": 0.92}),
        ("OLMOE", 4068.29, {"dclm": 3860, "wikipedia": 3.69}),
    ],
)
def test_a_published_mixture_is_the_published_table(table, total, some):
    rows = getattr(published_mixtures, table)
    assert sum(weight for _, weight in rows) == pytest.approx(total, abs=0.005)
    assert some.items() <= dict(rows).items() and len(dict(rows)) == len(rows)
    if table == "LLM_JP_3":
        of_cc = [weight for name, weight in rows if name.startswith("ja_cc")]
        assert sum(of_cc) == pytest.approx(36.8)
