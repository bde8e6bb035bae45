"""Text to ids and back: raw bytes, a SentencePiece model, or a Hugging Face tokenizer.json."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np
import sentencepiece
import tokenizers

from moe_jax import files

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
# (begin, end) of a tokenizer.json that has no tokenizer_config.json to say them.
USUAL = (
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<|endoftext|>", "<|endoftext|>"),
)
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
        """What a model is given to go on from."""
        return np.array([self.bos_id, *self.encode(text)], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        ids = np.asarray(ids)
        return bytes((ids[ids >= 3] - 3).astype(np.uint8)).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    path: str

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_file=self.path)

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(pathlib.Path(self.path).read_bytes()).hexdigest()

    @property
    def pad_id(self) -> int:
        return self._processor.pad_id()

    @property
    def bos_id(self) -> int:
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def encode(self, text: str) -> np.ndarray:
        # SPACE itself goes as its bytes, or it would come back as a space.
        first, *others = map(self._processor.encode, text.split(SPACE))
        mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return np.array(first + [i for ids in others for i in (*mark, *ids)], np.int32)

    def prompt(self, text: str) -> np.ndarray:
        return np.array([self.bos_id, *self.encode(text)], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        special = (self.pad_id, self.bos_id, self.eos_id)
        return self._processor.decode([int(i) for i in ids if i not in special])


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer.json; what begins and ends a text is said by the tokenizer_config.json beside."""

    path: str

    @functools.cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_file(self.path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        content = pathlib.Path(self.path).read_bytes() + str(sorted(self._special.items())).encode()
        return hashlib.sha256(content).hexdigest()

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        beside = pathlib.Path(self.path).with_name("tokenizer_config.json")
        settings = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        if "eos_token" not in settings:
            known = (pair for pair in USUAL if None not in map(self._tokenizer.token_to_id, pair))
            bos, eos = next(known, (None, None))
            settings = {**settings, "bos_token": bos, "eos_token": eos}
        ids = {}
        for name in ("bos_token", "eos_token", "pad_token"):
            token = settings.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            ids[name] = self._tokenizer.token_to_id(token) if token else -1
        if None in ids.values():
            raise ValueError(f"{beside} names tokens that are not in {self.path}")
        return ids

    @property
    def pad_id(self) -> int:
        return self._special["pad_token"]

    @property
    def bos_id(self) -> int:
        """What ends a text, where nothing begins one (Qwen's); -1 if there is neither."""
        bos = self._special["bos_token"]
        return self._special["eos_token"] if bos < 0 else bos

    @property
    def eos_id(self) -> int:
        return self._special["eos_token"]

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        # Special tokens that are spelled out in a text are letters like others.
        self._tokenizer.encode_special_tokens = True
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def prompt(self, text: str) -> np.ndarray:
        """With what the tokenizer itself puts before a text, and the special tokens in it."""
        self._tokenizer.encode_special_tokens = False
        ids = self._tokenizer.encode(text).ids
        return np.array(ids or [self.bos_id], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


Tokenizer = ByteTokenizer | SentencePieceTokenizer | HuggingFaceTokenizer


def load(name: str) -> Tokenizer:
    """ "bytes", or the path of a SentencePiece model or of a tokenizer.json.

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
    tokenizer = HuggingFaceTokenizer(name) if is_json else SentencePieceTokenizer(name)
    try:
        ids = (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    except Exception:  # of whatever kind the libraries raise
        kind = "tokenizer.json of Hugging Face" if is_json else "SentencePiece model"
        raise ValueError(f"data.tokenizer={name!r} is not a {kind}") from None
    if min(ids[1:]) < 0:
        fix = "name them in tokenizer_config.json beside it" if is_json else "train it with both"
        raise ValueError(f"data.tokenizer={name!r} has no begin or end token; {fix}")
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, output: pathlib.Path) -> None:
    """Trains a SentencePiece BPE model whose decode(encode(text)) is text, for every text.

    Raises: ValueError when the texts do not allow `vocab_size` pieces.
    """
    if vocab_size < 261:
        raise ValueError(f"vocab_size={vocab_size} is less than 261: bytes, special ones, a space")
    # By line: pieces never span lines, whose ends are a piece of their own. A list, because the
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
        # Less the place in its source, the condition that did not hold, and an option of its own.
        reason = str(error).splitlines()[-1].rpartition("] ")[2].partition(" or decrease ")[0]
        reason = reason or "it has no usable lines"
        raise ValueError(
            f"vocab_size={vocab_size} cannot be trained on this text: {reason}"
        ) from None
