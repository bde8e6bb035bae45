"""TFDS datasets: the embedded text whole and split by pages; names that are not there."""

import collections
import sys

import pytest

from moe_jax.data import corpora, sources
from moe_jax.data.corpora import builders, text_corpus


def read(source, split, data_dir):
    found = sources.documents(source, split, validation_fraction=0.0, data_dir=data_dir)
    return list(found)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def embedded(tfds_dir):
    """The documents of both splits of the embedded text, prepared and read without TensorFlow."""
    splits = ("train", "validation")
    documents = {split: read("embedded", split, tfds_dir) for split in splits}
    assert "tensorflow" not in sys.modules
    return documents


def test_the_embedded_corpus_comes_whole_out_of_array_records(embedded, tfds_dir):
    assert list(tfds_dir.glob("lo_parallel19/*/*.array_record*"))
    found = collections.Counter((d.label, d.text) for split in embedded.values() for d in split)
    packaged = [(r["lang"], r["text"]) for r in builders.records("lo_parallel19")]
    assert len(packaged) == 7429
    assert found == collections.Counter(packaged)


def test_embedded_held_out_pages_are_the_same_in_all_languages_and_never_trained_on(embedded):
    page = {(r["lang"], r["text"]): r["doc"] for r in builders.records("lo_parallel19")}
    pages = {split: collections.defaultdict(set) for split in embedded}
    for split, documents in embedded.items():
        for document in documents:
            pages[split][document.label].add(page[document.label, document.text])
    held_out, trained = (list(pages[split].values()) for split in ("validation", "train"))
    assert len(held_out) == len(trained) == 19
    assert all(of_language == held_out[0] for of_language in held_out)
    assert held_out[0] and held_out[0].isdisjoint(set().union(*trained))


def test_the_probe_of_71_languages_has_a_text_in_each_and_only_a_test_split(tfds_dir):
    documents = read("tfds:udhr_languages", "test", tfds_dir)
    assert len(documents) == len({d.label for d in documents}) == 71
    assert read("tfds:udhr_languages", "validation", tfds_dir) == documents  # held out as well
    with pytest.raises(ValueError, match=r"has no split 'train', only \['test'\]"):
        read("tfds:udhr_languages", "train", tfds_dir)


@pytest.mark.parametrize("name", ["nonexistent", "no name", "a/b", "lo_parallel19:9.9.9"])
def test_a_dataset_that_is_not_there_is_refused_with_the_names_that_are(name, tmp_path):
    with pytest.raises(ValueError, match="lo_parallel19, udhr_languages") as error:
        read(f"tfds:{name}", "train", tmp_path)
    assert "\n" not in str(error.value)


def test_a_record_without_a_text_is_refused_with_its_number(tmp_path, monkeypatch):
    class Other(builders.UdhrLanguages):
        name = "other"

        def _info(self):
            return builders.information(self, "MIT", "sentence")

        def _generate_examples(self):
            yield 0, {"sentence": "text under another name"}

    monkeypatch.setitem(corpora.BUILDERS, "other", Other)
    with pytest.raises(
        ValueError, match="'tfds:other': record 0 of test has no \"text\" .its fields"
    ):
        read("tfds:other", "test", tmp_path)


def test_the_documents_of_each_split_are_said(tfds_dir):
    said = sources.describe("tfds:udhr_languages", tfds_dir)
    assert said == (
        "data.source='tfds:udhr_languages': documents of udhr_languages/1.0.0 (test: 71)"
    )


def test_tfds_without_a_name_is_refused():
    with pytest.raises(ValueError, match="use tfds:NAME"):
        sources.check("tfds:")


def test_damage_to_a_dataset_is_named_once_with_its_record(tmp_path):
    (path := tmp_path / "a.jsonl").write_text('{"text": "some text"}\n' * 9)
    made = text_corpus.text_corpus(str(path), "mine", data_dir=tmp_path, validation_fraction=0)
    made.download_and_prepare()
    (records,) = tmp_path.glob("text_corpus/mine/*/*array_record*")
    records.write_bytes(records.read_bytes()[:-9])
    with pytest.raises(ValueError) as refused:
        read("tfds:text_corpus/mine", "train", tmp_path)
    begin = "data.source='tfds:text_corpus/mine': record 0 of train cannot be read ("
    assert str(refused.value).startswith(begin) and str(refused.value).count("data.source") == 1
    assert str(refused.value).endswith("; replace the dataset's files or prepare it again")
