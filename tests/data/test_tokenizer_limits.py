"""A tokenizer of a stranger is refused in one line before it takes memory, time or a stack dump."""

import base64
import io
import json
import os
import struct

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe_jax.data import sentencepiece_folder, tokenizer_limits, tokenizers

BOMB = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}


def charsmap(*texts: bytes) -> str:
    return base64.b64encode(struct.pack("<I", 4) + bytes(4) + b"\0".join(texts)).decode()


def template(ids):
    pieces = [
        {"SpecialToken": {"id": "<q>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    special = {"<q>": {"id": "<q>", "ids": ids, "tokens": ["<q>"] * len(ids)}}
    named = {"type": "TemplateProcessing", "single": pieces, "pair": []}
    return {"post_processor": named | {"special_tokens": special}}


def split(pattern):
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {"pre_tokenizer": rule | {"invert": False}}


def token(number):
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"added_tokens": [{"id": number, "content": "<x>", **dict.fromkeys(flags, False)}]}


@pytest.fixture
def write(tmp_path):
    """A usable tokenizer.json with some of its keys replaced, written with this text at its end."""

    def write(changes, after=""):
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        values = json.loads(made.to_str()) | changes
        if "model" not in changes:
            values["model"]["vocab"] = {c: i for i, c in enumerate(["<s>", "</s>", *letters])}
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(values) + after)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (token(2**32 - 1), "the id 4294967295, not one from 0"),
        (token(-1), "the id -1, not one from 0"),
        ({"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}}, "the id 2147483648"),
        (template([2**32 - 1]), "the id 4294967295"),
        (template([1] * 10**5), "its template adds 100000 ids"),
        ({"normalizer": {"type": "Sequence", "normalizers": [BOMB] * 2}}, "10,000 times longer"),
        ({"decoder": {"type": "Sequence", "decoders": [BOMB] * 5}}, "its decoder makes text up"),
        ({"normalizer": {**BOMB, "content": "a" * 10**6}}, "1,000,000 times longer"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}}, "1,000,000 times longer"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}},
            "1,099,511,627,776 times longer",
        ),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 101}},
            "its normalizer has 101 steps",
        ),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"a" * 9999)}},
            "9,999 times longer",
        ),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA////"}},
            "its precompiled_charsmap is damaged",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "is not base64"),
        (split("((a{1000}){1000}){1000}"), "repeats a part 1,000,000,000 times"),
        (
            {"model": {"type": "BPE", "vocab": {}, "end_of_word_suffix": "a" * 101}},
            "its end_of_word_suffix is longer than 100",
        ),
    ],
)
def test_what_would_take_memory_or_time_is_refused(changes, complaint, write):
    with pytest.raises(ValueError, match="is not a tokenizer.json of Hugging Face") as refused:
        tokenizers.load(write(changes))
    assert complaint in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        split(r"\p{N}{1,3}|\x{2581}|[^\r\n]{2,}|\s+(?!\S)"),
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}},
        template([1]),
    ],
)
def test_a_usable_tokenizer_is_read(changes, write):
    tokenizer = tokenizers.load(write(changes))
    assert len(tokenizer.prompt("abc1")) >= 4


@pytest.mark.parametrize("of", ["prompt", "encode"])
def test_a_panic_is_one_line_and_prints_no_stack(of, write, capfd):
    """The pattern goes back and forth until the library gives up, by a panic."""
    tokenizer = tokenizers.load(write(split("(a+)+$")))
    with pytest.raises(ValueError, match="': its library fails: .*retry-limit") as refused:
        getattr(tokenizer, of)("a" * 40 + "b")
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


def test_what_is_printed_without_a_panic_is_not_lost(capfd):
    with tokenizer_limits.without_panics():
        os.write(2, b"a warning\n")
    with pytest.raises(KeyError), tokenizer_limits.without_panics():
        os.write(2, b"another\n")
        raise KeyError
    assert capfd.readouterr().err == "a warning\nanother\n"


def test_the_limits_are_far_beyond_the_tables_of_published_tokenizers():
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be"] * 9),
        model_writer=made,
        vocab_size=20,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    table = sentencepiece_folder.parsed(made.getvalue()).normalizer_spec.precompiled_charsmap
    assert tokenizer_limits._growth_of_charsmap(table) == 33
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    tokenizer_limits.check_json({"normalizer": normalizer})


def test_a_sentencepiece_model_of_endless_pieces_is_refused(tmp_path):
    proto = sentencepiece_folder._pb2.ModelProto()
    for number in range(3):
        proto.pieces.add(piece=str(number) * 50_000, score=0.0, type=1)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="its pieces are too long"):
        tokenizers.load(str(path))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="its pieces are too long"):
        tokenizers.load(str(path))
