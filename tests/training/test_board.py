"""A TensorBoard that fails, hangs or is slow neither stops nor delays a run."""

import threading
import time

import pytest

from moe_jax.training import board


class Fails:
    def __init__(self, folder, purge_step):
        pass

    def add_scalar(self, *_):
        raise OSError(28, "No space left on device")

    def flush(self):
        pass

    def close(self):
        pass


class Hangs(Fails):
    def add_scalar(self, *_):
        threading.Event().wait()


class HangsAtTheEnd(Fails):
    def add_scalar(self, *_):
        pass

    def close(self):
        threading.Event().wait()


class FailsAtTheEnd(HangsAtTheEnd):
    def close(self):
        raise OSError(28, "No space left on device")


def test_a_fault_at_the_end_is_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(board.tensorboardX, "SummaryWriter", FailsAtTheEnd)
    began = time.monotonic()
    board.Board(tmp_path, None).close()
    assert time.monotonic() - began < board.SECONDS / 2
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("writer", "said"),
    [(Fails, "No space left"), (Hangs, "it hangs"), (HangsAtTheEnd, "it hangs")],
)
def test_rows_are_taken_at_once_and_the_end_comes(writer, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(board.tensorboardX, "SummaryWriter", writer)
    monkeypatch.setattr(board, "SECONDS", 0.2)
    began = time.monotonic()
    shown = board.Board(tmp_path, None)
    for step in range(3 * board.ROWS):
        shown.add(step, {"loss": 1.0})
    shown.close()
    assert time.monotonic() - began < 5
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("TensorBoard lacks rows that metrics.jsonl has: ") and said in line


def test_a_sound_one_has_all_rows_and_is_silent(tmp_path, monkeypatch, capsys):
    rows = []

    class Sound(Fails):
        def add_scalar(self, name, value, step):
            rows.append((step, name, value))

    monkeypatch.setattr(board.tensorboardX, "SummaryWriter", Sound)
    shown = board.Board(tmp_path, None)
    for step in range(50):
        shown.add(step, {"loss": float(step)})
    shown.close()
    assert rows == [(step, "loss", float(step)) for step in range(50)]
    assert not capsys.readouterr().err
