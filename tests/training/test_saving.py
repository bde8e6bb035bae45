"""A run's saves go on in the background, and only checkpoints that are not needed are removed."""

import logging
import os
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import stopping
from moe_jax.model import PRESETS
from moe_jax.training import checkpoint, library_threads, saving


def state_of(step):
    return {"step": jnp.int32(step), "w": jax.random.normal(jax.random.key(step), (16, 64))}


SHAPES = jax.eval_shape(state_of, 0)


def saver_of(directory, sound=(), losses=None, **settings):
    run = configs.Run(model=PRESETS["quickstart"], checkpoint=configs.Checkpoint(**settings))
    return saving.Saver(directory, run, sound, losses or {})


def save(saver, *steps):
    for step in steps:
        saver.save(step, state_of(step), {})
    saver.wait()


def newest(directory):
    restored = checkpoint.restore_latest(directory, SHAPES)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(restored.step))
    return restored.step


def test_only_the_newest_that_verify_are_kept(tmp_path):
    save(saver_of(tmp_path), 1, 2)
    saver = saver_of(tmp_path, keep=2)  # it is not known whether 2 verifies, so 1 stays too
    save(saver, 3)
    assert checkpoint.steps(tmp_path) == [1, 2, 3]
    save(saver, 4)
    assert checkpoint.steps(tmp_path) == [3, 4]
    save(saver_of(tmp_path, keep=1, sound={3, 4}), 5)
    assert checkpoint.steps(tmp_path) == [5] == [newest(tmp_path)]


def test_milestones_and_the_best_are_kept_also_by_a_resumed_run(tmp_path):
    losses = {1: 2.0, 2: 3.0, 3: 1.0, 4: 2.5, 5: 1.5, 6: float("nan")}
    saver = saver_of(tmp_path, keep=1, keep_every=4, keep_best=2)
    for step in range(1, 7):
        save(saver, step)  # as in a run, the evaluation of a step comes after its checkpoint
        saver.evaluated(step, losses[step])
    save(saver, 7)
    assert checkpoint.steps(tmp_path) == [3, 4, 5, 7]
    data = checkpoint.newest_data(tmp_path)
    saver = saver_of(tmp_path, {7}, data["losses"], keep=1, keep_every=4, keep_best=1)
    save(saver, 8, 9, 10)
    assert checkpoint.steps(tmp_path) == [3, 4, 8, 10]


def test_what_was_saved_last_stays_beside_later_ones_that_do_not_verify(tmp_path):
    save(saver_of(tmp_path), 1, 2)
    (tmp_path / "2").rename(tmp_path / "20")  # so that the step inside is another
    saver = saver_of(tmp_path, keep=1)
    save(saver, 15)
    assert checkpoint.steps(tmp_path) == [15, 20] and newest(tmp_path) == 15
    save(saver, 20)
    assert (tmp_path / "20.unverified-1").is_dir() and checkpoint.steps(tmp_path) == [20]
    assert newest(tmp_path) == 20


STRANGE = ("999999", "0001", "²", "1.5", "notes", "best", "3")


def test_folders_that_are_no_checkpoints_are_neither_believed_nor_deleted(tmp_path):
    directory = tmp_path / "checkpoints"
    save(saver_of(directory), 1, 2)
    for name in STRANGE[:4]:
        shutil.copytree(directory / "1", directory / name)
    (directory / "notes").mkdir()
    (directory / "best").symlink_to(directory / "1")
    (directory / "3").symlink_to(shutil.copytree(directory / "1", tmp_path / "3"))
    assert newest(directory) == 2
    save(saver_of(directory, {2}, keep=1), 1_000_000)
    assert {path.name for path in directory.iterdir()} == {*STRANGE, "1000000"}


def test_the_state_may_be_donated_while_it_is_being_written(tmp_path):
    """Steps overwrite the 32 MB of a state right after its save has begun."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    saver, state = saver_of(tmp_path), {"w": jnp.arange(8.0e6, dtype=jnp.float32)}
    before, shapes = jax.device_get(state), jax.eval_shape(lambda: state)
    saver.save(1, state, {})
    for _ in range(10):
        state = step(state)
    jax.block_until_ready(state)
    saver.wait()
    restored = checkpoint.restore_latest(tmp_path, shapes)
    jax.tree.map(np.testing.assert_array_equal, restored.state, before)


def test_a_save_that_fails_is_named_at_the_next_step(tmp_path, monkeypatch):
    saver = saver_of(tmp_path)
    save(saver, 5)

    class Failing:
        def result(self):
            raise ValueError("RESOURCE_EXHAUSTED:\n No space left on device")

    monkeypatch.setattr(checkpoint, "start", lambda *a, **how: Failing())
    saver.save(10, state_of(10), {})
    saver._thread.join()
    with pytest.raises(checkpoint.SaveError) as error:
        saver.check()
    assert "checkpoint of step 10 could not be saved" in str(error.value)
    assert "No space left on device" in str(error.value) and "from step 5" in str(error.value)
    assert "\n" not in str(error.value) and newest(tmp_path) == 5
    saver.check()  # it is said once


def test_a_directory_that_cannot_be_written_is_named_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.SaveError, match="could not be saved in .*file"):
        saver_of(tmp_path / "file" / "checkpoints").save(1, state_of(1), {})


@pytest.mark.parametrize("lacking", ["room", "inodes"])
def test_a_save_without_room_is_refused_before_anything_is_written(lacking, tmp_path, monkeypatch):
    save(saver_of(tmp_path), 1)
    none = {"f_bavail": 0} if lacking == "room" else {"f_favail": 0, "f_files": 9}
    free = type("Free", (), {"f_bavail": 9**9, "f_frsize": 1, "f_files": 9, "f_favail": 9, **none})
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    message = (
        "0.00 MB are free and a checkpoint takes 0.00 MB: .*; make it"
        if lacking == "room"
        else "has no inode"
    )
    with pytest.raises(checkpoint.SaveError, match=message):
        saver_of(tmp_path).save(2, state_of(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_full_disk_in_the_background_is_one_line_without_the_librarys_traceback(tmp_path, capfd):
    saver, before = saver_of(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {"w": jax.random.normal(jax.random.key(0), (400, 400))}
    log = logging.StreamHandler()
    logging.getLogger("absl").addHandler(log)
    with library_threads.quiet():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(checkpoint.SaveError, match="step 1 could not be saved") as error:
                saver.save(1, state, {})
                saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            logging.getLogger("absl").removeHandler(log)
    assert "\n" not in str(error.value) and "Traceback" not in capfd.readouterr().err
    assert stopping.hangs()  # the library's other threads are not waited for


def test_a_thread_of_the_program_itself_still_shows_its_traceback(monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    theirs = type("Theirs", (threading.Thread,), {"__module__": "orbax.checkpoint.future"})
    with library_threads.quiet():
        for kind in (theirs, threading.Thread):
            thread = kind(target=lambda: 1 / 0, name=kind.__name__)
            thread.start()
            thread.join()
    assert [args.thread.name for args in seen] == ["Thread"]


def test_the_last_save_is_waited_for_also_if_the_run_ends_badly(tmp_path):
    with pytest.raises(SystemExit), saving.finishing(saver_of(tmp_path)) as saver:
        saver.save(3, state_of(3), {})
        raise SystemExit(3)
    assert newest(tmp_path) == 3
