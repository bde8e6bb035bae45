"""Files of generated texts, also those that nobody should have written."""

import json

import pytest

from moe_jax.evaluation import json_lines, samples
from moe_jax.evaluation.samples import Sample


def read(path, *lines):
    path.write_bytes(b"\n".join(lines))
    return json_lines.read(path, samples.parse)


def test_fields_of_a_line_are_those_of_its_sample(tmp_path):
    whole = {"text": "a", "prompt": "b", "source": "c", "language": "de", "label": "d"}
    lines = [
        json.dumps({**whole, "model": 3}),
        "",
        json.dumps({"text": "\u0000 zero", "prompt": None, "language": "ja"}),
        '\ufeff{"text": "", "label": ""}',
    ]
    found = read(tmp_path / "texts.jsonl", *(line.encode() for line in lines))
    assert found == [
        Sample(**whole),
        Sample("\0 zero", language="ja", label="ja"),
        Sample("", label="all"),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "' + 10_000_000 * b"a" + b'"}', "more than 4,000,000 bytes"),
        (b'{"text": "a\0b"}', "Invalid control character"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a", "prompt": "\\udfff"}', "surrogate"),
        (b'{"text": "\xff"}', "UTF-8"),
        (b'{"text": 3}', "text"),
        (b'{"text": "a", "label": ["b"]}', "label"),
        (b'{"text": "a", "text": "b"}', "twice"),
        (b'{"prompt": "a"}', "text"),
        (b'["text"]', "not a JSON object"),
        (b'{"text": "a"', "delimiter"),
        (b"[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: repr(value[:25]),
)
def test_a_line_that_cannot_be_used_is_named_by_file_and_number(line, complaint, tmp_path):
    with pytest.raises(ValueError) as error:
        read(tmp_path / "texts.jsonl", b'{"text": "good"}', b"", line)
    message = str(error.value)
    assert complaint in message and "texts.jsonl" in message and "line 3" in message
    assert "\n" not in message and len(message) < 300 + len(str(tmp_path))


def test_a_file_without_lines_or_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no"):
        read(tmp_path / "texts.jsonl", b" ")
    with pytest.raises(ValueError, match="is not a file"):
        json_lines.read(tmp_path, samples.parse)
