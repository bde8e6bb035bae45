"""Exactness of bytes and SentencePiece, what loading refuses, and the files of a folder."""

import json
import shutil

import hypothesis
import numpy as np
import pytest
import sentencepiece
import tokenizers as hf_tokenizers
from hypothesis import strategies as st

from moe_jax.data import tokenizers
from moe_jax.data.tokenizer_training import sentencepiece_model as model

LINES = [
    "The house is small, the garden is not so small.\n",
    "Das Haus ist klein, der Garten ist nicht so klein.\n",
    "Дом маленький, сад не такой маленький.\n",
    "Το σπίτι είναι μικρό, ο κήπος δεν είναι τόσο μικρός.\n",
    "房子很小,花园没有那么小。\n",
    "    if year == 1984:  return 2001\n",
]
VOCAB_SIZE = 420
# Texts that tokenizers normalise, drop, or take for special tokens.
AWKWARD = [
    "",
    " ",
    " lead, trail ",
    "two  three   spaces",
    "\ttab\t\ttabs",
    "line\nline\r\nline\n\n",
    "1234567890",
    "🙂👩‍👩‍👧 🏳️‍🌈",
    "e\u0301 \u00e9 ﬁ Å",  # two ways to write a letter, a ligature, a sign that NFKC replaces
    "▁ ▁▁ a▁b",  # SentencePiece's own sign for a space
    "<s></s><unk><pad><0x41>",
    "\0 \x7f \u200b \ufeff \u2028 \u3000 \ufffd",
]

any_text = st.text(max_size=60)
text_of_lines = st.lists(st.sampled_from([*"".join(LINES), *AWKWARD]), max_size=30).map("".join)


def awkward_examples(test):
    for text in AWKWARD:
        test = hypothesis.example(text)(test)
    return test


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "small.model"
    path.write_bytes(model(["".join(LINES)] * 3, "bpe", VOCAB_SIZE))
    return path


@pytest.fixture(scope="module")
def bpe(bpe_path):
    return tokenizers.load(str(bpe_path))


@awkward_examples
@hypothesis.given(any_text)
@hypothesis.settings(deadline=None, max_examples=50)
def test_bytes_come_back_exactly_and_never_collide_with_special_ids(text):
    tokenizer = tokenizers.load("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert bytes((ids - 3).tolist()) == text.encode()
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == text
    assert all(3 <= i < tokenizer.vocab_size for i in ids)


@awkward_examples
@hypothesis.given(any_text | text_of_lines)
@hypothesis.settings(deadline=None)
def test_bpe_pieces_come_back_exactly_and_never_collide_with_special_ids(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.int32
    assert bpe.decode([bpe.bos_id, *ids, bpe.eos_id, bpe.pad_id]) == text
    # 3 stands for a text that cannot be written in pieces: there is none.
    assert all(3 < i < bpe.vocab_size for i in ids)
    assert len(ids) <= len(text.encode())


def test_bytes_cut_within_a_character_decode_to_a_replacement_and_not_to_an_error():
    tokenizer = tokenizers.load("bytes")
    assert tokenizer.decode(tokenizer.encode("aж")[:-1]) == "a\ufffd"


def test_a_batch_gives_the_ids_of_its_texts_one_by_one(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    made = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE({"a": 0, "<s>": 1, "</s>": 2}, []))
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(path))
    texts = [*LINES, *AWKWARD] * 3
    for tokenizer in (tokenizers.load("bytes"), bpe, tokenizers.load(str(path))):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))
            assert ids.dtype == np.int32
        assert tokenizer.encode_batch([]) == []


def test_special_ids_are_fixed_and_the_vocabulary_has_the_size_asked_for(bpe):
    for tokenizer in (bpe, tokenizers.load("bytes")):
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert bpe.vocab_size == VOCAB_SIZE


def test_bpe_learns_words_but_keeps_digits_and_line_ends_apart(bpe):
    for line in LINES[:5]:
        assert len(bpe.encode(line)) < 0.6 * len(line.encode())
    assert len(bpe.encode("2001")) == 4
    dot, end = bpe.encode("."), bpe.encode("\n")
    assert bpe.encode(".\n.").tolist() == [*dot, *end, *dot]


def test_a_fingerprint_is_of_the_model_not_of_its_place(bpe, bpe_path, tmp_path):
    moved = shutil.copy(bpe_path, tmp_path / "moved.model")
    (tmp_path / "other.model").write_bytes(model(LINES * 3, "bpe", VOCAB_SIZE - 1))
    assert tokenizers.load(str(moved)).fingerprint == bpe.fingerprint
    other = tokenizers.load(str(tmp_path / "other.model"))
    assert len({bpe.fingerprint, other.fingerprint, tokenizers.load("bytes").fingerprint}) == 3


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "junk.model").write_bytes(b"junk" * 100)
    with open(tmp_path / "endless.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES * 3),
            model_writer=model,
            vocab_size=80,
            eos_id=-1,
            minloglevel=2,
        )
    for name, message in {
        "missing.model": "is not a file; use 'bytes', a folder made by",
        ".": "is a folder without tokenizer.json or tokenizer.model",
        "empty.model": "is not a SentencePiece model",
        "junk.model": "is not a SentencePiece model",
        "endless.model": "has no begin or end token",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            tokenizers.load(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)


def test_ids_beyond_the_pieces_have_no_text(bpe):
    for tokenizer in (bpe, tokenizers.load("bytes")):
        ids = [*tokenizer.encode("ab"), tokenizer.vocab_size, tokenizer.vocab_size + 60]
        assert tokenizer.decode(ids) == "ab"


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json is not a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 1}', "added_tokens_decoder is not an"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": "a"}}',
            "invalid literal for int",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": 5}}', "not an object of ids and"),
        ("added_tokens.json", '{"<a>": true}', "the id of '<a>' is True, not a whole number from"),
        ("added_tokens.json", '{"<a>": "5"}', "the id of '<a>' is '5', not a whole number from 0"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id=.* is no id or list"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id=.* is no id or list"),
    ],
)
def test_a_damaged_file_beside_a_tokenizer_is_named(name, text, complaint, bpe_path, tmp_path):
    path = shutil.copy(bpe_path, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text("{}")  # as in a folder of Hugging Face
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        tokenizers.load(str(path))
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b'{"model": "\xff"}', b"{}", b"[", b""])
def test_a_damaged_tokenizer_json_is_named(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a tokenizer.json of Hugging Face") as error:
        tokenizers.load(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_json_is_read_with_the_special_tokens_named_beside_it(tmp_path):
    trained = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    trained.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = hf_tokenizers.decoders.ByteLevel()
    trainer = hf_tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=hf_tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["to be or not to be"] * 3, trainer)
    path = tmp_path / "tokenizer.json"
    trained.save(str(path))
    beside = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    tokenizer = tokenizers.load(str(path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, -1)
    for text in ("To be, 今日 or not?", "a</s>b<s>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    beside["eos_token"] = "<s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    assert tokenizers.load(str(path)).fingerprint != tokenizer.fingerprint
    beside["eos_token"], beside["pad_token"] = "<end>", "[PAD]"  # the vocabulary has neither
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    tokenizer, size = tokenizers.load(str(path)), trained.get_vocab_size()
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (size, size + 1, size + 1)
    trained.enable_truncation(4)
    trained.save(str(path))
    (tmp_path / "tokenizer_config.json").unlink()
    cut = tokenizers.load(str(path))  # with the usual names
    assert (cut.bos_id, cut.eos_id) == (0, 1)
    assert cut.decode(cut.encode(text)) == text
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer.json of Hugging Face"):
        tokenizers.load(str(path))
