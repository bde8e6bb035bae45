"""The table of sources: which row reads a spec, and a row that is added from outside."""

import itertools

import pytest

from moe_jax.data import batches, packing, prepare, sources, tokenizers
from moe_jax.data.document import Document


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("embedded", "embedded"),
        ("tfds:c4", "tfds"),
        ("tfds", "files"),
        ("embedded/a.txt", "files"),
        ("*.jsonl", "files"),
        ("files", "files"),
        ("", "files"),
    ],
)
def test_a_spec_is_read_by_one_row_and_by_files_when_no_other_takes_it(spec, name):
    assert sources._source(spec) is sources.SOURCES[name]


def test_a_source_from_outside_needs_one_entry_from_check_to_batches(tmp_path, monkeypatch):
    def documents(spec, split, *, validation_fraction, data_dir):
        text = spec.removeprefix("toy:")
        yield from (Document(f"{text} of {split} {i}", "toy") for i in range(10))

    def check(spec):
        if spec == "toy:":
            raise ValueError("data.source='toy:' is empty; use toy:TEXT")

    toy = sources.Source(
        matches=lambda spec: spec.startswith("toy:"),
        check=check,
        fingerprint=lambda spec, data_dir: spec,
        documents=documents,
    )
    monkeypatch.setitem(sources.SOURCES, "toy", toy)  # an entry that ends with the test
    sources.check("toy:anything")
    assert sources.describe("toy:anything", tmp_path) == "data.source='toy:anything'"
    with pytest.raises(ValueError, match="use toy:TEXT"):
        sources.check("toy:")
    bytes_only = tokenizers.load("bytes")
    train, validation = (
        prepare.open_corpus(
            "toy:anything", split, bytes_only, validation_fraction=0.0, cache=tmp_path
        )
        for split in ("train", "validation")
    )
    assert train.labels == validation.labels == ("toy",)
    plan = packing.RowPlan(train.pairs, sequence_length=64, seed=0)
    made = batches.batches(train, plan, batch_size=4)
    for batch in itertools.islice(made, 3):
        text = bytes_only.decode(batch.tokens_BT.ravel())
        assert "anything of train" in text and "validation" not in text
