"""Trains a tokenizer on the training split of a text, or converts a vocabulary of tiktoken.

Examples:
  python scripts/train_tokenizer.py --output=tokenizer
  python scripts/train_tokenizer.py --source=path/to/folder --kind=unigram --output=mine
  python scripts/train_tokenizer.py --characters=20000000 --alpha=0.3 --output=balanced
  python scripts/train_tokenizer.py --characters=en=10000000,ja=15000000 --output=two
  python scripts/train_tokenizer.py --tiktoken=cl100k_base.tiktoken --pattern=cl100k --output=cl100k

The folder gets a tokenizer.json that Transformers reads with the same ids, its settings in
tokenizer_config.json and, except for byte_bpe and tiktoken, the SentencePiece model itself. Every
text can be decoded exactly. Use it by --config.data.tokenizer=FOLDER.

Held-out documents (for a path, the default share of config.data.validation_fraction) are not
trained on; characters and bytes per token are measured on the first 20 million characters of them.
The end token of a text counts.

Exit status: 0 done, 2 a mistake on the command line or in the text.
"""

import argparse
import collections
import functools
import math
import pathlib
import shlex
from collections.abc import Callable, Iterator

import tqdm

from moe_jax import command_line, config, files, untrusted
from moe_jax.data import (
    sources,
    text_sampling,
    tiktoken_files,
    tokenizer_training,
    tokenizer_writing,
    tokenizers,
)
from moe_jax.data.cache import DATASETS, cache_folder
from moe_jax.data.document import TRAIN, VALIDATION, Document

BATCH = 256  # documents that are tokenized together
MOST_MEASURED = 20_000_000  # characters of held-out text


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    text = 'the text: a path or a glob, "tfds:NAME", "hf:NAME" or "embedded"'
    add("--source", default="embedded", help=text)
    kinds = "SentencePiece BPE, SentencePiece Unigram, or BPE of bytes as in GPT-2"
    add("--kind", default="bpe", choices=tuple(tokenizer_training.LEAST), help=kinds)
    add("--vocab_size", default=4096, type=int, help="number of tokens, special ones included")
    add(
        "--characters",
        default="",
        metavar="N|LABEL=N,...",
        help="train on about N characters, or on about N of each label named, and on no other "
        "label; leave out for all text, which is held in memory",
    )
    add("--alpha", default=1.0, type=float, help="exponent of the labels' shares of --characters=N")
    longest = ",".join(f"{k}={v}" for k, v in tokenizer_training.MOST_CHARACTERS.items())
    add(
        "--max_piece_length",
        default=longest,
        metavar="SCRIPT=N,...",
        help="most characters of a piece with a letter of the script (the first word of its "
        "Unicode name), at most 16; not for byte_bpe",
    )
    multiple = "the model's vocab_size, which is printed at the end, is a multiple of this number"
    add("--vocab_multiple", default=128, type=int, help=multiple)
    converted = "a vocabulary file of tiktoken to convert, instead of training"
    add("--tiktoken", type=pathlib.Path, metavar="FILE", help=converted)
    family = "the family whose pattern splits text into words for --tiktoken"
    add("--pattern", choices=tuple(tiktoken_files.FAMILIES), help=family)
    new = "the folder to write, which must not exist yet"
    add("--output", required=True, type=command_line.folder, metavar="FOLDER", help=new)
    arguments = parser.parse_args()
    with parser.refusing(), command_line.naming("--source", "data.source"):
        tokenizer, rows = run(arguments)
    for row in rows:
        print(row)
    padded = -tokenizer.vocab_size // arguments.vocab_multiple * -arguments.vocab_multiple
    print(
        f"{arguments.output}: {tokenizer.vocab_size} tokens; use "
        f"--config.data.tokenizer={shlex.quote(str(arguments.output))} "
        f"--config.model.vocab_size={padded}"
    )


def run(arguments: argparse.Namespace) -> tuple[tokenizers.Tokenizer, list[str]]:
    """Writes the folder; returns its tokenizer and the lines of a table about held-out text.

    Raises: ValueError, OSError.
    """
    limits = _numbers("max_piece_length", arguments.max_piece_length)
    named = _numbers("characters", arguments.characters) if "=" in arguments.characters else {}
    whole = 0 if named else command_line.typed("characters", arguments.characters or "0", int)
    assert isinstance(whole, int)
    if bool(arguments.tiktoken) != bool(arguments.pattern):
        raise ValueError("--tiktoken and --pattern belong together; give both or neither")
    if arguments.tiktoken and not arguments.tiktoken.is_file():
        raise ValueError(f"--tiktoken={arguments.tiktoken} is not a file")
    if arguments.kind == "byte_bpe" and limits != tokenizer_training.MOST_CHARACTERS:
        raise ValueError("--max_piece_length does nothing with --kind=byte_bpe; leave it out")
    smallest = {"vocab_multiple": (arguments.vocab_multiple, 1), "characters": (whole, 0)}
    for name, (value, least) in (smallest | {"alpha": (arguments.alpha, 0)}).items():
        if not least <= value < math.inf:
            raise ValueError(f"--{name}={value} is not a number from {least}")
    if arguments.alpha != 1 and not whole:
        raise ValueError(f"--alpha={arguments.alpha} does nothing without --characters=N; give it")
    tokenizer_training.check_size(arguments.vocab_size, arguments.kind)
    sources.check(arguments.source)
    documents = functools.partial(_documents, arguments.source)
    with files.whole_folder(arguments.output) as unfinished:
        if arguments.tiktoken:
            family = tiktoken_files.FAMILIES[arguments.pattern]
            made = tiktoken_files.read(arguments.tiktoken, family)
            tokenizer_writing.write(unfinished, made, begin=family.begin, end=family.end)
        # Reading this first reports a mistake in the text before the long training.
        held_out = list(_first(documents(VALIDATION), MOST_MEASURED))
        if not arguments.tiktoken:
            chosen = _chosen(functools.partial(documents, TRAIN), whole, arguments.alpha, named)
            tokenizer_training.train(
                (document.text for document in chosen),
                unfinished,
                kind=arguments.kind,
                vocab_size=arguments.vocab_size,
                most_characters=limits,
            )
    tokenizer = tokenizers.load(str(arguments.output))
    return tokenizer, _table(tokenizer, held_out)


def _numbers(option: str, text: str) -> dict[str, int]:
    """The numbers of an option NAME=N,NAME=N. Raises: ValueError."""
    pairs = [part.rpartition("=") for part in text.split(",") if part]
    for name, _, number in pairs:
        if not name or not number.isdecimal() or not int(number):
            raise ValueError(f"--{option}={text}: use NAME=N,NAME=N with whole numbers from 1")
    return {name: int(number) for name, _, number in pairs}


def _chosen(
    documents: Callable[[], Iterator[Document]], total: int, alpha: float, named: dict[str, int]
) -> Iterator[Document]:
    if not total and not named:
        return documents()
    characters = collections.Counter[str]()
    for document in documents():
        characters[document.label] += len(document.text)
    quotas = text_sampling.quotas(characters, total, alpha, named)
    return text_sampling.sample(documents(), characters, quotas)


def _first(documents: Iterator[Document], characters: int) -> Iterator[Document]:
    for document in documents:
        yield document
        characters -= len(document.text)
        if characters <= 0:
            return


def _documents(source: str, split: str) -> Iterator[Document]:
    documents = sources.texts(
        *("--source", source, split),
        validation_fraction=config.default().data.validation_fraction,
        data_dir=cache_folder("") / DATASETS,
    )
    bar = {"desc": f"reading {split}", "unit": " documents", "disable": None, "delay": 5}
    return iter(tqdm.tqdm(documents, **bar))


def _table(tokenizer: tokenizers.Tokenizer, documents: list[Document]) -> list[str]:
    """Characters and bytes per token of each label and of all, with the end token of each text."""
    sums = collections.defaultdict[str, list[int]](lambda: [0, 0, 0])
    for start in range(0, len(documents), BATCH):
        some = documents[start : start + BATCH]
        ids = tokenizer.encode_batch([document.text for document in some])
        for document, own in zip(some, ids, strict=True):
            numbers = len(document.text), len(document.text.encode()), len(own) + 1
            for label in (document.label, ""):
                sums[label] = [a + b for a, b in zip(sums[label], numbers, strict=True)]
    total = sums.pop("", None)
    if not total:
        return ["no held-out text"]
    rows = [*sorted(sums.items()), ("all", total)] if len(sums) > 1 else [("all", total)]
    width = max(len("held-out"), *(len(untrusted.label(label)) for label, _ in rows))
    head = f"{'held-out':{width}}  characters/token  bytes/token  tokens"
    return [head] + [
        f"{untrusted.label(label):{width}}  {c / n:16.2f}  {b / n:11.2f}  {n:6}"
        for label, (c, b, n) in rows
    ]
