"""Converts the tokenizer.model of a Hugging Face folder to a tokenizer of the tokenizers library.

It follows Transformers 5.24 (`TokenizersBackend._convert_from_sentencepiece`); the folder's added
tokens are then handled as for any other tokenizer. The class LlamaTokenizer keeps the text as it
is; the generic class normalises it as the model file specifies.
"""

import dataclasses
import pathlib
import re
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from moe_jax.data import tokenizer_files, tokenizer_limits
from moe_jax.data.tokenizer_files import LLAMA, Settings

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's symbol for a space
# The score of a piece that a text never has, less than those of all other pieces of it together.
NEVER = -1e6
_pb2: Any = sentencepiece_model_pb2  # Any, because its classes are created at run time
_Piece = _pb2.ModelProto.SentencePiece


def parsed(model_file: bytes) -> Any:
    """The content of a model file. Raises: ValueError if it would take too much memory or time;
    an error of protobuf if it is damaged."""
    proto = _pb2.ModelProto()
    proto.ParseFromString(model_file)
    names = [piece.piece for piece in proto.pieces]
    tokenizer_limits.check_pieces(names, proto.normalizer_spec.precompiled_charsmap)
    return proto


def read(model_file: bytes, found: Settings) -> tuple[tokenizers.Tokenizer, Settings]:
    """The tokenizer, and the folder's settings completed from the model file."""
    proto = parsed(model_file)
    spec, llama = proto.trainer_spec, found.class_name == LLAMA
    own = {
        f"{role}_token": AddedToken(getattr(spec, f"{role}_piece"), special=True)
        for role in ("bos", "eos", "unk")
        if getattr(spec, f"{role}_id") >= 0 and f"{role}_token" not in found.values
    }
    kinds = (_Piece.CONTROL, _Piece.USER_DEFINED) if llama else (_Piece.CONTROL,)
    pieces = [
        AddedToken(piece.piece, special=piece.type == _Piece.CONTROL, normalized=False)
        for piece in proto.pieces
        if piece.type in kinds
    ]
    # Transformers drops the special tokens of special_tokens_map.json here, and so do we.
    found = dataclasses.replace(found, roles=own | found.roles, older_special=pieces)
    if not llama:
        return _generic(proto, found)
    names = [piece.piece for piece in proto.pieces]
    made = tokenizers.Tokenizer(_model(proto, names, None))
    make_llama(made, found)
    return made, found


def exported(model_file: bytes) -> tokenizers.Tokenizer:
    """The tokenizer.json of a model that keeps its text as it is, such as `tokenizer_training`'s.

    Its ids are the model's, except where two ways to cut a text have equal scores. A space stands
    for itself in its pieces, and SPACE for nothing, so that a SPACE in a text becomes bytes.
    """
    proto = parsed(model_file)
    unigram = proto.trainer_spec.model_type == _pb2.TrainerSpec.UNIGRAM
    for piece in proto.pieces:
        # The library finds these in a text too, unless each other way to cut it is better.
        if unigram and piece.type != _Piece.NORMAL:
            piece.score = NEVER
    names = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
    made = tokenizers.Tokenizer(_model(proto, names, proto.trainer_spec.unk_piece))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


def settings_of(path: pathlib.Path) -> dict[str, Any]:
    """The tokenizer_config.json with which Transformers encodes prompts like this model alone."""
    proto = parsed(path.read_bytes())
    rules = proto.normalizer_spec
    as_is = not (rules.precompiled_charsmap or rules.remove_extra_whitespaces)
    return {
        "tokenizer_class": LLAMA if as_is else "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": rules.add_dummy_prefix,
        "legacy": False,
        **{
            f"{role}_token": getattr(proto.trainer_spec, f"{role}_piece")
            for role in ("bos", "eos", "unk", "pad")
            if getattr(proto.trainer_spec, f"{role}_id") >= 0
        },
    }


def make_llama(made: tokenizers.Tokenizer, found: Settings) -> None:
    """Gives a tokenizer the steps of LlamaTokenizer: no normaliser, and one leading space."""
    prefix = found.values.get("add_prefix_space") is not False
    scheme = "always" if found.values.get("legacy") else "first"
    made.normalizer = normalizers.Sequence([])
    made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme if prefix else "never", False)
    made.decoder = _decoder(True, prefix)


def _generic(proto, found: Settings) -> tuple[tokenizers.Tokenizer, Settings]:
    """A tokenizer that follows the model's own rules; added tokens may rename its pieces."""
    rules, legacy = proto.normalizer_spec, found.values.get("legacy", True)
    names, added = [piece.piece for piece in proto.pieces], found.added
    kept = {name for i, name in enumerate(names) if i not in added}
    names = [
        added[i].content if i in added and added[i].content not in kept else name
        for i, name in enumerate(names)
    ]
    made = tokenizers.Tokenizer(_model(proto, names, proto.trainer_spec.unk_piece))
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        edges, doubled = tokenizers.Regex(r"\A +| +\z"), tokenizers.Regex(" {2,}")
        steps += [normalizers.Replace(edges, ""), normalizers.Replace(doubled, " ")]
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    parts: list[pre_tokenizers.PreTokenizer] = []
    if rules.add_dummy_prefix:
        if legacy:  # SentencePiece adds a space even before a space, but Metaspace does not
            steps.append(normalizers.Replace(tokenizers.Regex(rf"\A{SPACE}"), SPACE * 2))
        parts.append(pre_tokenizers.Metaspace(SPACE, "always" if legacy else "first", False))
        # Added tokens are matched in the text before the leading space is added.
        raw = {i: tokenizer_files.token(token, normalized=False) for i, token in added.items()}
        found = dataclasses.replace(found, added=raw)
    if whole := _user_defined(proto, names):
        pattern = "|".join(re.escape(name) for name in sorted(whole, key=len, reverse=True))
        parts.append(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    made.normalizer = normalizers.Sequence(steps)
    if parts:
        made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder = _decoder(proto.trainer_spec.byte_fallback, rules.add_dummy_prefix)
    return made, found


def _user_defined(proto, names: list[str]) -> list[str]:
    kinds = (piece.type for piece in proto.pieces)
    return [n for n, kind in zip(names, kinds, strict=True) if kind == _Piece.USER_DEFINED]


def _model(proto, names: list[str], unknown: str | None) -> models.Model:
    """A model of the pieces with these names; without `unknown`, text without a piece has no id."""
    spec, scores = proto.trainer_spec, [piece.score for piece in proto.pieces]
    if spec.model_type == _pb2.TrainerSpec.UNIGRAM:
        scored = list(zip(names, scores, strict=True))
        return models.Unigram(scored, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    kinds = [piece.type for piece in proto.pieces]
    normal = {n: (-scores[i], i) for i, n in enumerate(names) if kinds[i] == _Piece.NORMAL}
    # SentencePiece merges by score, so each split of a piece into two known ones becomes a merge.
    merges = [
        (*rank, name[:cut], name[cut:])
        for name, rank in normal.items()
        for cut in range(1, len(name))
        if name[:cut] in normal and name[cut:] in normal
    ]
    return models.BPE(
        {name: i for i, name in enumerate(names)},
        [(left, right) for *_, left, right in sorted(merges)],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback or unknown is None,
        ignore_merges=unknown is not None and bool(_user_defined(proto, names)),
    )


def _decoder(byte_fallback: bool, prefix: bool) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    steps += [decoders.ByteFallback()] * byte_fallback
    steps += [decoders.Fuse(), *[decoders.Strip(" ", 1, 0)] * prefix]
    return decoders.Sequence(steps)
