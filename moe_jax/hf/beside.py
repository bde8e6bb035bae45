"""The files next to the weights: tokenizer, chat templates and generation settings."""

import json
import pathlib
import shutil

from moe_jax.data import sentencepiece_folder, tokenizer_files
from moe_jax.hf import safetensors

VOCABULARIES = (*tokenizer_files.FILES, "vocab.json", "vocab.txt", "merges.txt")
SETTINGS = """tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
    chat_template.json generation_config.json""".split()
TEMPLATES = "additional_chat_templates"


def tokenizer_in(folder: pathlib.Path, used: str = tokenizer_files.FILES[0]) -> pathlib.Path | None:
    """The tokenizer of a folder, or None; if it has two, the one named `used`.

    If both are there, Transformers uses tokenizer.json and not tokenizer.model.

    Raises: FormatError if the tokenizer, or a file read with it, is a link out of the folder.
    """
    found = [name for name in (*VOCABULARIES, *SETTINGS) if (folder / name).exists()]
    for name in found:
        safetensors.resolve_inside(folder, name)
    return next((folder / name for name in (used, *tokenizer_files.FILES) if name in found), None)


def copy(source: pathlib.Path, target: pathlib.Path, tokenizer: pathlib.Path | None = None) -> None:
    """Copies those of these files that `source` has into `target`, which need not exist.

    Args:
      tokenizer: the tokenizer's file in `source`. If its name is not a usual one, the copy gets the
        usual name, and other tokenizers are not copied.
    """
    own = tokenizer is not None and tokenizer.name not in VOCABULARIES
    templates = [(TEMPLATES, path.name) for path in (source / TEMPLATES).glob("*.jinja")]
    names = [*(() if own else VOCABULARIES), *SETTINGS]
    for subfolder, name in [*(("", name) for name in names), *templates]:
        if (source / subfolder / name).exists():
            file = safetensors.resolve_inside(source, name, subfolder)
            (target / subfolder).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / subfolder / name)
    if tokenizer is not None and own:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tokenizer, target / usual_name(tokenizer))


def usual_name(tokenizer: pathlib.Path) -> str:
    return tokenizer_files.FILES[tokenizer.suffix != ".json"]


def copy_config(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the config.json of a Hugging Face folder, because its token ids belong to the
    tokenizer."""
    if "model_type" in tokenizer_files.Folder(source).read("config.json"):
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(safetensors.resolve_inside(source, "config.json"), target / "config.json")


def complete(folder: pathlib.Path) -> None:
    """Writes a tokenizer_config.json for a tokenizer.model without other files.

    A run puts the begin token before a prompt; Transformers does so only if that file says so.
    """
    model = folder / "tokenizer.model"
    is_alone = model.exists() and not (folder / "tokenizer.json").exists()
    if is_alone and not tokenizer_files.are_beside(tokenizer_files.Folder(folder)):
        settings = sentencepiece_folder.settings_of(model)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
