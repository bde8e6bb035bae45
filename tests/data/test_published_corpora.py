"""The commands of docs/published_corpora.md read files of the names and fields of the corpora."""

import gzip
import json
import pathlib
import re
import shlex

import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.config.data import Data
from moe_jax.data import policy, sources
from tests.data.written import zstandard

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "published_corpora.md"
C4 = {"url": "https://a.example", "timestamp": "2019-04-25T12:57:54Z"}
DOLMA = {
    **{"id": "7", "added": "2023-04-01T00:00:00Z", "created": "2020-01-01T00:00:00Z"},
    "metadata": {"length": 9, "provenance": "wiki-0000.json.gz:1", "text": "no text of ours"},
}
FINEWEB = {
    **{"id": "<urn:uuid:0>", "dump": "CC-MAIN-2013-20", "url": "https://a.example"},
    **{"date": "2013-05-18T00:00:00Z", "file_path": "s3://commoncrawl/a.warc.gz"},
    **{"language": "en", "language_score": 0.9, "token_count": 5},
}
FINEWEB2 = {
    **{name: FINEWEB[name] for name in ("dump", "url", "date", "file_path", "language_score")},
    **{"language": "deu", "language_script": "Latn", "minhash_cluster_size": 1, "top_langs": "{}"},
    "id": "<urn:uuid:1>",
}
# The folder of a corpus in the commands: its files with the other fields of a record, the split and
# the label of the records that are read.
CORPORA = {
    "c4": {
        "en/c4-train.00000-of-01024.json.gz": (C4, "train", "all"),
        "en/c4-validation.00000-of-00008.json.gz": (C4, "validation", "all"),
    },
    "mc4": {
        "multilingual/c4-ja.tfrecord-00000-of-01024.json.gz": (C4, "train", "ja"),
        "multilingual/c4-bg-Latn.tfrecord-00000-of-00004.json.gz": (C4, "train", "bg-Latn"),
        "multilingual/c4-ja-validation.tfrecord-00000-of-00008.json.gz": (C4, "validation", "ja"),
    },
    "CulturaX": {
        "ja/ja_part_00000.parquet": ({**C4, "source": "mC4"}, "train", "ja"),
        "cs/cs_part_00001.parquet": ({**C4, "source": "OSCAR-2301"}, "train", "cs"),
    },
    "dolma": {
        "wiki-0000.json.gz": ({**DOLMA, "source": "wikipedia"}, "train", "wikipedia"),
        "books-0000.json.gz": ({**DOLMA, "id": "8", "source": "gutenberg"}, "train", "gutenberg"),
    },
    "olmoe": {
        "data/wiki/wiki-0000.json.gz": ({**DOLMA, "source": "wiki"}, "train", "wiki"),
        "data/dclm/dclm-0000.json.zst": ({**DOLMA, "id": "9"}, "train", "dclm"),
        "data/algebraic-stack/algebraic-stack-train-0000.json.gz": (
            *({**DOLMA, "id": "10"}, "train"),
            "algebraic-stack",
        ),
    },
    "llm-jp": {
        "ja/ja_warp_html/level0/html_nii_01-06.jsonl.gz": ({"meta": {"url": "a"}}, "train", "ja"),
        "en/en_wiki/train_0.jsonl.gz": ({"meta": {}}, "train", "en"),
    },
    "fineweb": {"sample/10BT/000_00000.parquet": (FINEWEB, "train", "en")},
    "fineweb-2": {
        "data/deu_Latn/train/000_00000.parquet": (FINEWEB2, "train", "deu"),
        "data/deu_Latn/test/000_00000.parquet": (FINEWEB2, None, "deu"),
    },
}


def commands() -> dict[str, dict]:
    """The values of `config.data` in the commands of the page that train on a published corpus."""
    found = {}
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for words in map(shlex.split, block.replace("\\\n", " ").splitlines()):
            options = [word.partition("=")[::2] for word in words if "config.data." in word]
            data = {name.rpartition(".")[2]: value for name, value in options}
            if data.get("source", "").startswith("corpora/"):
                found[data["source"].split("/")[1]] = data
    return found


def write(path: pathlib.Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record).encode() + b"\n"
    match path.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
        case ".gz":
            path.write_bytes(gzip.compress(line))
        case ".zst":
            path.write_bytes(zstandard(line))


def test_the_page_has_a_command_for_each_corpus():
    assert commands().keys() == CORPORA.keys()


@pytest.mark.parametrize("corpus", CORPORA)
def test_a_command_reads_the_corpus_as_it_is_published(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = {"train": set(), "validation": set()}
    for name, (fields, split, label) in CORPORA[corpus].items():
        text = f"the text of {name} ã 日本"
        write(pathlib.Path("corpora", corpus, name), {"text": text, **fields})
        if split:
            expected[split].add((text, label))
    settings = Data(**commands()[corpus])
    sources.check(settings.source)
    for split, documents in expected.items():
        found = sources.documents(
            *(settings.source, split),
            validation_fraction=0.0,
            data_dir=pathlib.Path("not-used"),
            reading=policy.of_config(settings),
        )
        assert {(document.text, document.label) for document in found} == documents
