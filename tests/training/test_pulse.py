"""A run shows that it is alive; one that hangs is shown with its stacks, and ended."""

import json
import os
import time

import pytest

from moe_jax import config as configs
from moe_jax.training import pulse


def hang(tmp_path, phases=("data", "step"), **settings):
    watch = pulse.Pulse(configs.Guards(**settings), tmp_path)
    with watch.watched():
        for phase in phases:
            watch.at(7, phase)
            time.sleep(0.5)


def test_a_stall_is_reported_once_with_the_stacks(tmp_path, capfd):
    hang(tmp_path, stall_seconds=0.2, stall_end_seconds=0)
    said = capfd.readouterr().err
    assert said.count("no progress for") == 2  # one for each phase
    assert "in the data after step 7" in said and "in hang" in said


def test_a_stall_that_lasts_ends_the_run_so_that_it_can_go_on(tmp_path, capfd, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    hang(tmp_path, stall_seconds=0.1, stall_end_seconds=0.3)
    assert set(ended) == {75}
    assert "the data after step 7 made no progress for" in capfd.readouterr().err


def test_an_evaluation_may_take_its_time(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("ended"))
    hang(tmp_path, [pulse.EVALUATION], stall_seconds=0.1, stall_end_seconds=0.2)
    assert capfd.readouterr().err == ""


def test_the_heartbeat_tells_where_the_run_is(tmp_path, monkeypatch):
    monkeypatch.setattr(pulse, "WRITE_SECONDS", 0)
    watch = pulse.Pulse(configs.Guards(stall_seconds=0.2), tmp_path)
    with watch.watched():
        watch.at(7, "save")
        time.sleep(0.3)
        beat = json.loads((tmp_path / "heartbeat.json").read_text())
        assert (beat["step"], beat["phase"], beat["process"]) == (7, "save", os.getpid())
        assert abs(beat["time"] - time.time()) < 1 and beat["seconds"] < 1
    assert json.loads((tmp_path / "heartbeat.json").read_text())["phase"] == "ended"


@pytest.mark.parametrize("settings", [{"stall_seconds": 5.0, "stall_end_seconds": 4.0}])
def test_the_end_comes_after_the_report(settings):
    with pytest.raises(configs.ConfigError, match="stall_end_seconds=4 is less than stall_sec"):
        configs.Guards(**settings)
