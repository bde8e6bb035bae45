"""Tokenizers: raw bytes, a SentencePiece model, or a Hugging Face tokenizer.json."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np
import sentencepiece
import tokenizers

from moe_jax import files

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes it for a space
# (begin, end) tokens to look for where a tokenizer.json has no tokenizer_config.json to name them.
USUAL = [("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), ("<|endoftext|>",) * 2]
LINE_CHARACTERS = 4096  # longer lines are trained on in pieces


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Byte b is id b + 3; exact for every text."""

    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    vocab_size: int = 259
    fingerprint: str = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3

    def prompt(self, text: str) -> np.ndarray:
        """The ids that a model is given to continue."""
        return np.array([self.bos_id, *self.encode(text)], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        ids = np.asarray(ids)
        return bytes((ids[ids >= 3] - 3).astype(np.uint8)).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model, read from `path`."""

    def __init__(self, path: str):
        self._processor = sentencepiece.SentencePieceProcessor(model_file=path)
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.vocab_size: int = self._processor.vocab_size()
        self.fingerprint = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        # SPACE itself is encoded as bytes, or it would be decoded to a space.
        first, *others = map(self._processor.encode, text.split(SPACE))
        mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return np.array(first + [i for ids in others for i in (*mark, *ids)], np.int32)

    def prompt(self, text: str) -> np.ndarray:
        return np.array([self.bos_id, *self.encode(text)], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        special = (self.pad_id, self.bos_id, self.eos_id)
        return self._processor.decode([int(i) for i in ids if i not in special])


class HuggingFaceTokenizer:
    """A tokenizer.json; the tokenizer_config.json beside it names what begins and ends a text."""

    def __init__(self, path: str):
        self._tokenizer = tokenizers.Tokenizer.from_file(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        special = self._special(path)
        self.pad_id, self.eos_id = special["pad_token"], special["eos_token"]
        # Where nothing begins a text, what ends one does (Qwen's); -1 if there is neither.
        self.bos_id = self.eos_id if special["bos_token"] < 0 else special["bos_token"]
        content = pathlib.Path(path).read_bytes() + str(sorted(special.items())).encode()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def _special(self, path: str) -> dict[str, int]:
        beside = pathlib.Path(path).with_name("tokenizer_config.json")
        settings = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        if "eos_token" not in settings:
            known = (pair for pair in USUAL if None not in map(self._tokenizer.token_to_id, pair))
            bos, eos = next(known, (None, None))
            settings = {**settings, "bos_token": bos, "eos_token": eos}
        ids = {}
        for name in ("bos_token", "eos_token", "pad_token"):
            token = settings.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            found = self._tokenizer.token_to_id(token) if token else -1
            if found is None:
                raise ValueError(f"{beside} names tokens that are not in {path}")
            ids[name] = found
        return ids

    def encode(self, text: str) -> np.ndarray:
        # Special tokens that are spelled out in a text are ordinary letters.
        self._tokenizer.encode_special_tokens = True
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def prompt(self, text: str) -> np.ndarray:
        """The ids, with the tokenizer's own prefix and the special tokens in the text."""
        self._tokenizer.encode_special_tokens = False
        ids = self._tokenizer.encode(text).ids
        return np.array(ids or [self.bos_id], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


Tokenizer = ByteTokenizer | SentencePieceTokenizer | HuggingFaceTokenizer


def load(name: str) -> Tokenizer:
    """The tokenizer "bytes", or that of a path: a SentencePiece model or a tokenizer.json.

    Raises: ValueError for a path that is neither.
    """
    if name == "bytes":
        return ByteTokenizer()
    if not os.path.isfile(name):
        raise ValueError(
            f"data.tokenizer={name!r} is not a file; use 'bytes', a model made by "
            "scripts/train_tokenizer.py, or a Hugging Face tokenizer.json"
        )
    is_json = name.endswith(".json")
    try:
        tokenizer = HuggingFaceTokenizer(name) if is_json else SentencePieceTokenizer(name)
    except Exception:  # the libraries raise many kinds
        kind = "tokenizer.json of Hugging Face" if is_json else "SentencePiece model"
        raise ValueError(f"data.tokenizer={name!r} is not a {kind}") from None
    if min(tokenizer.bos_id, tokenizer.eos_id) < 0:
        fix = "name them in tokenizer_config.json beside it" if is_json else "train it with both"
        raise ValueError(f"data.tokenizer={name!r} has no begin or end token; {fix}")
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, output: pathlib.Path) -> None:
    """Trains a SentencePiece BPE model whose decode(encode(text)) is text, for every text.

    Raises: ValueError when the texts do not allow `vocab_size` pieces.
    """
    if vocab_size < 261:
        raise ValueError(f"vocab_size={vocab_size} is less than 261: bytes, special ones, a space")
    # Pieces never span lines, whose ends are a piece of their own. This is a list, because the
    # trainer hides what an iterator raises.
    lines = [
        line[start : start + LINE_CHARACTERS]
        for text in texts
        for line in text.splitlines()
        for start in range(0, len(line), LINE_CHARACTERS)
    ]
    try:
        with files.whole_file(output) as unfinished, open(unfinished, "wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                byte_fallback=True,
                character_coverage=0.9995,
                split_digits=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=4 * LINE_CHARACTERS,  # in bytes; longer ones would be skipped
                minloglevel=2,
            )
    except RuntimeError as error:
        # The trainer's text begins with a line of its source, and ends with an option of its own.
        reason = str(error).splitlines()[-1].rpartition("] ")[2].partition(" or decrease ")[0]
        problem = f"cannot be trained on this text: {reason or 'it has no usable lines'}"
        raise ValueError(f"vocab_size={vocab_size} {problem}") from None
