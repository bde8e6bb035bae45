"""Converts vocabularies of tiktoken, a token in base64 and its rank in each line.

Such a file has neither the pattern that cuts a text into words nor the special tokens: they are
part of a program. `FAMILIES` has those of published vocabularies.
"""

import base64
import binascii
import dataclasses
import pathlib
import re

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from moe_jax.data import tokenizer_limits

# A word of each pattern is letters, digits, marks or white space; they differ in contractions, in
# how many digits make a word, and in marks and line ends.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = "|".join(
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]{upper}[{_LOWER}]{lower}{_CONTRACTIONS}?"
    for upper, lower in ("*+", "+*")
)
ONE_DIGIT = rf"{_LETTERS}|\p{{N}}|{_REST}"
END = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Family:
    """What a program adds to its vocabulary file of `size` tokens.

    pattern: the regular expression that cuts a text into words.
    special: special tokens and their ids.
    begin, end: the tokens around a text.
    """

    size: int
    pattern: str
    special: dict[str, int]
    begin: str = END
    end: str = END


def _llama3() -> dict[str, int]:
    names = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id"}
    names |= {6: "start_header_id", 7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = iter(range(256))
    every = (names.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256))
    return {f"<|{name}|>": 128_000 + i for i, name in enumerate(every)}


# Patterns and special tokens: tiktoken_ext/openai_public.py of tiktoken 0.14, tokenizer.py of
# Llama 3.1, tokenization_qwen.py of Qwen.
FAMILIES = {
    "gpt2": Family(
        50_256,
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        {END: 50_256},
    ),
    "cl100k": Family(
        100_256,
        rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
        {
            END: 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
    "o200k": Family(
        199_998,
        _CASED + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {END: 199_999, "<|endofprompt|>": 200_018},
    ),
    "llama3": Family(
        128_000,
        rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
        _llama3(),
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "qwen": Family(
        151_643, ONE_DIGIT, {END: 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645}
    ),
}


def is_one(path: pathlib.Path) -> bool:
    """True if a file begins like a vocabulary file, whatever its name is."""
    with open(path, "rb") as file:
        return bool(re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", file.read(1000)))


def read(path: pathlib.Path, family: Family) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary file. Raises: ValueError, with the line, for a damaged file."""
    ranks = ranks_in(path)
    tokens = {token: "".join(_LETTER[byte] for byte in token) for token in ranks}
    tokenizer_limits.check_pieces(list(tokens.values()), b"")
    # tiktoken joins the pair whose joint token has the lowest rank, whichever its two parts are.
    merges = [
        (rank, ranks[token[:cut]], ranks[token[cut:]], tokens[token[:cut]], tokens[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    made = tokenizers.Tokenizer(
        models.BPE(
            {tokens[token]: rank for token, rank in ranks.items()},
            [(left, right) for *_, left, right in sorted(merges)],
            ignore_merges=True,  # a word that is a token is not cut
        )
    )
    cut_into_words(made, family.pattern)
    made.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in _special(family, len(ranks))]
    )
    return made


def _special(family: Family, size: int) -> list[str]:
    """The special tokens after `size` others; only begin and end for a vocabulary of another size.

    The library gives each the next free id, so holes need tokens of their own.
    """
    if size != family.size:
        return list(dict.fromkeys((family.begin, family.end)))
    by_id = {number: name for name, number in family.special.items()}
    return [by_id.get(i, f"<|unused_{i}|>") for i in range(size, max(by_id) + 1)]


def cut_into_words(made: tokenizers.Tokenizer, pattern: str) -> None:
    """Gives a tokenizer of bytes its first and last steps: words by a pattern, and text again."""
    words = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, as_letters])
    made.decoder = decoders.ByteLevel()


def ranks_in(path: pathlib.Path) -> dict[bytes, int]:
    """The tokens of a vocabulary file with their ranks, which are their ids."""
    pairs = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            pairs.append((base64.b64decode(token, validate=True), int(rank)))
        except (ValueError, binascii.Error):
            wrong = "is not a token in base64 and its rank, as in a .tiktoken file"
            raise ValueError(f"{path}:{number} {wrong}") from None
    ranks = dict(pairs)
    if sorted(rank for _, rank in pairs) != list(range(len(ranks))) or b"" in ranks:
        raise ValueError(f"{path} does not have each token and each rank from 0 once")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path} lacks the byte {missing[0]}")
    return ranks


def _letters() -> dict[int, str]:
    """The letter that stands for a byte in a tokenizer.json, as in GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_LETTER = _letters()
