"""The metrics of generated text: hand values, twins, reference packages, and texts of no use."""

import collections
import dataclasses
import gzip
import importlib.util
import itertools
import math
import types

import hypothesis
import numpy as np
import pytest
import sacrebleu
from hypothesis import strategies

from moe_jax.data import tokenizers
from moe_jax.evaluation import (
    diversity,
    evaluators,
    generated,
    judge,
    language_consistency,
    text_metrics,
)
from moe_jax.evaluation.samples import Sample, words

CAT, SAME, EMPTY = "the cat sat on the mat", "word word word word", ""
ENGLISH = "She walked slowly down the street and thought about her old friends."
GERMAN = "Die Kinder spielen heute im Garten und freuen sich über das schöne Wetter."
JAPANESE = "これは日本語で書かれた文章です。今日はとても良い天気ですね。"


def score(pairs):
    """A text of n words has a log-probability of -n * (1 + words of the context)."""
    rows = [(len(words(context)), len(words(text))) for context, text in pairs]
    return [(-float(n * (1 + c)), n) for c, n in rows]


def ask(questions):
    """Answers by the number of words of the text."""
    texts = [question.partition("Text: ")[2].partition("\n")[0] for question in questions]
    return [{6: "Score: 8", 4: "11", 0: "I cannot judge this."}[len(words(t))] for t in texts]


TOOLS = text_metrics.Tools(
    checkpoint=score,
    second=score,
    judge=judge.Judge(ask),
    training_text=lambda: iter(["A cat.", "the cat sat on the rug"]),
)


def measured(name, *texts, tools=TOOLS, **fields):
    samples = [Sample(text, **fields) for text in texts]
    return generated.measure(samples, [name], tools)[""][name].value


nan = math.nan
BY_HAND = {
    # The metric: its values for each of CAT, SAME and EMPTY alone, and for the three together.
    "self_perplexity": (math.e, math.e, nan, math.e),
    "second_perplexity": (math.e, math.e, nan, math.e),
    # 6 nats in 22 bytes, 4 in 19.
    "self_bits_per_byte": (6 / 22 / math.log(2), 4 / 19 / math.log(2), nan, 10 / 41 / math.log(2)),
    "second_bits_per_byte": (
        6 / 22 / math.log(2),
        4 / 19 / math.log(2),
        nan,
        10 / 41 / math.log(2),
    ),
    "source_log_likelihood": (nan, nan, nan, nan),  # without source or prompt
    "seq_rep_2": (0, 2 / 3, nan, 1 / 3),
    "seq_rep_3": (0, 1 / 2, nan, 1 / 4),
    "seq_rep_4": (0, 0, nan, 0),
    "rep_128": (1 / 6, 3 / 4, nan, 4 / 10),
    "distinct_1": (5 / 6, 1 / 4, nan, 6 / 10),
    "distinct_2": (1, 1 / 3, nan, 6 / 8),
    "distinct_3": (1, 1 / 2, nan, 5 / 6),
    "self_bleu": (nan, nan, nan, 0),  # one text has no others; nothing is shared
    "language_undetermined": (1, 1, 1, 1),
    "language_consistency": (nan, nan, nan, nan),
    "words": (6, 4, 0, 10 / 3),
    "words_median": (6, 4, 0, 4),
    "empty": (0, 0, 1, 1 / 3),
    "novelty_5": (1 / 2, nan, nan, 1 / 2),  # "the cat sat on the" is known, "cat … mat" is not
    "judge_score": (8, nan, nan, 8),
    "judge_disagreement": (0, nan, nan, 0),
    "judge_refusal": (0, 0, 1, 1 / 3),
    "judge_unparsable": (0, 0, 0, 0),
    "judge_out_of_range": (0, 1, 0, 1 / 3),
    "judge_cut": (0, 0, 0, 0),
}


def test_every_metric_but_that_of_gzip_has_values_worked_by_hand():
    assert BY_HAND.keys() | {"compression"} == text_metrics.METRICS.keys()


@pytest.mark.parametrize("name", BY_HAND)
def test_values_of_three_texts_are_those_worked_by_hand(name):
    cases = [(CAT,), (SAME,), (EMPTY,), (CAT, SAME, EMPTY)]
    found = [measured(name, *texts) for texts in cases]
    np.testing.assert_allclose(found, BY_HAND[name], rtol=1e-12)


def test_the_prompt_is_the_context_and_the_source_comes_first():
    """With c words of context each token has -(1 + c) nats."""
    both = {"prompt": "one two", "source": "one two three"}
    assert measured("self_perplexity", CAT, **both) == pytest.approx(math.exp(3))
    assert measured("source_log_likelihood", CAT, **both) == -4
    assert measured("source_log_likelihood", CAT, prompt="one two") == -3
    mean_of_texts = measured("source_log_likelihood", CAT, SAME, EMPTY, source="one")
    assert mean_of_texts == -2


def test_perplexity_of_all_texts_weighs_tokens_and_not_texts():
    samples = [Sample(CAT, prompt="one"), Sample(SAME)]  # 12 nats of 6 tokens, 4 of 4
    values = generated.measure(samples, ["self_perplexity"], TOOLS)[""]["self_perplexity"]
    assert values.value == pytest.approx(math.exp(16 / 10))


def test_bleu_of_four_shared_words_of_five_is_the_fourth_root_of_a_fifth():
    """Precisions 4/5, 3/4, 2/3 and 1/2."""
    assert measured("self_bleu", "a b c d e", "a b c d f") == pytest.approx(0.2**0.25)
    assert measured("self_bleu", CAT, CAT) == pytest.approx(1)


def test_self_bleu_is_the_mean_of_sacrebleu_over_texts_against_the_others():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcde"), 9)) for _ in range(7)]
    scores = [
        sacrebleu.sentence_bleu(text, texts[:i] + texts[i + 1 :], tokenize="none").score / 100
        for i, text in enumerate(texts)
    ]
    assert measured("self_bleu", *texts, EMPTY) == pytest.approx(np.mean(scores))


def test_self_bleu_of_many_texts_is_that_of_a_sample_of_them(monkeypatch):
    monkeypatch.setattr(diversity, "MAX_TEXTS", 4)
    texts = [f"{a} {b} c d" for a, b in itertools.product("abcd", "efgh")]
    found = diversity.self_bleu([text.split() for text in texts], seed=1)
    assert found.shape == (4, 2) and 0 < found[:, 0].mean() < 1


def test_compression_is_that_of_gzip_without_its_header():
    """A gzip file is 12 bytes longer than a zlib stream: 10 + 8 against 2 + 4 around the data."""
    whole = f"{CAT}\n{SAME}".encode()
    zipped = len(gzip.compress(whole, 9)) - 12
    assert measured("compression", CAT, EMPTY, SAME) == pytest.approx(len(whole) / zipped)
    assert math.isnan(measured("compression", EMPTY))
    assert measured("compression", SAME * 1000) > 100 > measured("compression", ENGLISH)


letters = strategies.lists(strategies.sampled_from("abc"), max_size=12)


@hypothesis.given(strategies.lists(letters, min_size=1, max_size=4))
def test_counts_of_ngrams_equal_those_of_slow_loops(texts):
    n = 2
    grams = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in texts]
    together = list(itertools.chain(*grams))
    assert diversity.distinct(texts, n).tolist() == [[len(set(together)), len(together)]]
    repeated = [sum(g[:i].count(g[i]) > 0 for i in range(len(g))) for g in grams]
    expected = [r / len(g) if g else 0 for r, g in zip(repeated, grams, strict=True)]
    np.testing.assert_allclose(diversity.seq_rep(texts, n)[:, 0], expected)
    before = [sum(t[i] in t[max(0, i - 3) : i] for i in range(len(t))) for t in texts]
    assert diversity.rep(texts, 3)[:, 0].tolist() == before
    known = "abcab"
    novel = [sum("".join(g) not in known for g in of_text) for of_text in grams]
    training = [list("abc"), list("bcab")]
    assert diversity.novelty(texts, training, n)[:, 0].tolist() == novel


def test_a_text_in_another_language_than_its_prompt_is_inconsistent():
    found = [
        measured("language_consistency", text, prompt=ENGLISH)
        for text in (ENGLISH, GERMAN, JAPANESE)
    ]
    assert found == [1, 0, 0]
    assert measured("language_consistency", GERMAN, prompt=ENGLISH, language="de-AT") == 1
    assert measured("language_consistency", JAPANESE, language="ja") == 1
    assert math.isnan(measured("language_consistency", JAPANESE, language="Klingon"))


@pytest.mark.parametrize("text", ["", "Ja.", "12345 67890 24680 13579 11111", "#!$% " * 9, "天気"])
def test_a_text_that_is_short_or_without_letters_is_undetermined_and_not_wrong(text):
    assert language_consistency.identify(text) is None
    assert math.isnan(measured("language_consistency", text, prompt=ENGLISH))
    assert measured("language_undetermined", text, prompt=ENGLISH) == 1


def test_norwegian_is_one_language_by_three_codes():
    assert {language_consistency.SAME.get(code, code) for code in ("no", "nb", "nn")} == {"no"}


def test_one_word_repeated_a_thousand_times_has_the_values_of_a_degenerate_text():
    text = "word " * 1000
    assert measured("seq_rep_4", text) == pytest.approx(1 - 1 / 997)
    assert measured("rep_128", text) == 0.999
    assert measured("distinct_2", text) == pytest.approx(1 / 999)
    assert measured("self_bleu", text, text) == pytest.approx(1)


def test_words_of_scripts_without_spaces_are_their_characters():
    assert words("It's 日本語, and ภาษา!") == [
        *"It ' s".split(),
        *"日本語",
        ",",
        "and",
        *"ภาษา",
        "!",
    ]
    assert words("हिन्दी में") == ["हिन्दी", "में"]  # vowel signs belong to a word
    assert words(" \n\t") == []


def test_intervals_are_a_bootstrap_over_texts_and_repeat():
    texts = [Sample("a " * n) for n in range(1, 30)]
    first, again = (generated.measure(texts, ["words", "rep_128"], TOOLS) for _ in range(2))
    assert first == again
    value = first[""]["words"]
    rng = np.random.default_rng(0)
    means = [rng.integers(0, 29, 29).mean() + 1 for _ in range(1000)]
    np.testing.assert_allclose(value.interval, np.percentile(means, [2.5, 97.5]))
    assert generated.measure(texts[:1], ["words"], TOOLS)[""]["words"].interval is None
    other = generated.measure(texts, ["words"], dataclasses.replace(TOOLS, seed=1))
    assert other[""]["words"].interval != value.interval


def test_a_label_has_the_values_of_its_texts_alone():
    samples = [Sample(CAT, label="a"), Sample(SAME, label="b"), Sample(ENGLISH, label="a")]
    names = [name for name in text_metrics.METRICS if not name.startswith("judge")]
    found = generated.measure(samples, names, TOOLS)
    assert list(found) == ["", "a", "b"]
    for label in ("a", "b"):
        alone = [sample for sample in samples if sample.label == label]
        np.testing.assert_equal(found[label], generated.measure(alone, names, TOOLS)[""])


def test_a_missing_package_or_option_is_a_reason_and_the_other_metrics_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = generated.choose([], ())
    assert reasons["self_bleu"].endswith("not installed; run pip install 'moe_jax[evaluation]'")
    assert reasons["self_perplexity"] == "needs --checkpoint"
    assert reasons["distinct_1"] == ""
    report = generated.report([Sample(CAT), Sample(SAME)], reasons, text_metrics.Tools())
    assert set(report["metrics"]) | set(report["not_measured"]) == set(text_metrics.METRICS)
    table = generated.text(report)
    assert "needs sacrebleu, which is not installed" in table
    with pytest.raises(ValueError, match="--metrics=self_bleu needs sacrebleu"):
        generated.choose(["self_bleu"], ())


def test_a_misspelt_metric_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'self_bleu'"):
        generated.choose(["selfbleu"], ())


def test_continuations_in_the_loop_have_the_defined_metrics_in_result_json(monkeypatch):
    tokenizer = tokenizers.load("bytes")
    texts = [tokenizer.encode(text) for text in (CAT, SAME)]
    monkeypatch.setattr(evaluators.generate, "generate", lambda *_, **__: texts)
    evaluation = types.SimpleNamespace(prompts=("a", "b"), continuation_tokens=22)
    run = types.SimpleNamespace(evaluation=evaluation, seed=0)
    context = types.SimpleNamespace(run=run, tokenizer=tokenizer, model=None)
    result = evaluators.continuations(context)({}).result
    assert result["samples"][0] == {"prompt": "a", "continuation": CAT}
    # The language of texts as short as these is undetermined.
    assert result["sample_metrics"] == {"seq_rep_4": 0, "distinct_2": 6 / 8, "words": 5}


def test_each_row_of_the_table_says_what_a_reader_must_know():
    fields = ("about", "better", "range", "failure", "source")
    for name, metric in text_metrics.METRICS.items():
        assert all(getattr(metric, field) for field in fields), name
        assert not metric.needs or hasattr(TOOLS, metric.needs)
    sources = collections.Counter(metric.source for metric in text_metrics.METRICS.values())
    assert all(any(c.isdigit() for c in source) for source in sources)
