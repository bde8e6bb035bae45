"""Files and folders appear whole, or not at all."""

import errno
import os

import pytest

from moe_jax import files


def test_a_file_is_replaced_at_the_end_and_stays_as_it_was_after_an_error(tmp_path):
    path = tmp_path / "results.csv"
    files.write_text(path, "whole\n")
    with pytest.raises(RuntimeError), files.whole_file(path) as unfinished:
        unfinished.write_text("a ha")
        assert path.read_text() == "whole\n"
        raise RuntimeError
    assert path.read_text() == "whole\n"
    files.write_text(path, "anew é\n")
    assert path.read_text("utf-8") == "anew é\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_at_the_end_and_leaves_nothing_after_an_error(tmp_path):
    folder = tmp_path / "new" / "model"
    with pytest.raises(RuntimeError), files.whole_folder(folder) as unfinished:
        (unfinished / "part").touch()
        assert not folder.exists()
        raise RuntimeError
    assert not list(folder.parent.iterdir())
    folder.mkdir()  # an empty one is as good as none
    with files.whole_folder(folder) as unfinished:
        (unfinished / "whole").touch()
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_full_disk_is_named_by_the_file_and_with_what_to_do(tmp_path):
    with pytest.raises(OSError, match="No space left on device: .*results.csv") as error:
        with files.whole_file(tmp_path / "results.csv"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert files.fix(error.value) == "; free some space there, or choose another place"
    assert files.fix(OSError("no number")) == files.fix(ValueError()) == ""


def test_the_leftover_of_a_killed_process_is_removed_and_a_running_ones_is_not(tmp_path):
    folder = tmp_path / "model[1]"
    with files.whole_folder(folder, shared=True) as running:
        (running / "part").touch()
        leftover = running.with_name(running.name[:-1] + "z")
        leftover.mkdir()
        (leftover / "part").touch()
        other = tmp_path / ".model1.unfinished-0123"
        other.mkdir()
        with files.whole_folder(folder, shared=True):
            assert (running / "part").exists() and not leftover.exists()
    assert sorted(tmp_path.iterdir()) == [other, folder]


def test_a_folder_that_exists_is_refused_unless_it_is_shared(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "first").touch()
    with pytest.raises(ValueError, match="exists; choose another output"):
        with files.whole_folder(tmp_path / "cache"):
            raise AssertionError("not to be reached")
    with files.whole_folder(tmp_path / "cache", shared=True) as unfinished:
        (unfinished / "second").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", "first"]
