"""Log-likelihoods in padded batches against one sequence at a time, and where texts are split."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from moe_jax import hf, model
from moe_jax.data import tokenizers
from moe_jax.evaluation import generate, scoring
from moe_jax.parallel import mesh as meshes
from tests.hf.test_golden import GOLDEN

LIMIT = 48
apply = jax.jit(model.apply, static_argnames="config")


@functools.cache
def loaded(name):
    return hf.load(GOLDEN / name)


def scorer_of(name, batch_size=4, limit=LIMIT):
    return scoring.Scorer(loaded(name)[0], meshes.one_device(), batch_size, limit)


def pairs_of(name, number=7):
    draw = np.random.default_rng(1)
    return [
        scoring.Pair(
            draw.integers(0, loaded(name)[0].vocab_size, draw.integers(1, 22)).astype(np.int32),
            draw.integers(0, loaded(name)[0].vocab_size, draw.integers(1, 11)).astype(np.int32),
        )
        for _ in range(number)
    ]


def alone(name, pair):
    """(log-likelihood, is greedy) of one sequence without padding."""
    config, params = loaded(name)
    ids = np.concatenate([pair.context, pair.continuation])
    padded = np.zeros((1, 64), np.int32)  # one shape to compile; later tokens change nothing
    padded[0, : len(ids)] = ids
    logits_TV = np.asarray(apply(params, padded, config).logits_BTV, np.float64)[0, : len(ids) - 1]
    log_p_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    own = range(len(pair.context) - 1, len(ids) - 1)
    nats = sum(log_p_TV[t, ids[t + 1]] for t in own)
    return nats, all(log_p_TV[t].argmax() == ids[t + 1] for t in own)


@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_a_batch_equals_one_sequence_at_a_time(name):
    pairs = pairs_of(name)
    found = scorer_of(name).score(loaded(name)[1], pairs)
    for pair, score in zip(pairs, found, strict=True):
        log_likelihood, is_greedy = alone(name, pair)
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-5)
        assert (score.num_tokens, score.left_out) == (len(pair.continuation), 0)
        assert score.is_greedy == is_greedy


def most_probable(name, ids, number):
    """The greedy ids after these, by a forward pass over the whole text for each."""
    config, params = loaded(name)
    ids = list(ids)
    for _ in range(number):
        padded = np.array([ids + [0] * (64 - len(ids))], np.int32)
        ids.append(int(apply(params, padded, config).logits_BTV[0, len(ids) - 1].argmax()))
    return np.array(ids[-number:], np.int32)


def test_a_continuation_of_the_most_probable_tokens_is_greedy():
    ids = most_probable("llama", [3, 1, 4], 3)
    pairs = [scoring.Pair(np.array([3, 1, 4]), own) for own in (ids, ids ^ np.array([0, 0, 1]))]
    found = scorer_of("llama").score(loaded("llama")[1], pairs)
    assert [score.is_greedy for score in found] == [True, False]


def test_neither_the_order_nor_the_batch_nor_the_padding_matters(monkeypatch):
    params, pairs = loaded("olmoe")[1], pairs_of("olmoe")
    found = scorer_of("olmoe").score(params, pairs)
    monkeypatch.setattr(scoring, "SHORTEST_ROW", LIMIT)
    others = scorer_of("olmoe", batch_size=3).score(params, pairs[::-1])[::-1]
    for a, b in zip(found, others, strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-5)
        assert a.is_greedy == b.is_greedy


def test_with_one_batch_size_a_score_is_the_same_bit_for_bit_alone_and_in_any_order():
    params, pairs = loaded("llama")[1], pairs_of("llama")
    scorer = scorer_of("llama")
    found = scorer.score(params, pairs)
    assert scorer.score(params, pairs[::-1])[::-1] == found
    assert [scorer.score(params, [pair])[0] for pair in pairs] == found


def test_a_model_that_drops_tokens_scores_without_dropping():
    config, _ = loaded("olmoe")
    drops = dataclasses.replace(config, dispatch="capacity")
    assert generate.independent(drops) == generate.independent(config) != drops
    with pytest.raises(ValueError, match="merged experts .* nor score a continuation"):
        generate.independent(dataclasses.replace(config, dispatch="merge"))


def test_eight_devices_equal_one():
    config, params = loaded("llama")
    mesh = meshes.make({"data": 8})
    on_mesh = hf.load(GOLDEN / "llama", mesh=mesh)[1]
    expected = scorer_of("llama").score(params, pairs_of("llama"))
    found = scoring.Scorer(config, mesh, 8, LIMIT).score(on_mesh, pairs_of("llama"))
    for a, b in zip(found, expected, strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-5)


def test_row_lengths_are_few():
    lengths = {scoring.row_length(n, 2048) for n in range(1, 2049)}
    assert lengths == {32, 64, 128, 256, 512, 1024, 2048}
    assert {scoring.row_length(n, 1000) for n in range(1, 1001)} == {32, 64, 128, 256, 512, 1000}


def test_a_context_that_is_too_long_loses_its_first_tokens_and_they_are_counted():
    params, [pair] = loaded("llama")[1], pairs_of("llama", 1)
    n = len(pair.continuation)
    long = scoring.Pair(np.concatenate([pair.context] * 9), pair.continuation)
    whole = len(long.context) + n
    kept = scoring.Pair(long.context[whole - LIMIT - 1 :], long.continuation)
    cut, expected = scorer_of("llama").score(params, [long, kept])
    assert (cut.left_out, expected.left_out) == (whole - LIMIT - 1, 0)
    assert cut.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-6)


def test_windows_are_those_of_the_harness_by_hand():
    """The example in the documentation of lm_eval.api.model.LM."""
    ids = np.arange(10)
    shown = [(p.context.tolist(), p.continuation.tolist()) for p in scoring.windows(ids, -1, 4)]
    assert shown == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert scoring.windows(ids[:0], -1, 4) == []


def test_windows_score_each_token_once_with_all_the_context_that_fits():
    for length, limit in itertools.product(range(1, 40), range(1, 12)):
        ids = np.arange(length)
        found = scoring.windows(ids, -1, limit)
        assert np.concatenate([p.continuation for p in found]).tolist() == ids.tolist()
        sizes = [len(p.context) + len(p.continuation) - 1 for p in found]
        assert sizes == [min(length, limit)] + [limit] * (len(found) - 1)


def test_a_long_text_is_the_sum_of_its_windows():
    params, ids = loaded("llama")[1], np.arange(100, dtype=np.int32)
    scorer = scorer_of("llama")
    found, none = scorer.rolling(params, [ids, ids[:0]], begin_id=1)
    expected = sum(alone("llama", pair)[0] for pair in scoring.windows(ids, 1, LIMIT))
    assert found.log_likelihood == pytest.approx(expected, abs=1e-4)
    assert (found.num_tokens, none.num_tokens, none.log_likelihood) == (100, 0, 0)


BYTES = tokenizers.load("bytes")


@pytest.mark.parametrize(
    ("context", "continuation", "split"),
    [
        ("to be", " or", ("to be", " or")),
        ("to be ", "or", ("to be", " or")),
        ("to be \n", "or", ("to be", " \nor")),
        ("", "or", ("", "or")),
        ("  ", "or", ("", "  or")),
    ],
)
def test_spaces_at_the_end_of_the_context_belong_to_the_continuation(context, continuation, split):
    pair = scoring.pair(BYTES, context, continuation)
    begin, rest = split
    assert pair.context.tolist() == [BYTES.bos_id, *BYTES.encode(begin)]
    assert pair.continuation.tolist() == BYTES.encode(rest).tolist()


def test_a_begin_token_is_not_scored_in_a_text_of_its_own():
    assert scoring.ids_of_text(BYTES, "or").tolist() == BYTES.encode("or").tolist()
    assert len(scoring.ids_of_text(BYTES, "")) == 0


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda: scoring.pair(BYTES, "a", ""), "a continuation is empty"),
        (
            lambda: scorer_of("llama").score({}, [scoring.Pair(np.arange(2), np.arange(0))]),
            "has no token",
        ),
        (
            lambda: scorer_of("llama").score({}, [scoring.Pair(np.arange(2), np.arange(99))]),
            "a continuation of 99 tokens is beyond the model's limit of 48",
        ),
    ],
)
def test_what_has_no_score_is_refused(function, complaint):
    with pytest.raises(ValueError, match=complaint):
        function()
