"""The parts of a run's wall time add up to all of it, also over the processes that it took."""

import json
import types

import pytest

from moe_jax.training import goodput


@pytest.fixture
def now(monkeypatch):
    """The clock, in seconds, which the test sets."""
    at = [100.0]
    monkeypatch.setattr(goodput, "time", types.SimpleNamespace(monotonic=lambda: at[0]))
    return at


def spent(**parts):
    return dict.fromkeys(goodput.PARTS, 0.0) | parts


def test_each_second_counts_for_one_part(now):
    clock = goodput.Clock(began=90.0)
    for part, seconds in (("compile", 7), ("compute", 20), ("checkpoint", 3), ("evaluation", 5)):
        now[0] += 1 if part == "compile" else 0  # before the loop begins
        clock.begin(part)
        now[0] += seconds
    clock.waited(4)  # of the 20 in which the loop waited for data, 4 with an idle device
    found = clock.seconds()
    assert found == spent(start=11, compile=7, compute=16, data=4, checkpoint=3, evaluation=5)
    assert sum(found.values()) == now[0] - 90


def test_what_a_process_computed_after_its_checkpoint_is_lost(now, tmp_path):
    heartbeat = tmp_path / "heartbeat.json"
    at_checkpoint = spent(start=10, compile=5, compute=60, data=2, checkpoint=1)
    at_the_crash = spent(start=10, compile=5, compute=90, data=3, checkpoint=1, evaluation=8)
    heartbeat.write_text(json.dumps({"spent": at_the_crash}))
    found = goodput.Clock(100.0, at_checkpoint, heartbeat).seconds()
    assert found == at_the_crash | {"compute": 60, "data": 2, "lost": 31}


def test_all_steps_of_a_process_without_a_checkpoint_are_lost(now, tmp_path):
    heartbeat = tmp_path / "heartbeat.json"
    heartbeat.write_text(json.dumps({"spent": spent(start=3, compute=40)}))
    assert goodput.Clock(100.0, {}, heartbeat).seconds() == spent(start=3, lost=40)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"spent": 3}', '{"spent": {"compute": -1}}', '{"spent": {"x": 1}}']
)
def test_a_damaged_heartbeat_is_as_none(text, now, tmp_path):
    heartbeat = tmp_path / "heartbeat.json"
    heartbeat.write_text(text)
    kept = spent(compute=60)
    for path in (heartbeat, tmp_path / "none", None):
        assert goodput.Clock(100.0, kept, path).seconds() == kept


def test_shares_add_up_and_skipped_updates_are_lost():
    shares = goodput.shares(spent(compute=80, compile=20), skipped=0.25)
    assert shares == spent(compute=0.6, lost=0.2, compile=0.2)
    said = goodput.line(shares)
    assert said.startswith("goodput: 60.0% of the wall time in training steps (")
    assert said.index("lost 20.0%") < said.index("data 0.0%")
