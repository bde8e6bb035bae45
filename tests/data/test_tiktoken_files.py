"""A vocabulary of tiktoken gives tiktoken's ids, and a damaged one is refused with its line."""

import base64

import hypothesis
import pytest
import tokenizers as library
from hypothesis import strategies as st

from moe_jax.data import tiktoken_files, tokenizer_writing, tokenizers
from moe_jax.data.tiktoken_files import END, FAMILIES

TEXT = "the cat and the hat and that  cat's HAT'S 2024\n\n the\t日本語の日本 été 🙂🙂"
SAMPLE = list("aehtTHcnds'’  \n\r\t1٣日本é\u0301ʰǅ🙂.,/\u00a0") + ["the", "'ll", "'RE"]


def vocabulary():
    """Ranks learned on a text, as bytes."""
    made = library.Tokenizer(library.models.BPE())
    tiktoken_files.cut_into_words(made, FAMILIES["cl100k"].pattern)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    byte_of = {letter: byte for byte, letter in tiktoken_files._LETTER.items()}
    return {bytes(byte_of[letter] for letter in p): i for p, i in made.get_vocab().items()}


RANKS = vocabulary()


def lines_of(ranks):
    in_order = sorted(ranks.items(), key=lambda pair: pair[1])
    return [base64.b64encode(token) + b" %d" % rank for token, rank in in_order]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiktoken") / "own.tiktoken"
    path.write_bytes(b"\n".join(lines_of(RANKS)) + b"\n")
    return path


@pytest.fixture(scope="module")
def converted(path):
    return {name: tiktoken_files.read(path, family) for name, family in FAMILIES.items()}


def joined(word, ranks):
    """tiktoken's rule, slowly: a word that is a token, or else the leftmost pair of the lowest rank
    is joined until no pair is a token."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        both = [a + b for a, b in zip(parts, parts[1:], strict=False)]
        found = [(ranks[pair], i) for i, pair in enumerate(both) if pair in ranks]
        if not found:
            return [ranks[part] for part in parts]
        _, i = min(found)
        parts[i : i + 2] = [both[i]]


@hypothesis.given(st.lists(st.sampled_from(SAMPLE), max_size=12).map("".join))
@hypothesis.settings(deadline=None)
def test_ids_are_those_of_the_rule_worked_slowly(converted, text):
    for made in converted.values():
        words = made.pre_tokenizer.pre_tokenize_str(text)
        inside = [text[start:end].encode() for _, (start, end) in words]
        expected = [i for word in inside for i in joined(word, RANKS)]
        assert made.encode(text, add_special_tokens=False).ids == expected
        assert made.decode(expected) == text


def test_the_lowest_rank_is_joined_first_and_a_word_that_is_a_token_is_not_cut(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"bc": 256, b"ab": 257, b"xyz": 258}  # neither "xy" nor "yz"
    path = tmp_path / "own.tiktoken"
    path.write_bytes(b"\n".join(lines_of(ranks)))
    made = tiktoken_files.read(path, FAMILIES["gpt2"])
    assert made.encode("abc").ids == [ord("a"), 256]
    assert made.encode("xyz").ids == [258]
    assert made.encode("xyzz").ids == [ord(letter) for letter in "xyzz"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt2", "cl100k", "o200k"])
def test_ids_are_those_of_the_library_tiktoken_with_its_own_patterns(name, converted, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken", reason="needs pip install tiktoken")
    published = pytest.importorskip("tiktoken_ext.openai_public")
    for function in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):  # no network
        monkeypatch.setattr(published, function, lambda *_, **__: RANKS)
    theirs = getattr(published, {"gpt2": "gpt2"}.get(name, f"{name}_base"))()
    special, rules = theirs["special_tokens"], {"pat_str": theirs["pat_str"]}
    assert special == FAMILIES[name].special
    encoding = tiktoken.Encoding("own", mergeable_ranks=RANKS, special_tokens=special, **rules)

    @hypothesis.given(st.lists(st.sampled_from(SAMPLE), max_size=12).map("".join) | st.text())
    @hypothesis.settings(deadline=None, max_examples=1000)
    def agree(text):
        own = converted[name].encode(text, add_special_tokens=False).ids
        assert own == encoding.encode_ordinary(text)

    agree()


@pytest.mark.parametrize(
    ("name", "token", "number", "total"),
    [
        ("gpt2", END, 50_256, 50_257),
        ("cl100k", END, 100_257, 100_277),
        ("cl100k", "<|endofprompt|>", 100_276, 100_277),
        ("o200k", "<|endofprompt|>", 200_018, 200_019),
        ("llama3", "<|begin_of_text|>", 128_000, 128_256),
        ("llama3", "<|eot_id|>", 128_009, 128_256),
        ("llama3", "<|reserved_special_token_247|>", 128_255, 128_256),
        ("qwen", "<|im_end|>", 151_645, 151_646),
    ],
)
def test_special_tokens_of_a_published_vocabulary_have_their_ids(name, token, number, total):
    family = FAMILIES[name]
    tokens = tiktoken_files._special(family, family.size)
    assert tokens.index(token) + family.size == number and len(tokens) + family.size == total
    assert len(set(tokens)) == len(tokens)


def test_a_vocabulary_of_another_size_gets_its_begin_and_end_after_the_last_rank(path, tmp_path):
    for name, size in (("qwen", 1), ("llama3", 2)):
        folder = tmp_path / name
        folder.mkdir()
        family = FAMILIES[name]
        made = tiktoken_files.read(path, family)
        tokenizer_writing.write(folder, made, begin=family.begin, end=family.end)
        found = tokenizers.load(str(folder))
        assert found.vocab_size == len(RANKS) + size
        assert (found.bos_id, found.eos_id) == (len(RANKS), len(RANKS) + size - 1)
        assert found.is_exact and found.decode(found.encode(TEXT)) == TEXT
        assert found.prompt(END).tolist()[0] == found.bos_id


def test_a_file_of_tiktoken_is_not_read_without_its_pattern(path, tmp_path):
    renamed = tmp_path / "tokenizer.model"  # as Llama 3's own is named
    renamed.write_bytes(path.read_bytes())
    for file in (path, renamed):
        with pytest.raises(ValueError, match="vocabulary of tiktoken, .*--tiktoken=.*--pattern="):
            tokenizers.load(str(file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:3], b"!!! 3", *lines[4:]], r":4 is not a token in base64 and its"),
        (lambda lines: [*lines[:3], b"YQ==", *lines[4:]], r":4 is not a token in base64 and its"),
        (lambda lines: [*lines, b"YWFh x"], rf":{len(RANKS) + 1} is not a token in base64"),
        (lambda lines: lines[:-2] + lines[-1:], "does not have each token and each rank"),
        (lambda lines: [*lines, lines[0]], "does not have each token and each rank"),
        (lambda lines: lines[:200], "lacks the byte"),
        (lambda lines: [], "lacks the byte 0"),
    ],
)
def test_a_damaged_vocabulary_is_refused(change, message, tmp_path):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(b"\n".join(change(lines_of(RANKS))))
    with pytest.raises(ValueError, match=message) as error:
        tiktoken_files.read(path, FAMILIES["gpt2"])
    assert str(path) in str(error.value) and "\n" not in str(error.value)
