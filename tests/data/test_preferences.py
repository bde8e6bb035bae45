"""Pairs of answers: what fits into a row, what is cut and counted, and the order of the rows."""

import json
import pickle

import numpy as np
import pytest

from moe_jax.data import batches, document, preferences, tokenizers
from moe_jax.data.document import Document, Preference
from moe_jax.data.packing import Piece
from moe_jax.data.policy import STRICT

BYTES = tokenizers.load("bytes")


def test_a_pair_is_its_prompt_with_each_answer_and_weighs_on_the_answers_alone():
    (chosen, at), (rejected, there), cut = preferences.pair_rows([1, 5, 6], [7, 2], [8, 9, 2], 9)
    assert (chosen.tolist(), at, rejected.tolist(), there) == (
        [1, 5, 6, 7, 2],
        3,
        [1, 5, 6, 8, 9, 2],
        3,
    )
    assert not cut and chosen.dtype == np.uint32


@pytest.mark.parametrize(
    ("length", "prompt"), [(9, [1, 5, 6]), (8, [1, 6]), (7, [1, 6]), (6, [1]), (5, [1]), (4, None)]
)
def test_a_long_prompt_loses_the_same_tokens_in_both_and_answers_none(length, prompt):
    """The two have p + 1 and p + 2 targets."""
    made = preferences.pair_rows([1, 5, 6], [7, 2], [8, 9, 2], length)
    if prompt is None:
        assert made is None
        return
    (chosen, at), (rejected, _), cut = made
    assert chosen.tolist() == [*prompt, 7, 2] and rejected.tolist() == [*prompt, 8, 9, 2]
    assert at == len(prompt) and cut == (len(prompt) < 3)
    assert len(chosen) + len(rejected) - 2 <= length


def test_an_answer_that_nobody_wrote_takes_no_room():
    (chosen, _), (rejected, _), cut = preferences.pair_rows([1, 5], None, [8, 9, 2], 4)
    assert len(chosen) == 1 and rejected.tolist() == [1, 5, 8, 9, 2] and not cut


def corpus(length=40):
    documents = [
        Document("", "all", preference=Preference("p" * (3 * i), "yes", "no" * i))
        for i in range(1, 9)
    ]
    return preferences.of_documents(documents, BYTES, length)


def test_what_is_cut_or_left_out_is_counted():
    found = corpus()
    assert found.counts == {"pairs": 8, "prompts cut": 4, "left out": 0}
    assert corpus(20).counts["left out"] == 1
    for record, pairs in enumerate(found.pairs):
        tokens, weights = found.tokens(record), found.weights(record)
        answer = "yes" if record % 2 == 0 else "no" * (record // 2 + 1)
        assert BYTES.decode(tokens[1:][weights > 0]) == answer and tokens[-1] == BYTES.eos_id
        assert len(weights) == pairs == len(tokens) - 1
    with pytest.raises(ValueError, match="is no pair; give"):
        preferences.of_documents([Document("text", "all")], BYTES, 40)


def test_an_epoch_has_each_pair_once_and_a_row_has_a_pair():
    found = corpus()
    plan = preferences.PairPlan(found.pairs, sequence_length=40, seed=3)
    orders = []
    for epoch in range(2):
        rows = [plan.row(8 * epoch + g) for g in range(8)]
        orders.append([first.record // 2 for first, _ in rows])
        for first, second in rows:
            assert second.record == first.record + 1 and first.record % 2 == 0
            assert (first.start, first.stop) == (0, found.pairs[first.record])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8)) and orders[0] != orders[1]
    plan = preferences.PairPlan(found.pairs, sequence_length=40, seed=3, shuffled=False)
    assert plan.row(2)[0] == Piece(4, 0, int(found.pairs[4]))


def test_a_worker_process_gets_the_same_rows():
    plan = preferences.PairPlan(corpus().pairs, sequence_length=40, seed=3)
    rows = [plan.row(g) for g in range(16)]
    sent = pickle.loads(pickle.dumps(plan))
    assert [sent.row(g) for g in range(16)] == rows


def test_batches_have_the_answers_weights_and_the_reference():
    found = corpus()
    found = preferences.dataclasses.replace(found, reference_X=-np.arange(len(found.tokens_X)) / 7)
    plan = preferences.PairPlan(found.pairs, sequence_length=40, seed=0, shuffled=False)
    [*made] = batches.one_pass(found, plan, batch_size=5, columns=found.columns)
    assert len(made) == 2 and not made[1].weights_BT[3:].any()
    row = 2
    first, second = (int(found.pairs[2 * row + i]) for i in (0, 1))
    batch = made[0]
    np.testing.assert_array_equal(batch.segment_ids_BT[row, :first], 1)
    np.testing.assert_array_equal(batch.segment_ids_BT[row, first : first + second], 2)
    own = np.concatenate([found.reference(2 * row), found.reference(2 * row + 1)])
    np.testing.assert_array_equal(batch.reference_BT[row, : first + second], own.astype(np.float32))
    answer = batch.targets_BT[row][batch.weights_BT[row] > 0]
    assert BYTES.decode(answer) == "yes" + "no" * 3


def test_records_of_preferences_are_read_and_held_out_by_their_prompt():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    key, found = document.from_record(pair, STRICT)
    assert key == "p" and found.text == "pa" and found.preference == Preference("p", "a", "b")
    for label, expected in ((True, ("a", None)), (False, (None, "a"))):
        _, found = document.from_record({"prompt": "p", "completion": "a", "label": label}, STRICT)
        assert (found.preference.chosen, found.preference.rejected) == expected
        assert found.text == "pa"
    for wrong in ({**pair, "chosen": ["a"]}, {"prompt": "p", "completion": "a", "label": 1}):
        with pytest.raises(ValueError, match='"chosen" of a pref|neither true nor false'):
            document.from_record(wrong, STRICT)
    with pytest.raises(ValueError, match="surrogate"):
        document.from_record({**pair, "rejected": "\ud800"}, STRICT)


def test_pairs_are_cached_and_damage_is_noticed(tmp_path):
    lines = [{"prompt": f"{i}", "chosen": "a", "rejected": "bb"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def opened():
        return preferences.open_pairs(
            *(str(tmp_path / "pairs.jsonl"), "train", BYTES),
            sequence_length=16,
            validation_fraction=0.2,
            cache=tmp_path / "cache",
        )

    first = opened()
    assert opened().digest == first.digest and first.counts["pairs"] < 20
    [path] = (tmp_path / "cache" / "pairs").glob("*/tokens.npy")
    np.save(path, first.tokens_X + 1)
    with pytest.raises(ValueError, match="is damaged .*; delete the folder, and the next"):
        opened()
