"""Trained tokenizers: exact for every text, and the same in Transformers as in SentencePiece."""

import json
import lzma
import pathlib
import shutil

import hypothesis
import numpy as np
import pytest
import sentencepiece
import tokenizers as library

from moe_jax.data import (
    corpora,
    prepare,
    text_sampling,
    tokenizer_training,
    tokenizers,
)
from moe_jax.data.document import Document
from tests.data.test_tokenizers import AWKWARD, any_text, awkward_examples

VOCAB_SIZES = {"bpe": 1200, "unigram": 1200, "byte_bpe": 700}
TRAINED_ON = ("de", "el", "en-us", "ja")  # characters of the other 15 languages become bytes
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}


def embedded(lines_per_language):
    """Language -> lines, of the corpus that is embedded."""
    found: dict[str, list[str]] = {}
    path = pathlib.Path(corpora.__file__).with_name("lo_parallel19.jsonl.xz")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for record in map(json.loads, file):
            lines = found.setdefault(record["lang"], [])
            lines += record["text"].splitlines()[: lines_per_language - len(lines)]
            if all(len(lines) == lines_per_language for lines in found.values()) and (
                len(found) == 19
            ):
                break
    return found


@pytest.fixture(scope="module")
def lines():
    return embedded(80)


@pytest.fixture(scope="module", params=VOCAB_SIZES)
def folder(request, tmp_path_factory, lines):
    texts = ["\n".join(lines[language]) for language in TRAINED_ON]
    folder = tmp_path_factory.mktemp(request.param)
    size = VOCAB_SIZES[request.param]
    tokenizer_training.train(texts, folder, kind=request.param, vocab_size=size)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return tokenizers.load(str(folder))


@awkward_examples
@hypothesis.given(any_text)
@hypothesis.settings(deadline=None, max_examples=50)
def test_every_text_comes_back_exactly_and_has_no_special_ids(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text and ids.dtype == np.int32
    assert all(len(SPECIAL) <= i < trained.vocab_size for i in ids)
    assert trained.prompt("")[0] == trained.bos_id


def test_ids_of_special_tokens_sizes_and_digits(folder, trained):
    assert trained.vocab_size == VOCAB_SIZES[folder.name.rstrip("0123456789")]
    assert (trained.pad_id, trained.bos_id, trained.eos_id) == tuple(SPECIAL.values())
    assert len(trained.encode("1984")) == 4
    assert trained.is_exact


@pytest.mark.parametrize("folder", ["bpe", "unigram"], indirect=True)
def test_the_library_of_transformers_gives_the_ids_of_sentencepiece(folder, trained, lines):
    """Only two cuts of a line with equal scores may differ: there is none here."""
    own = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = tokenizers.SentencePieceTokenizer(str(folder / "tokenizer.model"))
    own.encode_special_tokens = True
    texts = [line for some in lines.values() for line in some] + AWKWARD
    assert len(lines) == 19 and len(texts) > 1500
    for text, ids in zip(texts, model.encode_batch(texts), strict=True):
        assert own.encode(text, add_special_tokens=False).ids == ids.tolist(), text
        assert own.decode(ids) == model.decode(ids) == text


@pytest.mark.long
def test_transformers_gives_the_ids_of_sentencepiece(folder, trained):
    transformers = pytest.importorskip(
        "transformers", minversion="5.24", reason="needs pip install transformers"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [line for some in embedded(1100).values() for line in some][:20_000]
    assert len(texts) == 20_000
    own, found = trained.encode_batch(texts), theirs(texts, add_special_tokens=False)["input_ids"]
    assert sum(a.tolist() != b for a, b in zip(own, found, strict=True)) <= 2  # ties
    assert theirs.batch_decode(found) == texts
    assert theirs("To be")["input_ids"] == trained.prompt("To be").tolist()
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize("folder", ["bpe", "unigram"], indirect=True)
def test_sentencepiece_encodes_a_folder_until_one_of_its_files_is_changed(
    trained, folder, tmp_path
):
    """The fast twin must not survive an edit, such as a token that Transformers added."""
    copied = shutil.copytree(folder, tmp_path / "copied")
    by_model = tokenizers.load(str(copied / "tokenizer.model"))
    assert by_model._twin and by_model.fingerprint == trained.fingerprint
    (copied / "added_tokens.json").write_text(json.dumps({"Haus": trained.vocab_size}))
    assert tokenizers.load(str(copied)).encode("Haus").tolist() == [trained.vocab_size]
    (copied / "added_tokens.json").unlink()
    values = json.loads((copied / "tokenizer.json").read_text())
    pieces = values["model"]["vocab"]  # a dict for BPE, a list of pieces and scores for Unigram
    a, b = ("a", "b") if isinstance(pieces, dict) else (trained.encode(c).item() for c in "ab")
    pieces[a], pieces[b] = pieces[b], pieces[a]
    (copied / "tokenizer.json").write_text(json.dumps(values))
    assert tokenizers.load(str(copied)).encode("a").tolist() == trained.encode("b").tolist()
    (copied / "tokenizer.json").unlink()
    left = tokenizers.load(str(copied))
    assert left.encode("Ein Haus").tolist() == trained.encode("Ein Haus").tolist()


def pieces(model_file):
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_file)
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_long_pieces_of_a_script_are_left_out_and_the_vocabulary_is_as_large(kind, lines):
    texts, size = [*lines["ja"], *lines["en-us"]], 900
    caps = {"CJK": 2, "KATAKANA": 3, "HIRAGANA": 3, "LATIN": 5}

    def pieces(caps):
        content = tokenizer_training.sentencepiece_model(texts, kind, size, caps)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        return [processor.id_to_piece(i) for i in range(processor.vocab_size())]

    def longest(pieces, first, last):
        of_script = [
            p.replace("▁", "") for p in pieces if any(first <= c <= last for c in p) and p[0] != "<"
        ]
        return max(map(len, of_script))

    free, capped = pieces({}), pieces(caps)
    assert longest(free, "一", "鿿") > 2 and longest(free, "ァ", "ヺ") > 3
    assert longest(capped, "一", "鿿") == 2 and longest(capped, "ァ", "ヺ") == 3
    assert longest(capped, "b", "z") == 5 < longest(free, "b", "z")
    assert len(capped) == len(free) == size and capped[:260] == free[:260]
    if kind == "bpe":  # no other piece is lost by it
        kept = {p for p in free if not tokenizer_training._is_too_long(p, caps)}
        assert kept < set(capped)


def test_too_few_pieces_within_the_lengths_are_refused_with_their_number():
    texts = [f"国際連合教育科学文化機関{i} international" for i in range(300)]
    with pytest.raises(ValueError, match=r"only \d+ pieces are within .* set it to \d+ or less"):
        tokenizer_training.sentencepiece_model(texts, "unigram", 308, {"CJK": 1})


@pytest.mark.parametrize(
    ("kind", "texts", "vocab_size", "message"),
    [
        ("bpe", ["to be or not"], 5000, r"vocab_size=5000 .* too high .* value <= \d+"),
        (
            "bpe",
            [chr(n) for n in range(200, 240)],
            270,
            r"270 .* 270 vs \d+\. Increase vocab_size$",
        ),
        ("bpe", ["to be"], 260, "vocab_size=260 is less than 261, the least for bpe"),
        ("unigram", ["to be"], 261, "vocab_size=261 is less than 288, the least for unigram"),
        ("byte_bpe", ["to be"], -1, "vocab_size=-1 is less than 259, the least for byte_bpe"),
        ("byte_bpe", ["to be to be"], 900, r"it gives only 26\d pieces; set it to 26\d or less"),
        ("bpe", [], 300, "no usable lines"),
        ("unigram", ["\n\n"], 300, "no usable lines"),
    ],
)
def test_a_vocabulary_the_text_does_not_allow_is_refused_and_leaves_no_file(
    kind, texts, vocab_size, message, tmp_path
):
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_training.train(texts, tmp_path, kind=kind, vocab_size=vocab_size)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", VOCAB_SIZES)
def test_a_mistake_in_the_text_is_reported_as_it_is(kind, tmp_path):
    def texts():
        yield "to be"
        raise ValueError("a.jsonl:2 is bad")

    with pytest.raises(ValueError, match=r"^a\.jsonl:2 is bad$"):
        tokenizer_training.train(texts(), tmp_path, kind=kind, vocab_size=300)


def test_lines_longer_than_the_trainer_takes_are_trained_on_all_the_same(tmp_path):
    text = "0 " * 5000 + "Das Haus ist klein. " * 2000
    path = tmp_path / "long.model"
    path.write_bytes(tokenizer_training.sentencepiece_model([text], "bpe", 280))
    assert len(tokenizers.load(str(path)).encode("Haus")) < 4


COUNTS = {"en": 900, "de": 100, "ja": 0}


@pytest.mark.parametrize(
    ("total", "alpha", "named", "expected"),
    [
        (0, 1.0, {}, {"en": 900, "de": 100, "ja": 0}),  # all
        (100, 1.0, {}, {"en": 90, "de": 10, "ja": 0}),  # in proportion
        (100, 0.5, {}, {"en": 75, "de": 25, "ja": 0}),  # 30 : 10
        (100, 0.0, {}, {"en": 50, "de": 50, "ja": 0}),
        (500, 0.0, {}, {"en": 250, "de": 100, "ja": 0}),  # German has no more
        (0, 1.0, {"de": 50}, {"en": 0, "de": 50, "ja": 0}),
        (0, 1.0, {"de": 500, "en": 9}, {"en": 9, "de": 100, "ja": 0}),
    ],
)
def test_quotas_are_those_worked_by_hand(total, alpha, named, expected):
    assert text_sampling.quotas(COUNTS, total, alpha, named) == pytest.approx(expected)


def test_a_named_label_that_no_text_has_is_refused():
    with pytest.raises(ValueError, match="no text is labelled 'fr'; there are: de, en, ja"):
        text_sampling.quotas(COUNTS, 0, 1.0, {"de": 1, "fr": 1})


def test_a_sample_has_about_its_quota_and_does_not_depend_on_the_order():
    documents = [Document(f"{i:010}", ("en", "de")[i % 4 == 0]) for i in range(8000)]
    characters, wanted = {"en": 60_000, "de": 20_000}, {"en": 15_000.0, "de": 20_000.0}
    chosen = list(text_sampling.sample(documents, characters, wanted))
    again = list(text_sampling.sample(documents[::-1], characters, wanted))
    assert chosen == again[::-1]
    taken = {label: sum(d.label == label for d in chosen) for label in wanted}
    assert taken["de"] == 2000 and abs(taken["en"] - 1500) < 5 * (6000 * 0.25 * 0.75) ** 0.5


def nfkc(tmp_path):
    """A SentencePiece model as of T5: NFKC, no doubled spaces, no bytes for unknown characters."""
    path = tmp_path / "nfkc.model"
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["A fine line, file by file"] * 9),
            model_writer=model,
            vocab_size=24,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def lower_case(tmp_path):
    made = library.Tokenizer(
        library.models.BPE({letter: i for i, letter in enumerate("<>afilne 1⁄2")}, [])
    )
    made.normalizer = library.normalizers.Sequence(
        [library.normalizers.NFKC(), library.normalizers.Lowercase()]
    )
    made.add_special_tokens(["<s>", "</s>"])
    made.decoder = library.decoders.Fuse()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        (nfkc, "Ａ  ﬁle", "A file"),  # 10 bytes become 6
        (nfkc, "A 漢file", "A file"),  # a character without a piece
        (lower_case, "Ａ ﬁLE", "a file"),
        (lower_case, "A ½", "A ½"),  # 4 bytes, which NFKC makes 7
    ],
)
def test_bits_per_byte_count_the_bytes_that_a_normalising_tokenizer_encodes(
    make, text, expected, tmp_path
):
    tokenizer = tokenizers.load(str(make(tmp_path)))
    assert not tokenizer.is_exact
    assert tokenizers.encoded_text(tokenizer, text, tokenizer.encode(text)) == expected


def test_a_prepared_corpus_has_the_bytes_that_are_encoded(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Ａ  ﬁle"}) + "\n")
    source, options = str(tmp_path / "a.jsonl"), {"validation_fraction": 0.0}
    for tokenizer, num_bytes in ((str(nfkc(tmp_path)), 6), ("bytes", 10)):
        own = tokenizers.load(tokenizer)
        found = prepare.open_corpus(source, "train", own, cache=tmp_path / "cache", **options)
        assert found.bytes_per_label == (num_bytes,) and sum(found.byte_counts) == num_bytes


def test_exact_tokenizers_count_the_text_itself(trained):
    for tokenizer in (trained, tokenizers.load("bytes")):
        for text in AWKWARD:
            assert tokenizers.encoded_text(tokenizer, text, tokenizer.encode(text)) is text
