"""The embedded text with a sealed test split: no page of it is in another split."""

from moe_jax.data.corpora import builders
from moe_jax.data.document import TEST, TRAIN, VALIDATION


def splits_of(cls):
    made = object.__new__(cls)
    return {split: {key for key, _ in cls._generate_examples(made, split)} for split in cls.SPLITS}


def test_the_sealed_pages_are_taken_out_of_the_training_text_and_validation_stays():
    plain, sealed = map(splits_of, (builders.LoParallel19, builders.LoParallel19Sealed))
    assert sealed[VALIDATION] == plain[VALIDATION]
    assert sealed[TRAIN] | sealed[TEST] == plain[TRAIN] and not sealed[TRAIN] & sealed[TEST]
    found = {key.split()[0] for key in sealed[TEST]}
    assert len(sealed[TEST]) == 19 * len(found)  # all translations of a page are in one split
    assert len(found) == 13
