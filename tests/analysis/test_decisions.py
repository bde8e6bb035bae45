"""The folder of routing decisions: what is written is read, and damage is noticed."""

import dataclasses
import json

import numpy as np
import pytest

from moe_jax.analysis import decisions

FACTS = decisions.Facts(
    model="model",
    text="text",
    labels=("en", "ja"),
    layers=(1, 3),
    num_hidden_layers=4,
    num_experts=5,
    num_experts_per_tok=2,
    vocab_size=50,
    num_tokens=7,
    model_digest="m",
    text_digest="t",
)


def write(folder, facts=FACTS, experts=5, ids=50):
    """A finished folder of random decisions, and the arrays that are in it."""
    rng, N = np.random.default_rng(0), facts.num_tokens
    folder.mkdir()
    arrays = {decisions.TOKENS: np.empty(N, facts.token_dtype)}
    for name in decisions.IDS:
        arrays[decisions.TOKENS][name] = rng.integers(0, 2 if name == "label" else ids, N)
    for layer in facts.layers:
        own = arrays[decisions.layer_file(layer)] = np.empty(N, facts.layer_dtype)
        own["expert"] = rng.integers(0, experts, own["expert"].shape)
        own["weight"], own["probability"] = rng.random((N, 2)), rng.random((N, 3))
    digests = {}
    for name, array in arrays.items():
        with decisions.writing(folder / name, array.dtype, N) as append:
            append(array[:3])
            append(array[3:])
        digests[name] = decisions.digest_of(folder / name)
    decisions.write_state(folder, decisions.State(facts, 4, digests, {1: 0, 3: 2}))
    return arrays


@pytest.mark.parametrize("size", [1, 4, 100])
def test_what_is_written_is_read_in_chunks(size, tmp_path):
    arrays = write(tmp_path / "routing")
    found = decisions.load(tmp_path / "routing")
    assert found.facts == FACTS and found.num_dropped == {1: 0, 3: 2}
    for layer in FACTS.layers:
        ids, chosen = zip(*found.chunks(layer, size), strict=True)
        for name in decisions.IDS:
            parts = [getattr(part, f"{name}_N") for part in ids]
            np.testing.assert_array_equal(np.concatenate(parts), arrays[decisions.TOKENS][name])
        for name, attribute in (
            ("expert", "expert_NA"),
            ("weight", "weight_NA"),
            ("probability", "probability_NP"),
        ):
            parts = [getattr(part, attribute) for part in chosen]
            own = arrays[decisions.layer_file(layer)][name]
            np.testing.assert_array_equal(np.concatenate(parts), own)


def test_a_stretch_ends_with_its_document_its_row_and_its_label(tmp_path):
    """Two documents "1 2 3" and "1 2" of label 0, the first in two rows, and one of label 1."""
    arrays = write(tmp_path / "routing")[decisions.TOKENS]
    arrays["input"] = [1, 2, 7, 8, 1, 2, 1]
    arrays["target"] = [2, 3, 8, 9, 2, 1, 2]  # the last but one goes on, but in another label
    arrays["label"] = [0, 0, 0, 0, 0, 0, 1]
    found = dataclasses.replace(decisions.load(tmp_path / "routing"), _tokens=arrays)
    assert found.stretches().tolist() == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("num_experts", "dtype"), [(255, np.uint8), (256, np.uint16), (60_000, np.uint16)]
)
def test_an_expert_and_the_mark_of_an_unused_slot_fit(num_experts, dtype):
    facts = dataclasses.replace(FACTS, num_experts=num_experts)
    assert facts.layer_dtype["expert"].base == dtype and num_experts <= np.iinfo(dtype).max


@pytest.mark.parametrize("name", ["meta.json", "tokens.npy", "layer_03.npy"])
def test_a_changed_byte_is_noticed(name, tmp_path):
    write(tmp_path / "routing")
    path = tmp_path / "routing" / name
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        decisions.load(tmp_path / "routing")


def test_a_folder_without_one_of_its_files_is_refused(tmp_path):
    write(tmp_path / "routing")
    (tmp_path / "routing" / "layer_01.npy").unlink()
    with pytest.raises((ValueError, OSError), match="layer_01.npy"):
        decisions.load(tmp_path / "routing")
    with pytest.raises(ValueError, match="has no meta.json"):
        decisions.load(tmp_path)


@pytest.mark.parametrize(
    ("facts", "how", "problem"),
    [
        (FACTS, {"experts": 8}, "names an expert that is not there"),
        (FACTS, {"ids": 80}, "id is not from"),
        (dataclasses.replace(FACTS, labels=("en",)), {}, "a label id is not from 0 to 0"),
    ],
)
def test_ids_that_do_not_fit_the_facts_are_refused(facts, how, problem, tmp_path):
    write(tmp_path / "routing", facts, **how)
    with pytest.raises(ValueError, match=problem):
        decisions.load(tmp_path / "routing")


@pytest.mark.parametrize(
    "changed",
    [
        {"labels": ["en", "en"]},
        {"labels": []},
        {"layers": [3, 1]},
        {"layers": [9]},
        {"num_experts": 10**6},
        {"num_tokens": -1},
        {"num_tokens": "many"},
        {"vocab_size": None},
        {"more": 1},
    ],
    ids=str,
)
def test_facts_of_a_stranger_are_checked(changed, tmp_path):
    write(tmp_path / "routing")
    path = tmp_path / "routing" / "meta.json"
    sealed = json.loads(path.read_text())
    sealed["facts"] |= changed
    sealed.pop("sha256")
    path.write_text(json.dumps({**sealed, "sha256": decisions.seal(sealed)}))
    with pytest.raises(ValueError, match=r"meta.json is damaged \(.*\); record it anew"):
        decisions.load(tmp_path / "routing")


def test_a_file_of_another_kind_of_array_is_refused_without_running_it(tmp_path):
    write(tmp_path / "routing")
    path = tmp_path / "routing" / "layer_01.npy"
    np.save(path, np.array([{"code": 1}], object))
    state = decisions.read_state(tmp_path / "routing")
    digests = {**state.digests, path.name: decisions.digest_of(path)}
    decisions.write_state(tmp_path / "routing", dataclasses.replace(state, digests=digests))
    with pytest.raises(ValueError, match="layer_01.npy"):
        decisions.load(tmp_path / "routing")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    write(tmp_path / "routing")
    path = tmp_path / "routing" / "tokens.npy"
    path.rename(tmp_path / "elsewhere.npy")
    path.symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(ValueError, match="link out of its folder"):
        decisions.load(tmp_path / "routing")


def test_more_labels_than_can_be_shown_are_refused():
    labels = tuple(map(str, range(1001)))
    with pytest.raises(ValueError, match="1,001 labels are more than 1,000"):
        dataclasses.replace(FACTS, labels=labels)
