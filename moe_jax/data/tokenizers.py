"""Tokenizers: raw bytes, a SentencePiece model, or a Hugging Face tokenizer.json."""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import models, processors

from moe_jax import strict_json
from moe_jax.data import (
    sentencepiece_folder,
    tiktoken_files,
    tokenizer_files,
    tokenizer_limits,
    tokenizer_writing,
)
from moe_jax.data.sentencepiece_folder import SPACE
from moe_jax.data.tokenizer_files import LLAMA, Settings

# (begin, end) tokens to look for if no file names an end token, or a file says that there is none.
USUAL = [("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), ("<|endoftext|>",) * 2]
# Words that clean_up_tokenization_spaces joins to the word before, in Transformers' order.
MARKS = " .| ?| !| ,| ' | n't| 'm| 's| 've| 're".split("|")
# Characters that tokenizers replace or drop.
PROBE = "  Two  spaces,\ta TAB\n\nÉ e\u0301 \ufb01 Ⅳ ½ Ｆ 漢字 🙂 it 's . "

# How a chat template spells the begin and end tokens of a tokenizer that has no words for them.
BEGIN, END = "<s>", "</s>"

Located = tuple[np.ndarray, np.ndarray]  # ids [N], and the characters [start, stop) of each [N, 2]


def _located(text: str, special: dict[str, int], of_part: Callable[[str], Located]) -> Located:
    """The ids of a text, with special tokens recognised, and their places."""
    ids, offsets, at = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int64)], 0
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        end = at + len(part)
        found = ([special[part]], [[at, end]]) if part in special else of_part(part)
        ids.append(np.asarray(found[0], np.int32))
        offsets.append(np.asarray(found[1]) + (0 if part in special else at))
        at = end
    return np.concatenate(ids), np.concatenate(offsets)


def _keeps_text(tokenizer: "SentencePieceTokenizer | HuggingFaceTokenizer") -> bool:
    """True if the tokenizer replaces and drops nothing of `PROBE`."""
    return tokenizer.known(tokenizer.encode(PROBE)) == PROBE


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Byte b has id b + 3, so every text decodes exactly."""

    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    end_ids: tuple[int, ...] = (2,)
    vocab_size: int = 259
    fingerprint: str = "bytes"
    is_exact: bool = True

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3

    @property
    def special_tokens(self) -> dict[str, int]:
        return {BEGIN: self.bos_id, END: self.eos_id}

    def with_offsets(self, text: str) -> Located:
        return _located(text, self.special_tokens, self._of_part)

    def _of_part(self, text: str) -> Located:
        widths = [len(character.encode()) for character in text]
        starts_N = np.repeat(np.arange(len(text)), widths)
        return self.encode(text), np.stack([starts_N, starts_N + 1], axis=1)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text; the other tokenizers use all cores for it."""
        return list(map(self.encode, texts))

    def prompt(self, text: str) -> np.ndarray:
        """The ids of a prompt, for a model to continue."""
        return np.array([self.bos_id, *self.encode(text)], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        ids = np.asarray(ids)
        return bytes((ids[(ids >= 3) & (ids < self.vocab_size)] - 3).astype(np.uint8)).decode(
            errors="replace"
        )


class SentencePieceTokenizer:
    """A SentencePiece model, read from `path`."""

    is_exact = functools.cached_property(_keeps_text)

    def __init__(self, path: str):
        self._processor = sentencepiece.SentencePieceProcessor(model_file=path)
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.end_ids = (self.eos_id,)
        self.vocab_size: int = self._processor.vocab_size()
        self.fingerprint = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return self._joined(map(self._processor.encode, text.split(SPACE)))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, by threads on all cores."""
        parts = [text.split(SPACE) for text in texts]
        flat = [part for of_text in parts for part in of_text]
        ids = iter(self._processor.encode(flat, num_threads=-1))
        return [self._joined(itertools.islice(ids, len(of_text))) for of_text in parts]

    def _joined(self, parts: Iterable[list[int]]) -> np.ndarray:
        """The ids of a text from those of its parts, between which is SPACE.

        SPACE itself is encoded as bytes; otherwise it would decode to a space.
        """
        first, *others = parts
        mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return np.array(first + [i for ids in others for i in (*mark, *ids)], np.int32)

    @property
    def special_tokens(self) -> dict[str, int]:
        return {BEGIN: self.bos_id, END: self.eos_id}

    def with_offsets(self, text: str) -> Located:
        return _located(text, self.special_tokens, self._of_part)

    def _of_part(self, text: str) -> Located:
        found = self._processor.encode(text, out_type="offset_mapping")
        return np.array(found["ids"], np.int32), np.array(found["offsets"], int).reshape(-1, 2)

    def prompt(self, text: str) -> np.ndarray:
        return np.array([self.bos_id, *self.encode(text)], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        special = (self.pad_id, self.bos_id, self.eos_id)
        pieces = [int(i) for i in ids if i not in special and i < self.vocab_size]
        return self._processor.decode(pieces)

    def known(self, ids: np.ndarray) -> str:
        """The text of the ids, without what has no piece."""
        return self.decode(ids[ids != self._processor.unk_id()])


class HuggingFaceTokenizer:
    """The tokenizer.json or tokenizer.model of a Hugging Face folder, with the files next to it.

    Ids and decoded text equal those of Transformers 5: tests/data/test_tokenizer_folders.py.
    """

    is_exact = functools.cached_property(_keeps_text)

    def __init__(
        self,
        path: str,
        folder: tokenizer_files.Folder,
        twin: SentencePieceTokenizer | None = None,
    ):
        """`twin` encodes text to the same ids and is faster, but finds no added tokens in it."""
        self._named = f"data.tokenizer={path!r}: "
        content = pathlib.Path(path).read_bytes()
        if path.endswith(".json"):
            text = content.decode("utf-8-sig")  # some editors write a BOM
            values = strict_json.parse(text)
            if isinstance(values, dict):
                tokenizer_limits.check_json(values)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            steps = f"{self._tokenizer.pre_tokenizer} {self._tokenizer.decoder}"
            found = tokenizer_files.settings(folder, byte_level="ByteLevel" in steps)
            if found.class_name == LLAMA and isinstance(self._tokenizer.model, models.BPE):
                sentencepiece_folder.make_llama(self._tokenizer, found)
        else:
            found = tokenizer_files.settings(folder, byte_level=False)
            self._tokenizer, found = sentencepiece_folder.read(content, found)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        largest = tokenizer_files.add_tokens(self._tokenizer, found)
        if not path.endswith(".json"):
            self._tokenizer.post_processor = self._template(found)
        self._splits_special = found.values.get("split_special_tokens") is True
        is_bpe = isinstance(self._tokenizer.model, models.BPE)  # BPE keeps the text's spaces
        self._joins_marks = found.values.get("clean_up_tokenization_spaces") is True and not is_bpe
        ends = tokenizer_files.ends(folder)
        ids = self._ids(found, folder.read("config.json"), ends, largest)
        self.pad_id, self.eos_id = ids.get("pad_token", -1), ids.get("eos_token", -1)
        # Without a begin token, the end token begins a text (as in Qwen); -1 if there is neither.
        self.bos_id = ids.get("bos_token", self.eos_id)
        self.end_ids = ends or (self.eos_id,)
        # A token that a file only names, such as a pad token, never occurs in encoded text.
        self.vocab_size = max(largest, self.bos_id, self.eos_id) + 1
        tokenizer_limits.check_ids([self.vocab_size - 1])
        in_order = sorted(self._tokenizer.get_added_tokens_decoder().items())
        added = [(i, tokenizer_files.properties(token)) for i, token in in_order]
        self._twin = twin if all(token.special for _, token in in_order) else None
        steps = f"{self._tokenizer.normalizer} {self._tokenizer.pre_tokenizer}"
        named = str((sorted(ids.items()), added, steps)).encode()
        self.fingerprint = hashlib.sha256(content + named).hexdigest()

    def _template(self, found: Settings) -> processors.PostProcessor:
        """Adds begin and end tokens for a tokenizer.model; a tokenizer.json has its own rule."""

        def around(role: str) -> list[str]:
            wanted = found.values.get(f"add_{role}") and role in found.roles
            return [found.roles[role].content] if wanted else []

        begin, end = around("bos_token"), around("eos_token")
        ids = [(name, self._tokenizer.token_to_id(name)) for name in begin + end]
        return processors.TemplateProcessing([*begin, "$A", *end], special_tokens=ids)

    def _ids(
        self, found: Settings, config: dict[str, Any], ends: tuple[int, ...], largest: int
    ) -> dict[str, int]:
        """The ids of tokens with a role: named by a file, given by config.json, or usual ones."""

        def id_of(name: str) -> int:
            found = self._tokenizer.token_to_id(name)
            return -1 if found is None else found

        every = {role: id_of(token.content) for role, token in found.roles.items()}
        ids = {role: i for role, i in every.items() if role in found.values or i <= largest}
        begin = config.get("bos_token_id")
        if "bos_token" not in {*ids, *found.values} and type(begin) is int:
            ids["bos_token"] = begin
        if "eos_token" not in ids and ends:
            ids["eos_token"] = ends[0]
        elif "eos_token" not in ids:
            pairs = [(id_of(begin), id_of(end)) for begin, end in USUAL]
            for begin, end in [pair for pair in pairs if min(pair) >= 0][:1]:
                ids = {"bos_token": begin} | ids | {"eos_token": end}
        return ids

    def encode(self, text: str) -> np.ndarray:
        if self._twin:
            return self._twin.encode(text)
        # Special tokens that appear literally in training text are encoded as ordinary text.
        self._tokenizer.encode_special_tokens = True
        with tokenizer_limits.without_panics(self._named):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.int32)

    @property
    def special_tokens(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: i for i, token in added if token.special}

    def with_offsets(self, text: str) -> Located:
        self._tokenizer.encode_special_tokens = self._splits_special
        with tokenizer_limits.without_panics(self._named):
            found = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int32), np.array(found.offsets, np.int64).reshape(-1, 2)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, by threads on all cores."""
        if self._twin:
            return self._twin.encode_batch(texts)
        self._tokenizer.encode_special_tokens = True
        with tokenizer_limits.without_panics(self._named):
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def prompt(self, text: str) -> np.ndarray:
        """The ids of a prompt, with the tokenizer's prefix, and with special tokens recognised."""
        self._tokenizer.encode_special_tokens = self._splits_special
        with tokenizer_limits.without_panics(self._named):
            ids = self._tokenizer.encode(text).ids
        return np.array(ids or [self.bos_id], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        text = self.known(ids)
        for mark in MARKS if self._joins_marks else ():
            text = text.replace(mark, mark.strip())
        return text

    def known(self, ids: np.ndarray) -> str:
        """The text of the ids, without what has no piece."""
        with tokenizer_limits.without_panics(self._named):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


Tokenizer = ByteTokenizer | SentencePieceTokenizer | HuggingFaceTokenizer


def encoded_text(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> str:
    """The text whose bytes count for bits per byte: the text itself, unless the tokenizer
    normalises (NFKC, lower case, white space) or has no piece for some character.

    Such a tokenizer's model is not asked for what is lost, so the text is then what the ids decode
    to, without unknown characters, if that has fewer bytes.
    """
    if isinstance(tokenizer, ByteTokenizer) or tokenizer.is_exact:
        return text
    return min(text, tokenizer.known(ids), key=lambda one: len(one.encode()))


def load(name: str) -> Tokenizer:
    """The tokenizer "bytes", or the SentencePiece model or tokenizer.json at a path or in a folder.

    If the path is in a Hugging Face folder, the folder's other tokenizer files are read too.

    Raises: ValueError for a path that is neither.
    """
    if name == "bytes":
        return ByteTokenizer()
    name = tokenizer_files.file_of(name)
    if not os.path.isfile(name):
        raise ValueError(
            f"data.tokenizer={name!r} is not a file; use 'bytes', a folder made by "
            "scripts/train_tokenizer.py, or a Hugging Face tokenizer.json"
        )
    if tiktoken_files.is_one(pathlib.Path(name)):
        convert = f"--tiktoken={shlex.quote(name)} --pattern=PATTERN --output=FOLDER"
        raise ValueError(
            f"data.tokenizer={name!r} is a vocabulary of tiktoken, which lacks the pattern of its "
            f"words; convert it by scripts/train_tokenizer.py {convert}"
        )
    is_json, folder = name.endswith(".json"), tokenizer_files.Folder(pathlib.Path(name).parent)
    of_folder = is_json or tokenizer_files.are_beside(folder)
    if (size := os.path.getsize(name)) > strict_json.MAX_BYTES:
        raise ValueError(
            f"data.tokenizer={name!r} has {size:,} bytes, more than {strict_json.MAX_BYTES:,}"
        )
    is_usual = os.path.basename(name) in tokenizer_files.FILES
    is_pair = is_usual and tokenizer_writing.has_pair(folder)
    try:
        tokenizer: Tokenizer
        with tokenizer_limits.without_panics():
            if is_pair:
                json, model = (str(folder.path / file) for file in tokenizer_files.FILES)
                sentencepiece_folder.parsed(pathlib.Path(model).read_bytes())
                tokenizer = HuggingFaceTokenizer(json, folder, SentencePieceTokenizer(model))
            elif of_folder:
                tokenizer = HuggingFaceTokenizer(name, folder)
            else:
                sentencepiece_folder.parsed(pathlib.Path(name).read_bytes())
                tokenizer = SentencePieceTokenizer(name)
    except tokenizer_files.DamagedError:
        raise
    except Exception as error:  # the libraries raise many types
        kind = "tokenizer.json of Hugging Face" if is_json else "SentencePiece model"
        kind += " that fits the files beside it" if of_folder else ""
        raise ValueError(f"data.tokenizer={name!r} is not a {kind}: {error}") from error
    if min(tokenizer.bos_id, tokenizer.eos_id) < 0:
        fix = "name them in tokenizer_config.json beside it" if of_folder else "train it with both"
        raise ValueError(f"data.tokenizer={name!r} has no begin or end token; {fix}")
    return tokenizer
