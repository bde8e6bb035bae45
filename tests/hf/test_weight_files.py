"""The weight files of a folder: one or several with an index, links, and what is refused."""

import json
import os
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy as oracle

from moe_jax.hf import safetensors
from tests.hf.test_safetensors import assert_same, read, write


def sharded(folder):
    tensors = {name: np.full(4, i, np.float32) for i, name in enumerate("abcde")}
    write(folder, tensors, max_shard_bytes=40)
    return tensors


def test_shards_are_bounded_and_their_index_is_complete(tmp_path):
    sizes = {"a": 10, "b": 30, "c": 41, "d": 1, "e": 39, "f": 1}
    tensors = {name: np.full(n, n, np.uint8) for name, n in sizes.items()}
    write(tmp_path, tensors, max_shard_bytes=40)
    files = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    shards = [oracle.load_file(tmp_path / file) for file in files]
    assert [list(shard) for shard in shards] == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    assert index["weight_map"] == placed
    assert_same(read(tmp_path), tensors)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_single_file_beside_an_index_of_other_files_is_refused_with_both_names(tmp_path):
    """One is left from an earlier save, and only the reader's order would decide which is read."""
    sharded(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not looked at")
    match = (
        r"has model\.safetensors and model\.safetensors\.index\.json of other files: .* remove it"
    )
    with pytest.raises(safetensors.FormatError, match=match):
        safetensors.open_folder(tmp_path)


def test_an_index_of_the_single_file_is_read(tmp_path):
    tensors = {"a": np.ones(3, np.float32)}
    write(tmp_path, tensors)
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(read(tmp_path), tensors)


@pytest.mark.parametrize(
    "beside",
    [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "model-00001-of-00002.safetensors",
        "optimizer.pt",
    ],
)
def test_files_that_transformers_does_not_read_decide_nothing(beside, tmp_path):
    tensors = {"a": np.ones(3, np.float32)}
    write(tmp_path, tensors)
    (tmp_path / beside).write_bytes(b"not looked at")
    assert_same(read(tmp_path), tensors)


@pytest.mark.parametrize("other", ["consolidated.safetensors", "model-00001-of-00002.safetensors"])
def test_a_file_of_another_name_is_named_when_there_is_no_other(other, tmp_path):
    (tmp_path / other).write_bytes(b"not looked at")
    with pytest.raises(safetensors.FormatError, match=f"has '{other}' but neither"):
        safetensors.open_folder(tmp_path)


def test_a_folder_with_an_adapter_is_another_model(tmp_path):
    write(tmp_path, {"a": np.ones(3, np.float32)})
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(safetensors.FormatError, match="another one with an adapter; merge them"):
        safetensors.open_folder(tmp_path)


FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"


@pytest.mark.parametrize(
    "place, match",
    [
        ({"a": "../outside.safetensors"}, "'../outside.safetensors' is not a plain file name"),
        ({"a": "/etc/passwd"}, "'/etc/passwd' is not a plain file name"),
        ({"a": ".."}, "'..' is not a plain file name"),
        ({"a": ""}, "'' is not a plain file name"),
        ({"a": "a\0b"}, r"'a\\x00b' is not a plain file name"),
        ({"a": "a\nb"}, r"'a\\nb' is not a plain file name"),
        ({"a": "\ud800"}, r"'\\ud800' is not a plain file name"),
        ({"a": "x" * 300}, "File name too long"),
        ({"a": "."}, "is not a regular file"),
        ({"a": "absent.safetensors"}, "absent.safetensors cannot be opened: No such file"),
        ({"a": 1}, "no weight_map"),
        ({"a": None}, "no weight_map"),
        ({"z": FIRST}, f"{FIRST} lacks 'z', against"),
        ({"a": LAST}, f"{FIRST} holds 'a', against"),
    ],
    ids=str,
)
def test_an_index_that_places_a_tensor_where_it_is_not_is_refused(place, match, tmp_path):
    sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(place)
    path.write_text(json.dumps(index))
    with pytest.raises(safetensors.FormatError, match=match):
        safetensors.open_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    sharded(tmp_path)
    oracle.save_file({n: np.ones(1, np.float32) for n in "abe"}, tmp_path / LAST)
    with pytest.raises(safetensors.FormatError, match=f"{LAST} holds 'a', against"):
        safetensors.open_folder(tmp_path)


@pytest.mark.parametrize(
    "text, match",
    [
        (b'{"weight_map":{"a":"x","a":"y"}}', "'a' comes twice"),
        (b'{"weight_map":{"a":"x"},"weight_map":{"a":"y"}}', "'weight_map' comes twice"),
        (b'{"metadata":{"total_size":1e400},"weight_map":{"a":"x"}}', "'1e400' is not a finite"),
        (b'{"metadata":{"total_size":Infinity}}', "'Infinity' is not a finite number"),
        (b'{"weight_map":[]}', "no weight_map"),
        (b'{"weight_map":{}}', "no weight_map"),
        (b"{}", "no weight_map"),
        (b"[]", "does not start with {"),
        (b"", "does not start with {"),
        (b'{"a":' * 100000, "recursion"),
    ],
    ids=lambda x: x[:40] if isinstance(x, bytes) else "",
)
def test_a_hostile_index_is_refused_in_one_line_that_names_it(text, match, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text)
    with pytest.raises(safetensors.FormatError, match=match) as error:
        safetensors.open_folder(tmp_path)
    assert str(error.value).startswith(f"{path} is refused: ")
    assert "\n" not in str(error.value)


def test_an_index_longer_than_its_limit_is_refused(tmp_path):
    sharded(tmp_path)
    with mock.patch.object(safetensors, "_MAX_JSON_BYTES", 200):
        with pytest.raises(safetensors.FormatError, match="longer than 200 bytes"):
            safetensors.open_folder(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors.bin"):
        os.mkfifo(tmp_path / name)  # opening one would hang
    with pytest.raises(safetensors.FormatError, match="a pickle runs code .* convert it elsewhere"):
        safetensors.open_folder(tmp_path)


def test_a_folder_without_weights_says_what_is_missing(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(safetensors.FormatError, match="neither .* is the download complete?"):
            safetensors.open_folder(folder)


# ------------------------------------------------------------------------------------------- links


@pytest.fixture
def snapshot(tmp_path):
    """A Hugging Face cache with two models; the snapshot of the one named ours."""
    for model in ("models--x--ours", "models--x--theirs"):
        (tmp_path / model / "blobs").mkdir(parents=True)
        (tmp_path / model / "blobs" / "0a1b").write_text(model)
    folder = tmp_path / "models--x--ours" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    return folder


def test_a_snapshot_of_the_cache_may_link_to_the_blobs_of_its_model(snapshot):
    (snapshot / "config.json").symlink_to("../../blobs/0a1b")
    path = safetensors.resolve_inside(snapshot, "config.json")
    assert path.read_text() == "models--x--ours" and path.parent.name == "blobs"


def test_weights_are_read_through_links(snapshot):
    blob = snapshot.parents[1] / "blobs" / "weights"
    blob.write_bytes(oracle.save({"a": np.ones(3, np.float32)}))
    (snapshot / "model.safetensors").symlink_to("../../blobs/weights")
    assert_same(read(snapshot), {"a": np.ones(3, np.float32)})


def test_a_link_may_lead_to_elsewhere_in_the_folder_and_the_folder_may_be_a_link(tmp_path):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("here")
    (folder / "config.json").symlink_to("inner/file")
    (tmp_path / "link").symlink_to("model")
    for way in (folder, tmp_path / "link"):
        assert safetensors.resolve_inside(way, "config.json").read_text() == "here"


@pytest.mark.parametrize(
    "target",
    [
        "/etc/passwd",
        "../../../models--x--theirs/blobs/0a1b",
        "../../refs",
        "../../blobs/sideways",
        "../../blobs/deeper/file",
        "../other/file",
        "through/passwd",
    ],
)
def test_a_link_out_of_the_folder_is_refused(snapshot, target):
    model = snapshot.parents[1]
    (model / "refs").write_text("")
    (model / "blobs" / "sideways").symlink_to("../../models--x--theirs/blobs/0a1b")
    for folder in (model / "blobs" / "deeper", snapshot.parent / "other"):
        folder.mkdir()
        (folder / "file").write_text("")
    (snapshot / "through").symlink_to("/etc")
    (snapshot / "config.json").symlink_to(target)
    with pytest.raises(safetensors.FormatError, match="config.json is a link out of its folder"):
        safetensors.resolve_inside(snapshot, "config.json")


@pytest.mark.parametrize("layout", ["models--x--ours/snapshot/abc", "x/snapshots/abc"])
def test_blobs_elsewhere_than_in_a_cache_are_out_of_the_folder(layout, tmp_path):
    folder = tmp_path / layout
    folder.mkdir(parents=True)
    (folder.parents[1] / "blobs").mkdir()
    (folder.parents[1] / "blobs" / "0a1b").write_text("")
    (folder / "config.json").symlink_to("../../blobs/0a1b")
    with pytest.raises(safetensors.FormatError, match="a link out of its folder"):
        safetensors.resolve_inside(folder, "config.json")


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "dangling", "absent"])
def test_what_is_no_regular_file_is_refused(kind, tmp_path):
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(kind)
    elif kind == "dangling":
        path.symlink_to("nothing")
    with pytest.raises(safetensors.FormatError, match="not a regular file|loop|No such file"):
        safetensors.resolve_inside(tmp_path, kind)
