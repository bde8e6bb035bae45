"""Writes a tokenizer as the files of a Hugging Face folder."""

import hashlib
import pathlib

import tokenizers
from tokenizers import processors

from moe_jax import files, strict_json
from moe_jax.data import tokenizer_files

PAIR = "sentencepiece"  # the key of tokenizer_config.json with the hash of both files


def write(
    folder: pathlib.Path,
    made: tokenizers.Tokenizer,
    *,
    begin: str,
    end: str,
    pad: str | None = None,
    model_file: bytes | None = None,
) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, if given, an equivalent tokenizer.model.

    A prompt gets the begin token, as in `Tokenizer.prompt`.
    """
    names = {"bos_token": begin, "eos_token": end} | ({"pad_token": pad} if pad else {})
    made.add_special_tokens(list(names.values()))
    number = made.token_to_id(begin)
    made.post_processor = processors.TemplateProcessing(
        f"{begin} $A", special_tokens=[(begin, number)]
    )
    json = made.to_str(pretty=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **names,
    }
    if model_file is not None:
        (folder / "tokenizer.model").write_bytes(model_file)
        settings[PAIR] = _digest(json.encode(), model_file)
    files.write_text(folder / "tokenizer.json", json)
    files.write_text(folder / "tokenizer_config.json", strict_json.text(settings, indent=2) + "\n")


def has_pair(folder: tokenizer_files.Folder) -> bool:
    """True if `write` wrote both tokenizer.json and tokenizer.model, and neither has changed."""
    kept = folder.read("tokenizer_config.json").get(PAIR)
    paths = [folder.path / name for name in tokenizer_files.FILES]
    if kept is None or any(
        not path.is_file() or path.stat().st_size > strict_json.MAX_BYTES for path in paths
    ):
        return False
    return kept == _digest(*(path.read_bytes() for path in paths))


def _digest(json: bytes, model_file: bytes) -> str:
    return hashlib.sha256(
        b"".join(hashlib.sha256(f).digest() for f in (json, model_file))
    ).hexdigest()
