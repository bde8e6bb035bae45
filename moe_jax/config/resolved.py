"""Resolves a config, once per command, into settings that include those taken from a parent.

A config takes from the first model of `init.source` what it does not set itself: the model (without
a preset or sizes), the tokenizer (`data.tokenizer=""`) and the row length
(`data.sequence_length=0`).
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, TypeVar

from ml_collections import ConfigDict

from moe_jax import spelling, untrusted
from moe_jax.config import checks, machine, reading, sections
from moe_jax.config.checks import ConfigError
from moe_jax.config.data import Data
from moe_jax.config.run import Run
from moe_jax.config.section import Section, key_names, section_of
from moe_jax.hf import beside, folders
from moe_jax.hf import configs as hf_configs
from moe_jax.model.config import ModelConfig
from moe_jax.model.fields import no_effect, without_effect
from moe_jax.model.presets import PRESETS

TOKENIZER = "tokenizer"  # the folder in a workdir for the files next to the parent's weights
LONGEST_ROW = 4096  # default row length in tokens for models that can read longer rows
AUTO = "auto"  # model.dtype: bfloat16 if this machine's chips support it

Part = TypeVar("Part", bound=Section)


def resolve(
    config: ConfigDict, *, parent: ModelConfig | None = None, workdir: pathlib.Path | None = None
) -> Run:
    """The settings of a config, including the ModelConfig.

    `parent` is the model of `init.source` if that is not trained yet, as in a sweep. A run resumed
    in `workdir` does not need its parent any more, because the workdir has what came from it.

    Raises: ConfigError, in one line that says what to change, for any mistake visible in the config
      alone, including a key that is set but never read.
    """
    if workdir is not None:
        with checks.refusing("--workdir: "):
            untrusted.check_folder(workdir)
        config = _without_parent(config, workdir)
    run = _run(_filled(config, parent))
    given = [n for n, v in config.model.items() if n != "preset" and v is not None]
    of_model = without_effect(run.model, given, "config.model.")
    for line in (*of_model, *_without_effect(run, run)):
        raise ConfigError(line)
    return run


def _without_effect(run: Run, section: Section) -> Iterator[str]:
    """A line for each key of the section and its subsections that is set but not read."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        # For a number that may not be negative, 0 asks for nothing and is always allowed.
        asks = value != field.default and (
            value or field.metadata.get("check") != checks.NOT_NEGATIVE
        )
        if isinstance(value, Section):
            yield from _without_effect(run, value)
        elif "explanation" in field.metadata and asks:
            needs = (*section.needs, *field.metadata["needs"])
            yield from no_effect(f"config.{section.path}.{field.name}", value, needs, run)


def of_stored(config: ConfigDict) -> Run:
    """`resolve` for a config stored by a run, which may contain keys that nothing reads.

    A run stores what it took from its parent, so the paths in the config are not followed.
    """
    return _run(config.copy_and_resolve_references())


def data_of(config: ConfigDict) -> Data:
    """The section `data` of a config. Raises: ConfigError for an invalid value."""
    return _section(Data, _with_tuples(config.data.to_dict()))


def _run(config: ConfigDict) -> Run:
    values = _with_tuples(config.to_dict())
    upcycle = values["init"]["upcycle"]
    own = key_names(sections.Upcycle)
    values["init"]["upcycle"] = {
        **{name: value for name, value in upcycle.items() if name in own},
        "parameters": {n: v for n, v in upcycle.items() if n not in own and v is not None},
    }
    values["model"] = _model_in(config)
    return _section(Run, {**values, "config": config})


def _section(kind: type[Part], values: dict[str, Any]) -> Part:
    parts = {
        field.name: _section(section, values[field.name])
        for field in dataclasses.fields(kind)
        if (section := section_of(field))
    }
    return kind(**{**values, **parts})


def _with_tuples(value: Any) -> Any:
    """`value` with the lists that JSON stores turned back into tuples."""
    if isinstance(value, dict):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value


def _model(section: dict[str, Any]) -> ModelConfig:
    fields = {name: value for name, value in section.items() if value is not None}
    preset = fields.pop("preset")
    if preset and preset not in PRESETS:
        raise ConfigError(spelling.unknown("config.model.preset", preset, PRESETS))
    base = dataclasses.asdict(PRESETS[preset]) if preset else {}
    try:
        with checks.refusing("config.model."):
            return ModelConfig(**{**base, **fields})
    except TypeError as error:
        missing = str(error).split("argument")[-1].strip("s: ")
        raise ConfigError(
            f"config.model lacks {missing}; set them, or config.model.preset, or leave the model "
            "to config.init.source"
        ) from None


def _filled(config: ConfigDict, parent: ModelConfig | None) -> ConfigDict:
    """The config, completed from the first model of `init.source` and from this machine."""
    source = next(iter(sections.parents_in(config.init.source)), "")
    config = config.copy_and_resolve_references()
    own, data = config.model, config.data
    if own.dtype == AUTO:
        own.dtype = machine.dtype_here()
    if source and not own.preset and own.vocab_size is None:
        with checks.refusing(f"config.init.source={source}: "):
            parent = parent or model_of(pathlib.Path(source))
        given = {n: v for n, v in _with_tuples(own.to_dict()).items() if n != "preset"}
        with checks.refusing("config.model."):
            child = _child(parent, {n: v for n, v in given.items() if v is not None})
        own.update({n: v for n, v in dataclasses.asdict(child).items() if v is not None})
    # A sweep's parent does not exist before it is trained: the run itself will find it.
    if not data.tokenizer and (not source or (pathlib.Path(source) / "config.json").exists()):
        with checks.refusing("config.data.tokenizer is not set, and "):
            data.tokenizer = tokenizer_of(pathlib.Path(source)) if source else "bytes"
    elif data.tokenizer and (folder := pathlib.Path(data.tokenizer)).is_dir():
        with checks.refusing("config.data.tokenizer: "):
            data.tokenizer = str(beside.tokenizer_in(folder) or folder)
    if not data.sequence_length:
        data.sequence_length = min(_model_in(config).max_position_embeddings, LONGEST_ROW)
    return config


def _without_parent(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """The config, completed with what the run in the workdir took from a parent that is missing."""
    parents = [pathlib.Path(source) for source in sections.parents_in(config.init.source)]
    if not (workdir / "config.json").exists() or all((p / "config.json").exists() for p in parents):
        return config
    stored = reading.load_json(workdir)
    if stored.init.source != config.init.source:
        return config
    config = config.copy_and_resolve_references()
    if not config.model.preset and config.model.vocab_size is None:
        config.model.update({n: v for n, v in stored.model.items() if v is not None})
    if config.data.tokenizer in ("", stored.data.tokenizer):
        config.data.tokenizer = tokenizer_of(workdir)  # its own copy
    config.data.sequence_length = config.data.sequence_length or stored.data.sequence_length
    return config


def _child(parent: ModelConfig, given: dict[str, Any]) -> ModelConfig:
    """The model of a run that sets these fields and takes the others from its parent."""
    num_experts = given.get("num_experts", parent.num_experts)
    if parent.num_experts and not num_experts:
        del given["num_experts"]
        return parent.to_dense(**given)
    if num_experts and not parent.num_experts:
        return parent.to_moe(**{"num_experts_per_tok": parent.num_experts_per_tok} | given)
    return dataclasses.replace(parent, **given)


def _model_in(config: ConfigDict) -> ModelConfig:
    return _model(_with_tuples(config.model.to_dict()))


def model_in(values: dict[str, Any]) -> ModelConfig:
    """The model of a run's config that was stored in a checkpoint."""
    return _model_in(reading.stored(values))


def model_of(folder: pathlib.Path) -> ModelConfig:
    """The config of the model in a Hugging Face folder or a run's workdir.

    Unlike `resolve`, it does not check whether the model can be trained.

    Raises: ValueError, in one line, for any other folder, or one that cannot be read.
    """
    if folders.is_folder(folder):
        return hf_configs.of_folder(folder)
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} is neither a Hugging Face folder (config.json with a model_type) nor a "
            f"run's workdir; a model of the hub comes into a folder by: hf download {folder} "
            "--local-dir path/to/folder"
        )
    return _model_in(reading.load_json(folder))


def tokenizer_of(folder: pathlib.Path) -> str:
    """The name under which `tokenizers.load` finds the tokenizer of a Hugging Face folder or a run.

    A run keeps all files of its tokenizer's folder; its config says which of them it used. The path
    in its config is not followed: a stranger may have written it.

    Raises: ValueError for a folder without a tokenizer.
    """
    if folders.is_folder(folder):
        own = beside.tokenizer_in(folder)
        if own is None:
            raise ValueError(
                f"{folder} has no tokenizer.json or tokenizer.model; give the tokenizer of the "
                "model, by --tokenizer or config.data.tokenizer"
            )
        return str(own)
    named = reading.load_json(folder).data.tokenizer
    own = beside.tokenizer_in(folder / TOKENIZER, beside.usual_name(pathlib.Path(named)))
    if own is None and named != "bytes":
        raise ValueError(
            f"{folder} keeps no tokenizer, and {named}, which its config names, is not read for "
            "it; give it yourself, by --tokenizer or config.data.tokenizer"
        )
    return named if own is None else str(own)
