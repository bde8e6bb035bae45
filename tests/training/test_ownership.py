"""A run is not begun anew because its checkpoints are elsewhere, and takes none of another run."""

import json
import shutil

import pytest
from etils import epath

from moe_jax.config import ConfigError, checkpoints_of, default
from moe_jax.training import checkpoint, ownership

GONE, OTHERS = "has no checkpoint, but the run in --workdir=", "are those of another run"


def of(workdir, directory=""):
    workdir.mkdir(parents=True, exist_ok=True)
    where = checkpoints_of(workdir, str(directory))
    config = default()
    config.checkpoint.every_steps = 4
    return ownership.Ownership(workdir, where, config), where


def trained(workdir, directory="", saves=True):
    """A run that ends after its first checkpoint, or before it; returns where it saves."""
    run, where = of(workdir, directory)
    run.check()
    with run.claim(saved=False):
        if saves:
            (where / "4").mkdir(parents=True)
            run.saved()
    return where


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(workdir, directory, message):
    run, before = of(workdir, directory)[0], contents(workdir.parent)
    with pytest.raises(ConfigError, match=message) as error:
        run.check()
    assert "\n" not in str(error.value) and contents(workdir.parent) == before
    return str(error.value)


LOSSES = {
    "not mounted": lambda where: where.rename(where.with_name("elsewhere")),
    "emptied": lambda where: shutil.rmtree(where / "4"),
    "renamed": lambda where: (where / "4").rename(where / "4.unverified-1"),
}


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(loss, outside, tmp_path):
    disk = tmp_path / "disk" if outside else ""
    where = trained(tmp_path / "run", disk)
    LOSSES[loss](where)
    assert f"saved some, in {where};" in refused(tmp_path / "run", disk, GONE)


@pytest.mark.parametrize(("first", "then"), [("", "disk"), ("disk", "other"), ("disk", "")])
def test_a_directory_that_is_added_changed_or_left_out_is_named_with_the_old_one(
    first, then, tmp_path
):
    first, then = (name and tmp_path / name for name in (first, then))
    where = trained(tmp_path / "run", first)
    assert f"in {where};" in refused(tmp_path / "run", then, GONE)
    trained(tmp_path / "anew" / "run", then)  # in a new workdir it is allowed


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    for disk in ("", tmp_path / "disk"):
        for saves in (False, False, True):
            trained(tmp_path / f"run{bool(disk)}", disk, saves)


@pytest.mark.parametrize("sign", ["result.json", "metrics.jsonl", "checkpoints"])
def test_a_run_without_a_note_is_known_by_what_it_left(sign, tmp_path):
    """It is a run of an earlier version, or one whose note was removed."""
    workdir = tmp_path / "run"
    row = {"step": 8}  # the save of step 8 waits for that of step 4, and may not have ended itself
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    of(workdir, tmp_path / "disk")[0].check()
    if sign == "result.json":
        (workdir / sign).write_text("{}")
    elif sign == "metrics.jsonl":
        (workdir / sign).write_text(json.dumps(row | {"step": 9}) + "\ndamaged\n")
    else:
        (workdir / "checkpoints" / "4").mkdir(parents=True)
    refused(workdir, tmp_path / "disk", GONE)


def test_checkpoints_of_another_run_are_not_taken(tmp_path):
    disk = tmp_path / "disk"
    where = trained(tmp_path / "a" / "run", disk)
    assert str(where / ownership.OWNER) in refused(tmp_path / "b" / "run", disk, OTHERS)
    trained(tmp_path / "c" / "run", "")
    refused(tmp_path / "c" / "run", disk, OTHERS)
    (where / ownership.OWNER).write_text("damaged")
    refused(tmp_path / "a" / "run", disk, OTHERS)
    (where / ownership.OWNER).unlink()  # then the run that comes next owns them
    of(tmp_path / "b" / "run", disk)[0].claim(saved=True).close()
    refused(tmp_path / "a" / "run", disk, OTHERS)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_new_workdir_takes_the_checkpoints_of_a_lost_one_if_the_config_is_equal(
    seed, tmp_path, monkeypatch, capsys
):
    """As on a machine that replaces one whose own disk had the workdir."""
    where = trained(tmp_path / "lost" / "run", tmp_path / "disk")
    saved = default()
    saved.checkpoint.every_steps, saved.seed = 4, seed
    monkeypatch.setattr(checkpoint, "described", lambda folder: {"config": saved.to_dict()})
    run, same = of(tmp_path / "new" / "run", tmp_path / "disk")
    assert same == where
    if seed == 0:
        assert run.check()
        with run.claim(saved=True):
            assert "lost with its machine: they are taken" in capsys.readouterr().err
        refused(tmp_path / "lost" / "run", tmp_path / "disk", OTHERS)
    else:
        refused(tmp_path / "new" / "run", tmp_path / "disk", OTHERS)


def test_a_folder_that_is_gone_in_a_run_is_not_called_another_runs(tmp_path):
    workdir, disk = tmp_path / "run", tmp_path / "disk"
    run, where = of(workdir, disk)
    with run.claim(saved=False):
        run.check_owner()
        (where / ownership.OWNER).unlink()
        with pytest.raises(ConfigError, match="owner.json is gone; mount or restore the folder"):
            run.check_owner()


def test_a_folder_that_another_run_is_using_is_refused_before_its_first_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    first, second = (of(tmp_path / name / "run", disk)[0] for name in "ab")
    with first.claim(saved=False):
        second.check()
        with pytest.raises(ConfigError, match=f"another run is using {disk}/run; .*, or wait"):
            second.claim(saved=False)
        first.check_owner()
    second.claim(saved=False).close()  # the first was killed before it saved
    with pytest.raises(ConfigError, match=f"another run is using {disk}/run; set"):
        first.check_owner()  # as in a bucket, which has no locks


def test_a_run_that_is_moved_or_copied_with_its_checkpoints_goes_on(tmp_path):
    trained(tmp_path / "here" / "run", tmp_path / "here" / "disk")
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    (tmp_path / "here").rename(tmp_path / "moved")
    for place in ("copy", "moved"):
        run, where = of(tmp_path / place / "run", tmp_path / place / "disk")
        run.check()
        run.claim(saved=True).close()
        note = json.loads((tmp_path / place / "run" / ownership.NOTE).read_text())
        assert note["checkpoints"] == str(where)
    trained(tmp_path / "inside" / "run")
    (tmp_path / "inside" / "run").rename(tmp_path / "inside" / "renamed")
    of(tmp_path / "inside" / "renamed")[0].check()


def test_checkpoints_without_an_owner_are_taken(tmp_path):
    """A person has put them there, or an earlier version has saved them."""
    where = trained(tmp_path / "run")
    shutil.copytree(where, tmp_path / "new" / "checkpoints")
    of(tmp_path / "new")[0].check()
    shutil.move(where, tmp_path / "disk" / "run")
    of(tmp_path / "run", tmp_path / "disk")[0].check()


@pytest.mark.parametrize("note", ["{}", "[", '{"id": "../../x", "checkpoints": ""}'])
def test_a_damaged_note_is_named(note, tmp_path):
    trained(tmp_path / "run")
    (tmp_path / "run" / ownership.NOTE).write_text(note)
    refused(tmp_path / "run", "", "saved.json is damaged; remove it if")


def test_a_file_in_the_place_of_the_folder_is_named_at_the_start(tmp_path):
    (tmp_path / "run").mkdir()
    for path, disk in (
        (tmp_path / "run" / "checkpoints", ""),
        (tmp_path / "disk", tmp_path / "disk"),
        (tmp_path / "disk", tmp_path / "disk" / "deep"),
    ):
        path.write_text("mine")
        refused(tmp_path / "run", disk, f"{path} is no folder for checkpoints; move it away")


def test_a_link_in_the_place_of_the_lock_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("mine")
    run, where = of(tmp_path / "run", tmp_path / "disk")
    epath.Path(where).mkdir(parents=True)
    (tmp_path / "disk" / "run" / ownership.LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic link"):
        run.claim(saved=False)
    assert (tmp_path / "mine").read_text() == "mine"
