"""Datasets of the hub: what `datasets` converts is read as files; without it, one line refuses."""

import importlib.util
import sys
import types

import pyarrow
import pytest

from moe_jax.data import hub, sources


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A stand-in for `datasets` with the one function that is used; returns its calls."""
    calls = []

    def load_dataset(name, config):
        calls.append((name, config))
        if name == "owner/missing":
            raise FileNotFoundError("no such\ndataset")
        splits = {"train": 40, "test": 5} if name == "owner/plain" else {"train": 9, "dev": 3}
        return {split: saved(split, number) for split, number in splits.items()}

    def saved(split, number):
        path = tmp_path / f"plain-{split}.arrow"
        table = pyarrow.table({"text": [f"{split} {n}" for n in range(number)]})
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
        return types.SimpleNamespace(cache_files=[{"filename": str(path)}])

    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = load_dataset
    stand_in.__spec__ = importlib.util.spec_from_loader("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    hub.find.cache_clear()
    yield calls
    hub.find.cache_clear()


def read(spec, split, tmp_path):
    found = sources.documents(spec, split, validation_fraction=0.3, data_dir=tmp_path)
    return [document.text for document in found]


def test_the_splits_of_a_dataset_are_trained_on_held_out_or_left_out(library, tmp_path):
    held_out, trained = (read("hf:owner/plain", s, tmp_path) for s in ("validation", "train"))
    assert sorted(held_out + trained) == sorted(f"train {n}" for n in range(40)) and held_out
    assert "test/plain-test.arrow" in sources.describe("hf:owner/plain", tmp_path)
    dev = read("hf:owner/named/a.config", "validation", tmp_path)
    assert dev == [f"dev {n}" for n in range(3)]
    assert len(read("hf:owner/named/a.config", "train", tmp_path)) == 9
    assert library == [("owner/plain", None), ("owner/named", "a.config")]
    prints = {sources.fingerprint(f"hf:owner/{name}", tmp_path) for name in ("plain", "named")}
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:", "names no dataset; use hf:OWNER/NAME"),
        ("hf:a/b/c/d", "names no dataset"),
        ("hf:a b", "names no dataset"),
        ("hf:owner/missing", r"cannot be loaded \(FileNotFoundError: no such dataset\); check"),
    ],
)
def test_a_dataset_that_cannot_be_loaded_is_refused_in_one_line(spec, message, library, tmp_path):
    with pytest.raises(ValueError, match=message):
        sources.check(spec)
        read(spec, "train", tmp_path)


def test_without_the_library_the_line_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'moe_jax\[hub\]'"):
        sources.check("hf:owner/plain")


def test_a_folder_that_the_library_itself_saved_is_read_as_it_is(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs pip install 'moe_jax[hub]'")
    texts = [f"text {n}" for n in range(50)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.load_from_disk(tmp_path / "saved").map(lambda row: {"text": row["text"] + "!"})
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    splits = [read(str(tmp_path / "saved"), split, tmp_path) for split in ("train", "validation")]
    assert sorted(splits[0] + splits[1]) == sorted(texts)
