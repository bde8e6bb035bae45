"""Configs: their defaults, and reading them from files, command lines and workdirs.

A config file defines `get_config()`, which starts from `default()` and changes what it needs:

    python scripts/train.py --config=configs/quickstart.py --config.training.num_steps=100
"""

import dataclasses
import json
import operator
import pathlib
import re
import reprlib
import types
import typing

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from moe_jax import command_line, files, spelling, strict_json, untrusted
from moe_jax.config import checks, program
from moe_jax.config.checks import ConfigError
from moe_jax.config.run import Run
from moe_jax.config.section import key_names, section_of
from moe_jax.config.sections import Balance
from moe_jax.model.config import ModelConfig
from moe_jax.upcycle import recipes

# Keys and sections of older configs -> their current names.
MOVED = {
    **{f"training.{n}": f"balance.{n}" for n in key_names(Balance) if n != "over_layers"},
    "training.adaptive_balance": "balance.adaptive",
    "training.logit_z_coefficient": "objective.logit_z_coefficient",
    "training.distillation": "objective.distillation",
}


def default() -> ConfigDict:
    """All sections with their defaults; it is locked, so unknown keys cannot be set.

    Fields of the model and parameters of a recipe are None, meaning "not set", but have types.
    """
    hints = typing.get_type_hints(ModelConfig)
    config: dict[str, typing.Any] = {}
    for field in dataclasses.fields(Run):
        if section := section_of(field):
            config[field.name] = dataclasses.asdict(section())
        elif "explanation" in field.metadata:
            config[field.name] = field.default
    config["model"] = {"preset": ""}
    for name in (field.name for field in dataclasses.fields(ModelConfig)):
        config["model"][name] = config_dict.placeholder(plain_type(hints[name]))
    del config["init"]["upcycle"]["parameters"]
    for recipe in recipes.RECIPES.values():
        for name, value in recipe.defaults.items():
            config["init"]["upcycle"][name] = config_dict.placeholder(type(value))
    return ConfigDict(config).lock()


def plain_type(hint: typing.Any) -> type:
    """The type of a field's values: int for `int | None`, tuple for `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    return typing.get_origin(hint) or hint


def load(path: str, overrides: dict | None = None) -> ConfigDict:
    """The config from FILE[:arg], with overrides by dotted key. Runs the file's Python code.

    Raises: ConfigError for a file that cannot be used, an unknown key or a value of the wrong type.
    """
    flag = [f"--config.{key}={value}" for key, value in (overrides or {}).items()]
    return parse([f"--config={path}", *flag])


def parse(arguments: list[str]) -> ConfigDict:
    """The config from the arguments --config=FILE[:arg] and --config.section.key=value.

    Raises: ConfigError, like `load`.
    """
    path = next((a.removeprefix("--config=") for a in arguments if a.startswith("--config=")), "")
    if not path:
        raise ConfigError("--config=FILE is missing; for example --config=configs/quickstart.py")
    check_names(arguments)
    unset = [a.partition("=")[0].removeprefix("--config.") for a in arguments if _unsets(a)]
    others = [a for a in arguments if not a.startswith("--config=") and not _unsets(a)]
    values = flags.FlagValues()
    try:
        config = program.call(path, "get_config")
        if not isinstance(config, ConfigDict):
            raise ConfigError(f"--config={path}: get_config() returns no config")
        arguments = ["config", *others]
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
        unused = values(arguments)[1:]
    except ConfigError:
        raise
    except (AttributeError, KeyError) as error:
        raise _unknown_key(error) from None
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except Exception as error:  # the file itself can raise any type
        text = f"--config={path}: {type(error).__name__}: {error}"
        raise ConfigError(" ".join(text.split())) from error
    if unused:
        raise ConfigError(
            f"unexpected argument {unused[0]!r}; options are --config.section.key=value"
        )
    for key in unset:
        section, _, name = key.rpartition(".")
        (operator.attrgetter(section)(values.config) if section else values.config)[name] = None
    return values.config


def _unsets(argument: str) -> bool:
    """True for --config.KEY=None if the key is unset by default."""
    option, _, text = argument.partition("=")
    return text == "None" and option.removeprefix("--config.") in _unset_by_default()


def _unset_by_default() -> frozenset[str]:
    config = default()
    return frozenset(key for key in kinds() if operator.attrgetter(key)(config) is None)


def _unknown_key(error: Exception) -> ConfigError:
    """The error for a key that a ConfigDict does not have, with its new name if it was renamed."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    named = re.search(r"""["'](\w+)["']""", " ".join(error.args[0].split()))
    return ConfigError(_unknown(named[1] if named else str(error)))


def _unknown(key: str) -> str:
    """The line that refuses a key, or a key's last part if a config file's error has no more."""
    for old, new in MOVED.items():
        if f"{key}.".startswith(f"{old}.") or key == old.rpartition(".")[2]:
            return f"config.{old} is config.{new} now"
    name = f"config.{key}" if "." in key else repr(key)
    return f"{name} is no key of a config{_meant(key)}"


def _meant(key: str) -> str:
    """A suggestion with the nearest key: in the same section if possible, otherwise in any."""
    section, _, name = key.rpartition(".")
    keys = sorted(kinds(), key=lambda known: known.rpartition(".")[0] != section)
    beside = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == section]
    everywhere = [k.rpartition(".")[2] for k in keys]
    near = spelling.nearest(name, everywhere if name in everywhere else beside)
    near = near or spelling.nearest(name, everywhere)
    found = [known for known in keys if known.rpartition(".")[2] == near]
    found = [known for known in found if known.rpartition(".")[0] == section] or found
    names = " or ".join(f"config.{known}" for known in found)
    return f"; did you mean {names}?" if found else "; --list_keys shows all"


def kinds() -> dict[str, type]:
    """Every dotted key of a config, and the type of its values."""

    def inside(config: ConfigDict, before: str) -> typing.Iterator[tuple[str, type]]:
        for name in config:
            if isinstance(config[name], ConfigDict):
                yield from inside(config[name], f"{before}{name}.")
            else:
                yield f"{before}{name}", config.get_type(name)

    return dict(inside(default(), ""))


def check_names(arguments: list[str]) -> None:
    """Refuses options that are not keys of a config, and values that should be numbers but are not.

    Raises: ConfigError, which names the nearest valid key.
    """
    known = kinds()
    for argument in arguments:
        option, given, text = argument.partition("=")
        if not option.startswith("--") or option == "--config":
            continue
        key = option.removeprefix("--").removeprefix("config.")
        if not option.startswith("--config."):
            meant = f"; did you mean --config.{key}?" if key in known else _meant(key)
            raise ConfigError(f"{option} is no option{meant.replace(' config.', ' --config.')}")
        if key not in known:
            raise ConfigError(_unknown(key))
        if given and known[key] in (int, float) and not _unsets(argument):
            with checks.refusing():
                command_line.typed(f"config.{key}", text, known[key])


def model_fields(arguments: list[str]) -> dict:
    """The ModelConfig fields from command-line arguments "--model.NAME=VALUE".

    Raises: ValueError for a field or value that ModelConfig does not have.
    """
    hints = typing.get_type_hints(ModelConfig)
    fields = {}
    for name, text in command_line.options("model", arguments).items():
        if name not in hints:
            near = spelling.did_you_mean(name, hints)
            raise ValueError(f"--model.{name}: a model's config has no such field{near}")
        fields[name] = command_line.typed(f"model.{name}", text, plain_type(hints[name]))
    return fields


def save_json(config: ConfigDict, workdir: pathlib.Path) -> None:
    text = json.dumps(config.to_dict(), indent=1, ensure_ascii=False)
    files.write_text(workdir / "config.json", text + "\n")


def load_json(workdir: pathlib.Path) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises: ConfigError if this version cannot read it.
    """
    path = workdir / "config.json"
    with checks.refusing():
        untrusted.check_folder(workdir)
        values = strict_json.read_object(path)
    with checks.refusing(f"{path}: "):
        return stored(values)


def stored(values: dict) -> ConfigDict:
    """The config whose `to_dict()` was stored in a workdir or a checkpoint.

    Raises: ConfigError for an unknown key or an invalid value.
    """
    config = default()
    _check_sections(values, config)
    try:
        config.update(values)
    except (AttributeError, KeyError) as error:
        raise _unknown_key(error) from None
    except TypeError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    unset = _unset_by_default()
    for key in kinds():
        if operator.attrgetter(key)(config) is None and key not in unset:
            raise ConfigError(f"config.{key} is null; it must have a value")
    return config


def _check_sections(values: dict, config: ConfigDict, before: str = "") -> None:
    """Refuses a stored config in which a section is a value, or a value is a section."""
    for name in sorted(values.keys() & config.keys()):
        value, path = values[name], f"config.{before}{name}"
        if isinstance(config[name], ConfigDict) != isinstance(value, dict):
            kind = "a value, not a section" if isinstance(value, dict) else "a section of keys"
            raise ConfigError(f"{path} is {reprlib.repr(value)}; it must be {kind}")
        if isinstance(value, dict):
            _check_sections(value, config[name], f"{before}{name}.")
