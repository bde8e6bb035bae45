"""Any text as a TFDS dataset without TensorFlow, read by this package and by TFDS alone."""

import json
import subprocess
import sys

import pytest

from moe_jax.data import policy, sources
from moe_jax.data.corpora import text_corpus
from tests.data.written import MANY, arrow, line, parquet

RECORDS = [
    {"content": text, "meta": {"language": ("en", "de")[n % 2]}} for n, text in enumerate(MANY)
]
READING = policy.Reading(text_field="content", label_field="meta.language")


def prepared(folder, data_dir, name="mine", **options):
    builder = text_corpus.text_corpus(str(folder), name, data_dir=data_dir, **options)
    builder.download_and_prepare()
    return builder


def read(spec, split, data_dir, fraction=0.0, reading=policy.STRICT):
    options = {"validation_fraction": fraction, "data_dir": data_dir, "reading": reading}
    return sorted((d.text, d.label) for d in sources.documents(spec, split, **options))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"".join(map(line, RECORDS)))
    return folder


def test_a_text_corpus_has_the_documents_of_its_source_in_the_same_splits(folder, tmp_path, caplog):
    prepared(folder, tmp_path / "tfds", validation_fraction=0.2, reading=READING)
    assert "custom data configuration" not in caplog.text  # a warning of TFDS
    for split in ("train", "validation"):
        found = read("tfds:text_corpus/mine", split, tmp_path / "tfds")
        assert len(found) > 30 and found == read(str(folder), split, tmp_path, 0.2, READING)


def test_tfds_alone_reads_it_without_tensorflow_or_this_package(folder, tmp_path):
    prepared(folder, tmp_path / "tfds", validation_fraction=0.0, reading=READING)
    code = (
        "import json, sys\n"
        "import tensorflow_datasets as tfds\n"
        f"records = tfds.data_source('text_corpus/mine', data_dir={str(tmp_path / 'tfds')!r}, "
        "split='train')\n"
        "texts = sorted(record['text'].decode() for record in records)\n"
        "assert 'moe_jax' not in sys.modules and 'tensorflow' not in sys.modules\n"
        "print(json.dumps(texts))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == sorted(MANY)


def test_every_format_may_be_its_source(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(parquet(MANY[:100]))
    (folder / "b.arrow").write_bytes(arrow(MANY[100:200]))
    (folder / "c.txt").write_text("text\0 of a file 🙂")
    prepared(folder, tmp_path / "tfds", validation_fraction=0.0)
    found = [text for text, _ in read("tfds:text_corpus/mine", "train", tmp_path / "tfds")]
    assert found == sorted([*MANY[:200], "text\0 of a file 🙂"])


def test_a_name_stands_for_one_text(folder, tmp_path):
    prepared(folder, tmp_path / "tfds", reading=READING)
    prepared(folder, tmp_path / "tfds", reading=READING)
    (folder / "b.txt").write_text("more text")
    with pytest.raises(ValueError, match=r"text_corpus/mine/1.0.0 has been prepared from another"):
        prepared(folder, tmp_path / "tfds", reading=READING)


def test_a_mistake_is_one_line_and_leaves_nothing_prepared(folder, tmp_path):
    with pytest.raises(ValueError, match='a.jsonl:1 has no "text" .its fields: content, meta.'):
        prepared(folder, tmp_path / "tfds")
    with pytest.raises(ValueError, match="has no validation documents"):
        prepared(folder, tmp_path / "tfds", validation_fraction=1e-9, reading=READING)
    with pytest.raises(ValueError, match="matches no file"):
        prepared(tmp_path / "missing", tmp_path / "tfds")
    with pytest.raises(ValueError, match="is not a dataset prepared under"):
        read("tfds:text_corpus/mine", "train", tmp_path / "tfds")


def test_another_dataset_is_found_where_tfds_keeps_its_own(folder, tmp_path, monkeypatch):
    prepared(folder, tmp_path / "elsewhere", validation_fraction=0.0, reading=READING)
    spec = "tfds:text_corpus/mine:1.0.0"
    with pytest.raises(ValueError, match=r"not a dataset prepared under .* or \$TFDS_DATA_DIR"):
        read(spec, "train", tmp_path / "cache")
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "elsewhere"))
    assert len(read(spec, "train", tmp_path / "cache")) == len(MANY)


def test_a_dataset_without_random_access_is_refused_with_the_fix(folder, tmp_path):
    builder = prepared(folder, tmp_path / "tfds", reading=READING)
    path = tmp_path / "tfds" / "text_corpus" / "mine" / "1.0.0" / "dataset_info.json"
    info = path.read_text()
    assert builder.info.file_format.value == "array_record" and info.count('"array_record"') == 1
    path.write_text(info.replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match="is prepared as tfrecord, .* file_format='array_record'"):
        sources.describe("tfds:text_corpus/mine", tmp_path / "tfds")


def test_the_fingerprint_of_a_dataset_is_of_its_content(folder, tmp_path):
    """Shards of the same length, sizes and name have another fingerprint if a byte differs."""
    prepared(folder, tmp_path / "tfds", validation_fraction=0.0, reading=READING)
    before = sources.fingerprint("tfds:text_corpus/mine", tmp_path / "tfds")
    assert sources.fingerprint("tfds:text_corpus/mine", tmp_path / "tfds") == before
    [shard] = (tmp_path / "tfds").rglob("*.array_record*")
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert sources.fingerprint("tfds:text_corpus/mine", tmp_path / "tfds") != before


def test_damaged_records_of_a_dataset_are_skipped_and_counted(folder, tmp_path):
    prepared(folder, tmp_path / "tfds", validation_fraction=0.0, reading=READING)
    [shard] = (tmp_path / "tfds").rglob("*.array_record*")
    content = bytearray(shard.read_bytes())
    content[20_000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"'tfds:text_corpus/mine': record \d+ of train") as error:
        read("tfds:text_corpus/mine", "train", tmp_path / "tfds")
    assert "\n" not in str(error.value)
    skipped = policy.Skipped(5)
    options = {"validation_fraction": 0.0, "data_dir": tmp_path / "tfds", "skipped": skipped}
    found = list(sources.documents("tfds:text_corpus/mine", "train", **options))
    assert skipped.by_reason == {"a damaged record": 1} and len(found) == len(MANY) - 1
