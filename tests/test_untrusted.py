"""A workdir of somebody else: links, pipes and texts in it lead nowhere and do no harm."""

import os

import pytest

from moe_jax import config as configs
from moe_jax import files, train, untrusted

NAMES = (
    *(".lock", "config.json", "metrics.jsonl", "result.json", "routers_at_start.npz", "log.txt"),
    *("checkpoints", "tokenizer", "tensorboard", "heartbeat.json"),
    *("tokenizer/tokenizer.json", "tensorboard/events.out", "figures/loss.png", "tokenizer/a/b"),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["file", "folder", "nothing", "itself", "pipe"])
def test_what_stands_in_for_a_file_of_a_run_is_refused(name, kind, tmp_path):
    outside, path = tmp_path / "outside", tmp_path / "run" / name
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("mine")
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "itself" else outside / kind)
    with pytest.raises(ValueError, match=f"{name} is ") as refused:
        untrusted.check_folder(tmp_path / "run")
    assert "\n" not in str(refused.value)
    with pytest.raises(configs.ConfigError, match=f"{name} is "):
        configs.load_json(tmp_path / "run")
    with pytest.raises(configs.ConfigError, match=f"{name} is "):
        train._lock(tmp_path / "run")
    assert (outside / "file").read_text() == "mine"


def test_links_that_lead_nowhere_else_are_allowed(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "6").mkdir(parents=True)
    (run / ".venv").symlink_to("/usr")  # where the workdir is a checkout
    (run / "newest").symlink_to("checkpoints/6")
    (run / "checkpoints" / "7").symlink_to(tmp_path)  # which is no checkpoint
    (tmp_path / "link").symlink_to("run")
    untrusted.check_folder(tmp_path / "link")
    untrusted.check_folder(tmp_path / "not there yet")


def test_a_lock_empties_no_file_that_shares_its_content(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "mine", tmp_path / "run" / ".lock")
    train._lock(tmp_path / "run").close()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_link_in_the_place_of_a_temporary_file_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "config.json.tmp").symlink_to("mine")
    files.write_text(tmp_path / "config.json", "{}")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("English", "English"),
        ("日本語", "日本語"),
        ("a\nb\x1b[31m\x00", "a�b�[31m�"),
        ("right\u202eto left", "right�to left"),
        ("x" * 101, "x" * 99 + "…"),
    ],
)
def test_a_label_is_short_and_printable(text, shown):
    assert untrusted.label(text) == shown
