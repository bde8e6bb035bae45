"""A workdir of somebody else: links, pipes and texts in it lead nowhere and do no harm."""

import os

import jax
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import files, model, train, untrusted

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


def test_the_routers_at_the_start_empty_no_file_that_shares_its_content(tmp_path):
    (tmp_path / "mine").write_text("mine")
    os.link(tmp_path / "mine", tmp_path / "routers_at_start.npz")
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1}
    config = model.ModelConfig(vocab_size=8, num_hidden_layers=1, num_experts=2, **sizes)
    params = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params)
    [kernel] = train._routers_at_start(tmp_path, 0, params, config).values()
    assert (tmp_path / "mine").read_text() == "mine"
    [kept] = np.load(tmp_path / "routers_at_start.npz").values()
    np.testing.assert_array_equal(kept, kernel)


def test_a_line_and_a_page_of_a_stranger_do_not_command_a_terminal():
    text = "日本語\t\x1b[2J\x9b31m\x7f\u202e\ud800\n"
    assert untrusted.line(text) == r"日本語\t\x1b[2J\x9b31m\x7f\u202e\ud800\n"
    assert untrusted.page(text[:-3] + "\n") == "日本語\t\\x1b[2J\\x9b31m\\x7f\n"


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
