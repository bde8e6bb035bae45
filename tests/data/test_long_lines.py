"""A line without an end, in a small compressed file or a large one, takes no memory."""

import gzip
import json
import lzma
import tracemalloc

import pytest

from moe_jax import config as configs
from moe_jax.data import policy, sources, utf8


def read(path, **options):
    options |= {"validation_fraction": 0.0, "data_dir": path.parent}
    return list(sources.documents(str(path), "train", **options))


def record(characters):
    return json.dumps({"text": "x" * (characters - len('{"text": ""}'))})


def test_a_record_may_be_as_long_as_the_key_says(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{record(50)}\n{record(100)}\n{record(100)}")
    assert len(read(path, reading=policy.Reading(max_line=100))) == 3
    with pytest.raises(ValueError, match=r"a.jsonl:2 is longer than the 99 characters of data.ma"):
        read(path, reading=policy.Reading(max_line=99))
    assert configs.default().data.max_line == policy.STRICT.max_line


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_a_line_without_an_end_is_refused_in_little_memory(suffix, tmp_path):
    path = tmp_path / f"a.jsonl{suffix}"
    opened = {"": open, ".gz": gzip.open, ".xz": lzma.open}[suffix]
    with opened(path, "wb") as file:
        file.write(b'{"text": "short"}\n')
        for _ in range(64):
            file.write(b"a" * 1_000_000)
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"a.jsonl[.gxz]*:2 is longer than the 2,000,000"
    ) as refused:
        read(path, reading=policy.Reading(max_line=2_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(refused.value) and peak < 30_000_000


@pytest.mark.parametrize(
    ("damage", "where"),
    [(b"\xff", "line 3"), ("é".encode()[:1] + b"a", "line 3"), (b"\n\n" + b"\xff", "line 5")],
)
def test_the_line_of_a_damaged_character_is_found_in_pieces(damage, where, tmp_path, monkeypatch):
    monkeypatch.setattr(utf8, "BUFFER_BYTES", 7)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}\n' + damage)
    with pytest.raises(ValueError, match=f"is not UTF-8 .*, {where}"):
        read(path)


def test_the_last_good_line_before_a_truncated_end_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(utf8, "BUFFER_BYTES", 100)
    path = tmp_path / "a.jsonl.gz"
    lines = "".join(json.dumps({"text": f"{n} {n * n}"}) + "\n" for n in range(5000))
    content = gzip.compress(lines.encode())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot be read after line (\d+)") as refused:
        read(path)
    assert 1000 < int(str(refused.value).split("line ")[1].split()[0]) < 4500
