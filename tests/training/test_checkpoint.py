"""Checkpoints: damage is found, the newest sound one is taken, meshes may change."""

import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.training import checkpoint


def state_of(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "step": jnp.int32(seed),
        "w": jax.random.normal(keys[0], (16, 64)),
        "half": jax.random.normal(keys[1], (8, 8)).astype(jnp.bfloat16),
    }


SHAPES = jax.eval_shape(state_of, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        checkpoint.save(directory, step, state_of(step), data={}, config={"seed": 0})
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def assert_is(restored, step):
    assert restored.step == step
    assert restored.data == {"step": step}
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(step))


def test_the_newest_is_restored_bitwise_with_its_data_and_config(directory):
    restored = checkpoint.restore_latest(directory, SHAPES)
    assert_is(restored, 2)
    assert restored.config == {"seed": 0}
    assert checkpoint.restore_latest(directory / "nothing", SHAPES) is None


def damaged(folder):
    for path in folder.rglob("manifest.ocdbt"):
        path.unlink()


def test_a_checkpoint_without_the_data_that_a_run_needs_is_refused_with_its_name(directory):
    assert_is(checkpoint.restore_latest(directory, SHAPES, needed=["step"]), 2)
    with pytest.raises(checkpoint.NoneVerifies, match="2 does not verify: its data lacks text, a;"):
        checkpoint.restore_latest(directory, SHAPES, needed=["text", "step", "a"])


@pytest.mark.parametrize(
    "damage", [damaged, lambda folder: [f.unlink() for f in folder.rglob("*") if f.is_file()]]
)
def test_where_none_verifies_nothing_is_begun_anew(directory, damage):
    for step in ("1", "2"):
        damage(directory / step)
    with pytest.raises(checkpoint.NoneVerifies, match="none of the 2 checkpoints in .* verifies"):
        checkpoint.restore_latest(directory, SHAPES)
    assert checkpoint.steps(directory) == [1, 2]


def test_only_the_folders_of_saves_that_were_killed_are_removed(directory, tmp_path):
    for name in (
        "7.orbax-checkpoint-tmp",
        "8.orbax-checkpoint-tmp-123",
        "mine.orbax-checkpoint-tmp",
    ):
        (directory / name).mkdir()
    checkpoint.check_unfinished(directory)
    (directory / "9.orbax-checkpoint-tmp").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="9.orbax-checkpoint-tmp is in the way .*; remove it"):
        checkpoint.check_unfinished(directory)
    checkpoint.remove_unfinished(directory)
    left = {path.name for path in directory.iterdir()}
    assert left == {"1", "2", "mine.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp"}


def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_taken(directory):
    """The bit is in a data file, which Orbax reads without a check."""
    files = sorted(p for p in (directory / "2").rglob("d/*") if p.stat().st_size > 1000)
    assert files
    rng = random.Random(0)
    for path in files:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content) // 4, 3 * len(content) // 4)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    assert_is(checkpoint.restore_latest(directory, SHAPES), 1)


@pytest.mark.parametrize("damage", ["an empty folder", "a missing file", "a truncated file"])
def test_a_broken_newest_checkpoint_is_passed_over(directory, damage):
    newest = directory / "2"
    if damage == "an empty folder":
        (directory / "3").mkdir()
        assert_is(checkpoint.restore_latest(directory, SHAPES), 2)
        return
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "a missing file":
        largest.unlink()
    else:
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert_is(checkpoint.restore_latest(directory, SHAPES), 1)


def test_a_link_out_of_the_checkpoint_is_not_followed(directory, tmp_path):
    largest = max((p for p in (directory / "2").rglob("d/*")), key=lambda p: p.stat().st_size)
    shutil.move(largest, tmp_path / "elsewhere")
    largest.symlink_to(tmp_path / "elsewhere")
    assert_is(checkpoint.restore_latest(directory, SHAPES), 1)


def test_another_model_is_refused_by_the_names_of_its_leaves(directory):
    other = {**SHAPES, "w": jax.ShapeDtypeStruct((16, 32), jnp.float32), "more": SHAPES["step"]}
    with pytest.raises(ValueError, match=r"more is missing; w is float32\[16, 64\], not"):
        checkpoint.restore_latest(directory, other)
    fewer = {name: leaf for name, leaf in SHAPES.items() if name != "half"}
    with pytest.raises(ValueError, match="also holds half"):
        checkpoint.restore_latest(directory, fewer)


def test_a_state_is_restored_onto_another_mesh(directory):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"step": P(), "w": P("b", "a"), "half": P(None, "a")}
    abstract = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, specs[name])
        )
        for name, leaf in SHAPES.items()
    }
    restored = checkpoint.restore_latest(directory, abstract)
    assert_is(restored, 2)
    assert restored.state["w"].sharding.spec == P("b", "a")


def test_a_digest_is_the_same_for_any_sharding_and_differs_for_any_change():
    x = jax.random.normal(jax.random.key(0), (8, 16))
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, P("a")))
    digest = checkpoint.digests({"x": x})
    assert checkpoint.digests({"x": sharded}) == digest
    swapped = x.at[jnp.array([0, 1])].set(x[jnp.array([1, 0])])
    tiny = x.at[3, 4].set(np.nextafter(np.float32(x[3, 4]), np.float32(9)))
    for other in (swapped, tiny, x.T, x.reshape(16, 8)):
        assert checkpoint.digests({"x": other}) != digest


@pytest.mark.parametrize("function", ["_load", "described"])
def test_a_signal_while_a_checkpoint_is_read_is_not_taken_for_damage(
    directory, monkeypatch, function
):
    def interrupted(*_):
        try:
            raise SystemExit(75)  # by the signal's handler, inside the library
        except SystemExit as end:
            raise ValueError("a task was cancelled") from end

    monkeypatch.setattr(checkpoint, function, interrupted)
    with pytest.raises(SystemExit) as ended:
        checkpoint.restore_latest(directory, SHAPES)
    assert ended.value.code == 75


MISSING = """
import pathlib, sys
import jax, jax.numpy as jnp
from moe_jax.training import checkpoint

directory = pathlib.Path(sys.argv[1])
state = {f"leaf{i}": jnp.zeros((4, 4)) for i in range(60)}
checkpoint.save(directory, 1, state, data={}, config={})
for path in directory.rglob("manifest.ocdbt"):
    path.unlink()
for _ in range(10):
    try:
        checkpoint.restore_latest(directory, jax.eval_shape(lambda: state))
    except checkpoint.NoneVerifies as error:
        last = str(error)
print(last, file=sys.stderr)
"""


def test_files_of_many_leaves_that_are_missing_are_one_line_and_no_traceback(tmp_path):
    """TensorStore answers reads after Orbax has given up, from threads of its own; the process ends
    so that all that they print is there."""
    ended = subprocess.run(
        [sys.executable, "-c", MISSING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "Traceback" not in ended.stderr and "never awaited" not in ended.stderr
    assert "none of the 1 checkpoints" in ended.stderr.splitlines()[-1]
