"""A stranger's checkpoint: what it describes is compared with what its files can hold."""

import copy
import os

import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from moe_jax.training import bounds, checkpoint

META = {
    "data": {"step": 3},
    "config": {},
    "leaves": {"w": [[2, 3], "float32"]},
    "digests": {"w": 7},
}
LINEAGE = {"tokens": 5, "training_flops": 1e24, "parents": ["runs/a@3"]}
FORGED = (
    {"step": -1},
    {"step": 2**70},
    {"skipped_steps": "999"},
    {"resumed_from": None},
    {"spent": {"compute": -1}},
    {"spent": [3]},
    {"left_out": [[1, 2], [3]]},
    {"left_out": [[1, "2"]]},
    {"left_out": {}},
    {"losses": {"x": 1.0}},
    {"losses": {"4": "y"}},
    {"losses": {"4": float("nan")}},
    {"losses": [4]},
    {"lineage": 3},
    {"lineage": {"tokens": 5}},
    {"lineage": LINEAGE | {"tokens": "5"}},
    {"lineage": LINEAGE | {"training_flops": float("inf")}},
    {"lineage": LINEAGE | {"training_flops": 10**400}},
    {"lineage": LINEAGE | {"parents": [3]}},
    {"lineage": LINEAGE | {"runs": [3]}},
    {"lineage": LINEAGE | {"runs": {"a": {"tokens": 5}}}},
    {"lineage": LINEAGE | {"runs": {"a": {"tokens": -1, "training_flops": 1.0}}}},
    {"text": ["a"]},
    {"text": {"train": 3}},
    {"versions": None},
    {"skipped_records": 3},
    {"skipped_records": {"train": 3}},
    {"skipped_records": {"train": {"not UTF-8": "3"}}},
)


def saved(folder, meta):
    with checkpoint._context():
        ocp.save_checkpointables(
            folder, {"state": {"w": jnp.ones((2, 3))}, "meta": checkpoint._sealed(meta)}
        )
    return folder


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data": 3}, "lacks data"),
        ({"data": {}}, "step None"),
        ({"data": {"step": "3"}}, "step '3'"),
        *(({"data": {"step": 3, **data}}, f"has the {next(iter(data))} ") for data in FORGED),
        ({"data": {"step": 3, "versions": {"jax": "\ud800"}}}, "half a surrogate pair"),
        ({"leaves": {"\udfff": 3}, "digests": {"\udfff": 3}}, "half a surrogate pair"),
        ({"digests": {}}, "digests of other leaves"),
        ({"digests": {"w": "7"}}, "w has no digest"),
        ({"leaves": {"w": 3}}, "w is no shape and dtype"),
        ({"leaves": {"w": [[-2, 3], "float32"]}}, "w is no shape and dtype"),
        ({"leaves": {"w": [[2.0, 3], "float32"]}}, "w is no shape and dtype"),
        ({"leaves": {"w": [[2, 3], "float33"]}}, "no dtype 'float33'"),
    ],
)
def test_a_description_of_another_form_is_refused(changes, complaint):
    bounds.check_form(copy.deepcopy(META))
    with pytest.raises(ValueError, match=complaint):
        bounds.check_form(META | changes)
    with pytest.raises(ValueError, match="lacks data"):
        bounds.check_form([META])


@pytest.mark.parametrize("shape", [[10**5, 10**5], [2**62, 2**62], [2**31, 4]])
def test_leaves_larger_than_the_files_are_refused_before_memory_is_taken(shape, tmp_path):
    huge = META | {"leaves": {"w": [shape, "float32"]}}
    folder = saved(tmp_path / "3", huge)
    with pytest.raises(ValueError, match="bytes of memory, but its files have"):
        checkpoint.described(folder)
    with pytest.raises(checkpoint.NoneVerifies, match="bytes of memory, but its files have"):
        checkpoint.load(tmp_path, {"w": jnp.ones((2, 3))})


def test_a_pipe_in_a_checkpoint_is_not_opened(tmp_path):
    folder = saved(tmp_path / "3", META)
    assert checkpoint.described(folder)["leaves"] == META["leaves"]
    os.mkfifo(folder / "state" / "pipe")
    with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
        checkpoint.described(folder)
