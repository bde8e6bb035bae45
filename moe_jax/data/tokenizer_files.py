"""The files of a Hugging Face folder that name its tokens.

Files take precedence over each other in the order of Transformers 5.24:
`AutoTokenizer.from_pretrained` for the class, `PreTrainedTokenizerBase._from_pretrained` for the
tokens, and `GenerationMixin.adjust_generation_fn` for the tokens that end a text.
"""

import dataclasses
import os
import pathlib
from typing import Any

import tokenizers
from tokenizers import AddedToken

from moe_jax import strict_json

FILES = ("tokenizer.json", "tokenizer.model")  # if both are there, Transformers uses the first
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
GENERATION = "generation_config.json"
# The keys of config.json that describe the tokenizer and not the model.
OF_CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class")
GENERIC, LLAMA, QWEN = "TokenizersBackend", "LlamaTokenizer", "Qwen2Tokenizer"
# Family -> the class registered for it. A tokenizer_config.json that names another class overrides
# it, unless that class is the generic one or the family is in KEPT.
REGISTERED = {
    "gpt2": "GPT2Tokenizer",
    "olmoe": "GPTNeoXTokenizer",
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe"), QWEN),
    **dict.fromkeys(("mistral", "mixtral", "nemotron"), GENERIC),
}
KEPT = ("qwen2", "nemotron")
# Class -> its tokens if no file names them.
_END = "<|endoftext|>"
DEFAULTS = {
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END),
    "GPTNeoXTokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END),
    QWEN: dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END),
    LLAMA: {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
}
_PROPERTIES = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class DamagedError(ValueError):
    """An unusable file next to a tokenizer; the message is one line that names the file."""


class Folder:
    """The JSON files of a Hugging Face folder, each read only once."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._values: dict[str, dict[str, Any]] = {}

    def read(self, name: str) -> dict[str, Any]:
        """The object in a file, or {} if there is no such file; raises DamagedError."""
        if name not in self._values:
            self._values[name] = _read(self.path / name)
        return self._values[name]


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return strict_json.read_object(path)
    except ValueError as error:
        raise DamagedError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings in the files that accompany a tokenizer.json or a tokenizer.model.

    Attributes:
      values: tokenizer_config.json, overridden by special_tokens_map.json if that is read.
      class_name: the class that Transformers would use.
      roles: the tokens with a role, such as "eos_token", from a file or the class's defaults.
      added: the added tokens by id.
      complete: True if `added` is all of them, whatever a tokenizer.json says.
      special: other special tokens.
      older_special: other special tokens from special_tokens_map.json.
    """

    values: dict[str, Any]
    class_name: str
    roles: dict[str, AddedToken]
    added: dict[int, AddedToken]
    complete: bool
    special: list[AddedToken]
    older_special: list[AddedToken]


def settings(folder: Folder, *, byte_level: bool) -> Settings:
    """The settings of a folder; `byte_level` says that its tokenizer.json works on bytes.

    Raises: DamagedError.
    """
    values = folder.read("tokenizer_config.json")
    complete = "added_tokens_decoder" in values
    older = {} if complete else folder.read("special_tokens_map.json")
    older = {key: token(value) if _is_token(value) else value for key, value in older.items()}
    listed = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    values = values | older
    roles = {key: value for key, value in values.items() if key.endswith("_token")}
    if isinstance(listed, dict):
        roles, listed = roles | listed, []
    if complete:
        added = _listed_tokens(
            folder.path / "tokenizer_config.json", values["added_tokens_decoder"]
        )
    else:
        # As in Transformers, a token that tokenizer_config.json writes as an object is not special.
        special = {str(value) for value in (*listed, *(roles.get(role) for role in ROLES))}
        numbers = folder.read("added_tokens.json")
        for text, number in numbers.items():
            if type(number) is not int or number < 0:
                wrong = f"the id of {text!r} is {number!r}, not a whole number from 0"
                raise DamagedError(f"{folder.path / 'added_tokens.json'}: {wrong}; mend it")
        added = {
            number: AddedToken(text, normalized=text not in special, special=text in special)
            for text, number in numbers.items()
        }
    class_name = _class_name(values, folder.read("config.json"))
    class_name = GENERIC if class_name == LLAMA and byte_level else class_name
    usual = DEFAULTS.get(class_name, {}).items()
    roles = {role: name for role, name in usual if role not in values} | roles
    lists = [older.get(f"{kind}_special_tokens") or [] for kind in ("extra", "additional")]
    return Settings(
        values,
        class_name,
        {role: token(value, special=True) for role, value in roles.items() if _is_token(value)},
        added,
        complete,
        [token(value) for value in listed],
        [token(value) for value in sum(lists, [])],
    )


def _listed_tokens(path: pathlib.Path, listed: Any) -> dict[int, AddedToken]:
    try:
        return {int(i): token(value) for i, value in listed.items()}
    except (AttributeError, TypeError, ValueError) as error:
        wrong = f"added_tokens_decoder is not an object of ids and tokens ({error})"
        raise DamagedError(f"{path}: {wrong}; mend it") from None


def _class_name(values: dict[str, Any], config: dict[str, Any]) -> str:
    given = values.get("tokenizer_class") or config.get("tokenizer_class")
    family = config.get("model_type")
    registered = REGISTERED.get(family) if isinstance(family, str) else None
    if registered and (not given or registered == GENERIC or family in KEPT):
        return registered
    return str(given or GENERIC).removesuffix("Fast")


def add_tokens(tokenizer: tokenizers.Tokenizer, found: Settings) -> int:
    """Adds the tokens that the files list or name; returns the largest id given by a file.

    Like Transformers, the library assigns the next free id to a token without a piece, whatever id
    the file gives.
    """
    added = found.added if found.complete else found.added | tokenizer.get_added_tokens_decoder()
    special = {t.content for t in found.roles.values()}
    in_order = [added[number] for number in sorted(added)]
    tokenizer.add_tokens([token(t, special=t.special or t.content in special) for t in in_order])
    largest = max(tokenizer.get_vocab().values())
    known = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    known = set() if found.class_name == QWEN else known  # this class makes all of them special
    in_order = [found.roles[role] for role in (*ROLES, *found.roles) if role in found.roles]
    named = (*in_order, *(found.special or found.older_special))
    tokenizer.add_tokens([t for t in named if t.content not in known])
    return largest


def _is_token(value: object) -> bool:
    return isinstance(value, str | AddedToken) or isinstance(value, dict) and "content" in value


def token(value: Any, **flags: bool) -> AddedToken:
    """A token with these flags, made from its text, an object in a file, or another token."""
    if isinstance(value, str):
        return AddedToken(value, **{"special": True, **flags})
    if not isinstance(value, dict):
        value = properties(value)
    return AddedToken(**{name: value[name] for name in _PROPERTIES if name in value} | flags)


def properties(token: AddedToken) -> dict[str, Any]:
    """Everything that decides how a token is matched in text, for comparing two tokens."""
    return {name: getattr(token, name) for name in _PROPERTIES}


def file_of(name: str) -> str:
    """The path of a tokenizer's file if `name` is its folder; otherwise, `name`.

    Raises: ValueError for a folder without a tokenizer.
    """
    if not os.path.isdir(name):
        return name
    paths = (os.path.join(name, file) for file in FILES)
    if found := next(filter(os.path.isfile, paths), None):
        return found
    raise ValueError(f"data.tokenizer={name!r} is a folder without {' or '.join(FILES)}")


def are_beside(folder: Folder) -> bool:
    """True if the folder has a Hugging Face tokenizer's files, False if its tokenizer is alone."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    of_model = "model_type" in folder.read("config.json")
    return of_model or any((folder.path / name).exists() for name in names)


def ends(folder: Folder) -> tuple[int, ...]:
    """The ids that end a text, from generation_config.json or else config.json; () if neither has
    any.

    Raises: DamagedError for ids that are neither a number nor a list of numbers.
    """
    for name in (GENERATION, "config.json"):
        ids = folder.read(name).get("eos_token_id")
        if ids is not None and ids != []:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int for i in ids):
                raise DamagedError(
                    f"{folder.path / name}: eos_token_id={ids} is no id or list of ids"
                )
            return tuple(ids)
    return ()
