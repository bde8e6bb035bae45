"""Text to token records: kept by what it was made of, and whole or not there."""

import json
import pathlib

import pytest

from moe_jax.data import preparation, prepare, tokenizer_training, tokenizers
from moe_jax.data.cache import cache_folder

BYTES = tokenizers.ByteTokenizer()
# Languages of unequal size; texts without a byte, shorter than a row, and longer than a record.
RECORDS = [
    {"text": f"{language} {i}: " + word * (i * i % 23), "language": language, "doc": i}
    for language, word, number in (("en", "word ", 20), ("ru", "слово ", 12), ("zh", "字", 7))
    for i in range(number)
] + [{"text": "", "language": "en", "doc": "empty"}]
RECORD_TOKENS = 50


def write(path: pathlib.Path, records=RECORDS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def open_corpus(source, cache, *, split="train", tokenizer=BYTES, fraction=0.0):
    return prepare.open_corpus(source, split, tokenizer, validation_fraction=fraction, cache=cache)


def tokens_of(corpus):
    return [corpus.tokens(i).tolist() for i in range(len(corpus.pairs))]


def test_a_second_opening_tokenizes_nothing_wherever_the_text_lies(tmp_path, monkeypatch):
    first = open_corpus(write(tmp_path / "here" / "a.jsonl"), tmp_path)

    def refuse(*arguments, **how):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(preparation, "prepare", refuse)
    again = open_corpus(write(tmp_path / "moved" / "a.jsonl"), tmp_path)
    assert again.folder == first.folder
    assert tokens_of(again) == tokens_of(first)


def test_another_text_tokenizer_split_or_fraction_is_kept_elsewhere(tmp_path):
    bpe = tmp_path / "bpe.model"
    texts = [record["text"] for record in RECORDS]
    bpe.write_bytes(tokenizer_training.sentencepiece_model(texts, "bpe", 290))
    source = write(tmp_path / "a.jsonl")
    edited = write(tmp_path / "edited" / "a.jsonl", [{**RECORDS[0], "text": "!"}, *RECORDS[1:]])
    corpora = [
        open_corpus(source, tmp_path, fraction=0.5),
        open_corpus(edited, tmp_path, fraction=0.5),
        open_corpus(source, tmp_path, fraction=0.5, tokenizer=tokenizers.load(str(bpe))),
        open_corpus(source, tmp_path, fraction=0.5, split="validation"),
        open_corpus(source, tmp_path, fraction=0.4),
    ]
    assert len({corpus.folder for corpus in corpora}) == len(corpora)


def test_equal_tokens_and_labels_have_equal_digests_whatever_the_files_are_called(tmp_path):
    named, renamed = (write(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    edited = write(tmp_path / "edited.jsonl", [*RECORDS[:-1], {"text": "!", "doc": "last"}])
    relabelled = write(tmp_path / "labels.jsonl", [{**RECORDS[0], "language": "xx"}, *RECORDS[1:]])
    joined = [{"text": "ab"}, {"text": "c"}], [{"text": "a"}, {"text": "bc"}]
    texts = [
        named,
        renamed,
        edited,
        relabelled,
        *(write(tmp_path / f"{i}.jsonl", j) for i, j in enumerate(joined)),
    ]
    first, second, *others = (open_corpus(text, tmp_path).digest for text in texts)
    assert first == second
    assert len({first, *others}) == 1 + len(others)


class Interrupting(tokenizers.ByteTokenizer):
    def encode(self, text):
        if "9" in text:
            raise KeyboardInterrupt
        return super().encode(text)


def test_an_interrupted_tokenization_leaves_nothing_and_is_done_over(tmp_path):
    source = write(tmp_path / "a.jsonl")
    with pytest.raises(KeyboardInterrupt):
        open_corpus(source, tmp_path, tokenizer=Interrupting())
    assert not list((tmp_path / "tokens").iterdir())
    assert len(open_corpus(source, tmp_path).pairs) == len(RECORDS)


def test_a_document_that_cannot_be_tokenized_is_named_by_its_beginning(tmp_path):
    class Refusing(tokenizers.ByteTokenizer):
        def encode(self, text):
            if text.startswith("en 7"):
                raise RuntimeError("no unknown token")
            return super().encode(text)

    with pytest.raises(ValueError, match="a.jsonl train: 'en 7: .*cannot be tokenized .*unknown"):
        open_corpus(write(tmp_path / "a.jsonl"), tmp_path, tokenizer=Refusing())


def test_two_processes_that_tokenize_at_once_end_with_one_folder(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl")
    make = preparation.prepare

    def overtaken(*arguments, **how):
        monkeypatch.setattr(preparation, "prepare", make)
        open_corpus(source, tmp_path)
        return make(*arguments, **how)

    monkeypatch.setattr(preparation, "prepare", overtaken)
    corpus = open_corpus(source, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == [corpus.folder]
    assert len(tokens_of(corpus)) == len(RECORDS)


def test_a_split_without_documents_is_refused_and_not_kept(tmp_path):
    source = write(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="has no validation documents; set config.data"):
        open_corpus(source, tmp_path, split="validation")
    assert not list((tmp_path / "tokens").iterdir())


def test_the_cache_is_the_users_unless_a_folder_is_given(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder("") == pathlib.Path("/xdg/moe_jax")
    assert cache_folder("mine") == pathlib.Path("mine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("") == pathlib.Path.home() / ".cache" / "moe_jax"


def test_a_cache_in_a_bucket_is_refused_and_not_made_as_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cache_dir='gs://bucket/cache' must be local; set"):
        cache_folder("gs://bucket/cache")
    assert not list(tmp_path.iterdir())


def test_a_person_without_a_home_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert cache_folder("mine") == pathlib.Path("mine")
    with pytest.raises(ValueError, match="no home folder .* set config.data.cache_dir"):
        cache_folder("")


@pytest.mark.parametrize("lacking", ["room", "folder", "home"])
def test_a_cache_that_cannot_be_written_is_named_with_the_key_to_set(
    lacking, tmp_path, monkeypatch
):
    source, cache = write(tmp_path / "a.jsonl"), tmp_path
    if lacking == "room":

        def no_room(*_, **__):
            raise RuntimeError("write() failed: No space left on device")

        monkeypatch.setattr(preparation, "prepare", no_room)
    elif lacking == "home":
        cache = pathlib.Path("/proc/nope/.cache/moe_jax")
    else:
        (tmp_path / "tokens").write_text("a file in the way")
    with pytest.raises(ValueError, match=f"cache {cache} cannot be written: .*; set config"):
        open_corpus(source, cache)


def test_the_folder_can_be_read_by_others_as_the_umask_says(tmp_path):
    folder = open_corpus(write(tmp_path / "a.jsonl"), tmp_path).folder
    (tmp_path / "usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode
