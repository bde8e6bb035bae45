"""Text that any JSON reader reads, whatever the numbers."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import strict_json


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (np.float32(0.1), 0.1),
        (float("nan"), None),
        (-np.inf, None),
        (jnp.array([1.0, jnp.inf]), [1.0, None]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([[1], [1, 2], []], [[1], [1, 2], []]),
        ({"a": None, "b": True, "c": (1, "x")}, {"a": None, "b": True, "c": [1, "x"]}),
        ([{"a": np.nan}, {"b": [np.int64(3)]}], [{"a": None}, {"b": [3]}]),
    ],
)
def test_values_are_read_back_and_numbers_that_are_not_finite_are_null(value, read):
    text = strict_json.text(value)
    assert json.loads(text, parse_constant=pytest.fail) == read


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"a": 1, "a": 2}', "'a' is in an object twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "'a' is in an object twice"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "'NaN' is not a finite number"),
        ('{"a": [-Infinity]}', "'-Infinity' is not a finite number"),
        ('{"a": 1e999}', "'1e999' is not a finite number"),
        ('{"a": ["\\ud800"]}', "half a surrogate pair"),
        ('{"\\uDFFF": 1}', "half a surrogate pair"),
        ("[]", "is not a JSON object"),
        ("", "is not JSON"),
    ],
)
def test_what_is_no_object_is_refused_with_its_path(content, complaint, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{path} .*{complaint}"):
        strict_json.read_object(path)


def test_what_is_read_can_be_written():
    text = r'{"a": 1e308, "b": "\ud83d\ude00", "c": "\\ud800", "d": -0.5}'
    assert strict_json.parse(text) == json.loads(text)
    assert json.loads(strict_json.text(strict_json.parse(text)).encode()) == json.loads(text)


def test_a_pipe_and_a_file_that_is_too_large_are_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="is not a regular file"):
        strict_json.read_object(tmp_path / "pipe.json")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(strict_json.MAX_BYTES + 1)
    monkeypatch.setattr(strict_json, "parse", None)
    with pytest.raises(ValueError, match="100,000,001 bytes; JSON is read up to 100,000,000"):
        strict_json.read_object(tmp_path / "large.json")
