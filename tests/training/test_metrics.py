"""metrics.jsonl: valid JSON always, and after a restart the rows of an unbroken run."""

import contextlib
import json
import resource

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from moe_jax.training import metrics


def rows_of(*steps):
    return [{"step": step, "loss": float(step)} for step in steps]


def write(folder, rows, resume_step=0):
    with metrics.writer(folder, resume_step=resume_step) as write_row:
        for row in rows:
            write_row(row)


def test_values_are_plain_json_and_numbers_that_are_not_finite_are_null(tmp_path):
    row = {
        "step": np.int32(3),
        "loss": np.float32(0.1),
        "bad": np.float32("nan"),
        "router": {"load": np.array([[0.5, np.inf]])},
    }
    write(tmp_path, [row])
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 3, "loss": 0.1, "bad": null, "router": {"load": [[0.5, null]]}}\n'


def test_a_restart_removes_what_will_be_written_again(tmp_path):
    validation = {"step": 20, "validation": {"loss": 1.0}}
    write(tmp_path, [*rows_of(10, 20), validation, *rows_of(30)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # a kill in the middle of a line
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [10, 20, 20, 30]
    write(tmp_path, [validation, *rows_of(30, 40)], resume_step=20)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        *rows_of(10, 20), validation, *rows_of(30, 40)
    ]  # fmt: skip


def test_a_generated_text_may_hold_any_character(tmp_path):
    """JSON escapes "\\n" and "\\r", but neither U+0085, U+2028 nor U+2029, which also end lines."""
    text = "".join(map(chr, (*range(0x300), *range(0x2020, 0x2030))))
    write(tmp_path, [{"step": 1, "samples": {"prompt": text}}, *rows_of(2)])
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2]
    assert metrics.read(tmp_path / "metrics.jsonl")[0]["samples"]["prompt"] == text


def test_a_run_from_the_start_begins_an_empty_file(tmp_path):
    write(tmp_path, rows_of(1, 2))
    write(tmp_path, rows_of(1))
    assert metrics.read(tmp_path / "metrics.jsonl") == rows_of(1)


def test_scalars_go_to_tensorboard_under_their_path(tmp_path):
    row = {"step": 7, "loss": 2.5, "validation": {"bits_per_byte": 1.5}}
    (tmp_path / "config.json").write_text("{}")
    with metrics.writer(tmp_path, resume_step=0, log_to=("tensorboard",)) as write_row:
        write_row(row)
    [file] = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    found = {}
    content = file.read_bytes()
    while content:  # TFRecord: length (8 bytes), its checksum (4), data, checksum (4)
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        content = content[16 + size :]
    assert found == {"loss": (7, 2.5), "validation/bits_per_byte": (7, 1.5)}


@contextlib.contextmanager
def disk_of(size):
    """Files of this process can grow to so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_that_a_full_disk_does_not_take_are_written_once_there_is_room(tmp_path, capsys):
    with metrics.writer(tmp_path, resume_step=0) as write_row:
        with disk_of(90):  # four rows do not fit, and the file ends within one
            for row in rows_of(*range(1, 5)):
                write_row(row)
            assert (tmp_path / "metrics.jsonl").stat().st_size == 90
        for row in rows_of(5, 6):
            write_row(row)
        write_row.check()
    assert metrics.read(tmp_path / "metrics.jsonl") == rows_of(*range(1, 7))
    [line] = capsys.readouterr().err.splitlines()
    assert "File too large" in line and "the run ends after its next checkpoint" in line


@pytest.mark.parametrize("checked", [True, False], ids=["at a checkpoint", "at the end"])
def test_a_full_disk_ends_a_run_with_the_number_of_lost_rows(checked, tmp_path, capsys):
    with pytest.raises(OSError, match="File too large.* lacks 3 rows up to .*; make room"):
        with disk_of(40), metrics.writer(tmp_path, resume_step=0) as write_row:
            for row in rows_of(1, 2, 3, 4):
                write_row(row)
            if checked:
                write_row.check()
                pytest.fail("the run went on")
    assert metrics.read(tmp_path / "metrics.jsonl") == rows_of(1)


@pytest.mark.parametrize(
    "damage",
    [
        *(b'{"step": 2', b'{"step": "2"}', b"[]", b"\xff", b"", b"[" * 9999),
        *(b'{"step": 2, "a": NaN}', b'{"step": 2, "a": -1e999}', b'{"step": 2, "a": "\\ud800"}'),
    ],
)
def test_a_damaged_line_is_named_and_a_run_goes_on_without_it(damage, tmp_path, capsys):
    write(tmp_path, rows_of(1, 2, 3))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2], b""]))
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="metrics.jsonl, line 2, is damaged .*; remove the line"):
        metrics.read(path)
    write(tmp_path, rows_of(4), resume_step=3)
    assert [row["step"] for row in metrics.read(path)] == [1, 3, 4]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == whole
    assert "line 2" in capsys.readouterr().err
