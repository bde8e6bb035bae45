"""Trains tokenizers for which decode(encode(text)) == text, for every text."""

import io
import pathlib
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, trainers

from moe_jax.data import sentencepiece_folder, tiktoken_files, tokenizer_writing
from moe_jax.data.sentencepiece_folder import SPACE

BEGIN, END, PAD = "<s>", "</s>", "<pad>"
LINE_CHARACTERS = 4096  # SentencePiece's trainer gets longer lines in pieces
MOST_TRIES = 4
# LLM-jp's tokenizers have Japanese pieces of at most 8 characters (llm-jp/llm-jp-tokenizer).
MOST_CHARACTERS = {"CJK": 8, "HIRAGANA": 8, "KATAKANA": 8}
# The characters of "<0x41>", "<unk>" and their like: as pieces of their own they are the better way
# to cut such a text than the piece of that name, which a tokenizer.json of Unigram finds too.
NAMES = "</0123456789ABCDEFadeknpsux>"
# Bytes, special tokens, and at least one character.
LEAST = {"bpe": 261, "unigram": 260 + len(NAMES), "byte_bpe": 259}


def train(
    texts: Iterable[str],
    folder: pathlib.Path,
    *,
    kind: str,
    vocab_size: int,
    most_characters: Mapping[str, int] = MOST_CHARACTERS,
) -> None:
    """Writes a trained tokenizer to an existing folder, as `tokenizer_writing.write` does.

    Args:
      texts: all of them are held in memory.
      kind: "bpe" or "unigram" of SentencePiece, with bytes for characters without a piece, or
        "byte_bpe", whose pieces are of bytes.
      most_characters: script -> the most characters of a piece with a letter of it, by the first
        word of the letter's Unicode name; not for "byte_bpe".

    Raises: ValueError, in one line, if the texts do not allow `vocab_size` pieces.
    """
    if kind == "byte_bpe":
        made, model_file = _byte_bpe(texts, vocab_size), None
    else:
        model_file = sentencepiece_model(texts, kind, vocab_size, most_characters)
        made = sentencepiece_folder.exported(model_file)
    tokenizer_writing.write(folder, made, begin=BEGIN, end=END, pad=PAD, model_file=model_file)


def _lines(texts: Iterable[str]) -> list[str]:
    """The texts' lines; pieces never span lines, and line ends are pieces of their own.

    This is a list because the trainer hides exceptions raised by an iterator.
    """
    return [
        line[start : start + LINE_CHARACTERS]
        for text in texts
        for line in text.splitlines()
        for start in range(0, len(line), LINE_CHARACTERS)
    ]


def sentencepiece_model(
    texts: Iterable[str],
    kind: str,
    vocab_size: int,
    most_characters: Mapping[str, int] = MOST_CHARACTERS,
) -> bytes:
    """The file of a SentencePiece model; the arguments are those of `train`.

    SentencePiece has one limit for all scripts, so the pieces are left out afterwards, from a model
    that has as many more. A merge of BPE that needs a piece makes a longer one of the same script,
    so no other piece is lost by it.
    """
    check_size(vocab_size, kind)
    lines, more = _lines(texts), 0
    kept: list[Any] = []
    for _ in range(MOST_TRIES):
        try:
            proto = sentencepiece_folder.parsed(_model(lines, kind, vocab_size + more))
        except ValueError:
            if not kept:
                raise
            break  # the texts do not allow more
        kept = [
            piece
            for piece in proto.pieces
            if piece.type != piece.NORMAL or not _is_too_long(piece.piece, most_characters)
        ]
        if len(kept) >= vocab_size:
            break
        more = 2 * (len(proto.pieces) - len(kept))
    if (size := len(kept)) < vocab_size:
        limit = f"only {size} pieces are within the lengths of their scripts"
        raise _refusal(vocab_size, f"{limit}; set it to {size} or less, or raise these lengths")
    of_letters = [p for p in kept if p.type == p.NORMAL and len(p.piece) > 1]
    worst = sorted(of_letters, key=lambda p: p.score)[: len(kept) - vocab_size]
    left_out = {piece.piece for piece in worst}
    kept = [type(piece).FromString(piece.SerializeToString()) for piece in kept]
    del proto.pieces[:]
    proto.pieces.extend(piece for piece in kept if piece.piece not in left_out)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def _is_too_long(piece: str, most_characters: Mapping[str, int]) -> bool:
    text = piece.replace(SPACE, "")
    scripts = {unicodedata.name(letter, "?").split()[0] for letter in text}
    return len(text) > min((most_characters.get(s, len(text)) for s in scripts), default=len(text))


def _model(lines: list[str], kind: str, vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            byte_fallback=True,
            character_coverage=0.9995,
            required_chars=NAMES if kind == "unigram" else "",
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * LINE_CHARACTERS,  # bytes; longer lines would be skipped
            # A terminal shows the trainer's steps.
            minloglevel=0 if sys.stderr is not None and sys.stderr.isatty() else 2,
        )
    except RuntimeError as error:
        # The trainer's message begins with its source line and ends with advice on its own option.
        reason = str(error).splitlines()[-1].rpartition("] ")[2].partition(" or decrease ")[0]
        raise _refusal(vocab_size, reason or "it has no usable lines") from None
    return model.getvalue()


def _byte_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """BPE of bytes (Radford et al., 2019) in words as in Qwen: each digit is a word."""
    check_size(vocab_size, "byte_bpe")
    made = tokenizers.Tokenizer(models.BPE())
    tiktoken_files.cut_into_words(made, tiktoken_files.ONE_DIGIT)
    special = [AddedToken(name, special=True, normalized=False) for name in (PAD, BEGIN, END)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr is not None and sys.stderr.isatty(),
    )
    # A list, so that an error in the texts is raised as it is.
    made.train_from_iterator(list(texts), trainer)
    if (size := made.get_vocab_size()) < vocab_size:
        raise _refusal(vocab_size, f"it gives only {size} pieces; set it to {size} or less")
    return made


def check_size(vocab_size: int, kind: str) -> None:
    """Raises ValueError for a vocabulary that no text allows."""
    if vocab_size < (least := LEAST[kind]):
        raise ValueError(f"vocab_size={vocab_size} is less than {least}, the least for {kind}")


def _refusal(vocab_size: int, reason: str) -> ValueError:
    return ValueError(f"vocab_size={vocab_size} cannot be trained on this text: {reason}")
