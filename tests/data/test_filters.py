"""Filters: hand-worked texts, a brute-force twin, and duplicates with their first one kept."""

import re

import numpy as np
import pytest

from moe_jax.commands import prepare_data
from moe_jax.data import duplicates, filters, prepare
from moe_jax.data.document import Document
from moe_jax.data.tokenizers import ByteTokenizer
from tests.data.test_preparation import make
from tests.data.test_prepare import write


def fault(spec, text, label="en", ids=()):
    chosen, document = filters.Chosen([spec]), Document(text, label)
    return chosen.fault_of_text(document) or chosen.fault_of_tokens(document, np.array(ids))


@pytest.mark.parametrize(
    ("spec", "kept", "dropped"),
    [
        ("language:en,de", None, None),
        ("characters:3,5", ["abc", "abcde"], ["ab", "abcdef"]),
        ("characters:3,", ["abc", "a" * 999], ["ab"]),
        ("characters:,3", ["", "abc"], ["abcd"]),
        ("words:2,3", ["a b", "a\nb  c"], ["a", "a b c d"]),
        ("words", ["a " * 50], ["a " * 49]),
        ("mean_word_length", ["abc abc", "a" * 10], ["ab abc", "a" * 11]),
        ("symbols", ["# " + "a " * 9, "… " + "a " * 9], ["# " + "a " * 8, "a... " + "a " * 8]),
        ("letters", ["a b c d 1", "ж 字 a b 2"], ["a b c 1 2", "1"]),
        ("bullets", ["- a\n" * 9 + "b", "a"], ["- a\n" * 10, "• a\n" * 10]),
        ("ellipses", ["a…\n" * 3 + "b\n" * 7], ["a...\n" * 4 + "b\n" * 6]),
        ("stop_words", ["The end of it"], ["the the the", "ende gut"]),
    ],
)
def test_a_filter_keeps_and_drops_what_its_rule_says(spec, kept, dropped):
    if spec.startswith("language"):
        assert [fault(spec, "", label) for label in ("en", "de", "fr")] == [None, None, "language"]
        return
    assert [fault(spec, text) for text in kept] == [None] * len(kept)
    assert [fault(spec, text) for text in dropped] == [spec.partition(":")[0]] * len(dropped)


def test_the_group_gopher_is_all_rules_of_massive_web():
    good = "This is the text that we have to read with care, and it is long enough to be kept. " * 4
    assert fault("gopher", good) is None
    assert fault("gopher", "Diese Worte sind auf Deutsch. " * 20) == "stop_words"
    assert fault("gopher", "the and " * 10) == "words"


def brute_force(ids):
    """The most consecutive repetitions of any n-gram of 1 to 13, by trying all."""
    most = 1 if len(ids) else 0
    for size in range(1, 14):
        for start in range(len(ids)):
            gram, times = ids[start : start + size], 0
            if len(gram) < size:
                continue
            while ids[start + times * size : start + (times + 1) * size] == gram:
                times += 1
            most = max(most, times)
    return most


def test_repetitions_are_those_that_a_search_by_brute_force_finds():
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, rng.integers(1, 4) + 1, rng.integers(0, 40)) for _ in range(150)]
    periodic = [
        np.concatenate([rng.integers(0, 9, 5), np.tile(rng.integers(0, 9, size), 4), [1]])
        for size in range(1, 16)
    ]
    for ids in drawn + periodic:
        assert filters.most_repetitions(ids) == brute_force(ids.tolist())


@pytest.mark.parametrize("size", [1, 7, 13, 14])
def test_32_repetitions_of_up_to_13_tokens_are_dropped_as_olmoe_does(size):
    gram = np.arange(size)
    tail = [99]  # not the beginning of the n-gram
    assert fault("repeated_ngrams", "", ids=[*np.tile(gram, 31), *tail]) is None
    expected = "repeated_ngrams" if size <= 13 else None
    assert fault("repeated_ngrams", "", ids=[*np.tile(gram, 32), *tail]) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gofer", "did you mean"),
        ("language", "needs an argument"),
        ("words:5", "LEAST,MOST"),
        ("words:9,3", "its least number, 9, is above its most, 3"),
        ("words:a,b", "--filter=words:a,b"),
        ("near_duplicates:2", "between 0 and 1"),
    ],
)
def test_a_mistaken_filter_is_refused(spec, message):
    if spec.startswith("near"):
        pytest.importorskip("datasketch")
    with pytest.raises(ValueError, match=message):
        filters.Chosen([spec])


def texts_of(output):
    how = {"validation_fraction": 0, "cache": output.parent}
    opened = prepare.open_corpus(f"prepared:{output}", "train", ByteTokenizer(), **how)
    return [ByteTokenizer().decode(opened.tokens(i)) for i in range(len(opened.pairs))]


def test_the_first_of_equal_texts_is_kept_and_the_others_counted(tmp_path):
    texts = ["a b", "c", "a b", "d", "c", "a b "]
    # The text in French is dropped first: it does not make the same text in English a duplicate.
    records = [{"text": "d", "lang": "fr"}, *({"text": text} for text in texts * 9)]
    source, specs = write(tmp_path / "a.jsonl", records), ["exact_duplicates", "language:all"]
    made = make(source, tmp_path / "out", specs=specs, shard_bytes=40, fraction=0)
    assert made["train"]["dropped"] == {"language": 1, "exact_duplicates": 54 - 4}
    assert texts_of(tmp_path / "out") == ["a b", "c", "d", "a b "]


def test_a_training_text_that_equals_a_held_out_one_is_dropped(tmp_path):
    records = [{"text": f"text {i % 30}", "doc": i} for i in range(90)]
    made = make(write(tmp_path / "a.jsonl", records), tmp_path / "out", specs=["exact_duplicates"])
    kept = [sum(made[split]["documents_per_label"]) for split in ("validation", "train")]
    assert 0 < kept[0] < 30 and sum(kept) == 30


def test_near_duplicates_are_dropped_and_other_texts_kept(tmp_path):
    pytest.importorskip("datasketch")
    rng = np.random.default_rng(0)
    words = rng.integers(0, 5000, (40, 200)).astype(str)
    near = words.copy()
    near[:, 100] = "changed"  # 5 of 196 shingles differ: Jaccard 191/201 = 0.95
    far = words.copy()
    far[:, ::5] = "changed"  # every shingle differs
    texts = [" ".join(row) for row in (*words, *near, *far)]
    records = [{"text": text, "doc": i} for i, text in enumerate(texts)]
    source = write(tmp_path / "train.jsonl", records)
    made = make(source, tmp_path / "out", specs=["near_duplicates:0.8"], shard_bytes=9000)
    dropped = sum(facts["dropped"].get("near_duplicates", 0) for facts in made.values())
    assert dropped == 40


def test_only_a_filter_that_documents_can_pass_in_any_order_may_run_on_several_machines():
    pytest.importorskip("datasketch")
    chosen = filters.Chosen(["gopher", "exact_duplicates", "near_duplicates:0.7"])
    assert chosen.in_order == ["near_duplicates"] and not filters.Chosen(["gopher"]).in_order


def test_near_duplicates_are_found_in_scripts_without_spaces():
    assert filters.WORD.findall("ab, c字母ก d") == ["ab,", "c", "字", "母", "ก", "d"]


def test_a_document_that_is_asked_about_again_gets_the_same_answer(tmp_path):
    seen = duplicates.Seen(tmp_path / "seen")
    keys = [[b"a"], [b"b", b"c"], [b"c"], [b"a", b"d"], [b"d"]]
    answers = [seen.is_new(i, "near", k) for i, k in enumerate(keys)]
    assert answers == [True, True, False, False, True]
    seen.commit()
    again = duplicates.Seen(tmp_path / "seen")
    assert [again.is_new(i, "near", k) for i, k in enumerate(keys)] == answers
    assert again.is_new(9, "exact", [b"a"])  # each filter has keys of its own


def test_the_help_names_every_filter():
    for name in (*filters.FILTERS, *filters.GROUPS):
        assert re.search(rf"^  {name}\b", prepare_data.table(), re.MULTILINE)
