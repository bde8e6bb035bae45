"""The sections of a run's config, how a config file is read, and every refusal of a bad value.

A config file has `get_config()`, which starts from `default()` and changes what it needs:

    python scripts/train.py --config=configs/quickstart.py --config.training.num_steps=100
"""

import dataclasses
import glob
import json
import math
import os
import pathlib
import re
import types
import typing

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from moe_jax import command_line
from moe_jax.data import sources, tokenizers
from moe_jax.hf import configs as hf_configs
from moe_jax.hf import folders
from moe_jax.model.config import ModelConfig
from moe_jax.model.presets import PRESETS
from moe_jax.parallel import mesh, sharding
from moe_jax.upcycle import recipes, router_init


class ConfigError(ValueError):
    """A mistake in a config or on the command line; its text is the one line to print."""


def default() -> ConfigDict:
    """All sections with their defaults; a None is a typed place holder ("not set")."""
    return ConfigDict(
        {
            "seed": 0,
            # A preset and what to change of it, or all fields that ModelConfig has no default for.
            "model": {"preset": "", **_model_placeholders()},
            # Where parameters come from: "" is random, else a run's workdir or a Hugging Face
            # folder; several, "A,B,C", for a recipe that takes several parents. With a recipe they
            # are its parents; parameters left unset take the recipe's defaults (README's table).
            # Without a preset and sizes the model is a Hugging Face source's own.
            "init": {
                "source": "",
                "upcycle": {
                    "recipe": "",
                    "router": "",  # an initialiser; "" is the recipe's own
                    "statistics": "",  # a file of scripts/collect_statistics.py
                    # Or "copy": Adam's moments of the parent, a run's, go the way of its weights.
                    "optimizer_state": "fresh",
                    **_recipe_placeholders(),
                },
            },
            "data": {
                "source": "embedded",  # or "tfds:NAME", or a path or glob of .txt and .jsonl
                "tokenizer": "bytes",  # or a SentencePiece model's path
                "sequence_length": 256,
                "validation_fraction": 0.05,  # of a path's documents; other sources have a split
                "cache_dir": "",  # of tokens and compiled steps; "" is the user's cache folder
            },
            "mesh": {"data": 1, "fsdp": -1, "expert": 1, "tensor": 1, "edp": 1},
            "optimizer": {
                "learning_rate": 3e-4,
                "schedule": "cosine",  # or "wsd": constant, then linear over the last decay_steps
                "warmup_steps": 0,
                "decay_steps": 0,
                "final_learning_rate_ratio": 0.1,
                "beta1": 0.9,
                "beta2": 0.95,
                "epsilon": 1e-8,
                "weight_decay": 0.1,
                # A regular expression of parameter paths.
                "no_weight_decay": r"norm/scale$|bias$|/b[qkvo]$",
                "gradient_clip_norm": 1.0,
                # Rules, ((regular expression of parameter paths, factor), ...): the first that
                # matches decides, 1 where none does.
                "gradient_factors": (),
                "weight_decay_factors": (),
                "learning_rate_factors": (),
                "frozen": "",  # a regular expression of parameter paths that are not trained
                "orthogonal_every": 0,  # steps of a phase of OMoE's alternation; 0 is off
            },
            "training": {
                "num_steps": 1000,
                "batch_size": 16,  # sequences a step, over all devices
                "accumulation_steps": 1,
                "log_every": 10,
                "load_balancing_coefficient": 0.01,
                "load_balancing_scope": "layer",  # or "all_layers"
                "load_balancing_divide_by_k": True,
                "load_balancing_form": "switch",  # or "squared" (Skywork-MoE's)
                # The tokens of a router loss: "device", "global" (the devices' microbatch), or
                # "window", the whole batch for another forward pass if there are microbatches.
                "load_balancing_over": "global",
                # Or "adaptive": layer by layer, from load_balancing_coefficient on.
                "load_balancing_schedule": "constant",
                "adaptive_balance": {"rate": 0.2, "maximum": 0.01, "beta": 0.99},
                "bias_update_rate": 0.0,  # of router="sigmoid_topk"
                "importance_coefficient": 0.0,
                "mutual_information_coefficient": 0.0,
                "router_z_coefficient": 0.0,
                "logit_z_coefficient": 0.0,
                # From a run's workdir or a Hugging Face folder of the same vocabulary.
                "distillation": {"source": "", "coefficient": 0.0, "temperature": 1.0},
                "max_nonfinite_steps": 3,  # skipped in a row before the run stops
            },
            "evaluation": {
                "every_steps": 0,  # 0 is only at the end
                "batch_size": 32,
                "max_batches": 0,  # 0 is all of the held-out text
                "prompts": (),
                "continuation_tokens": 96,
                "num_experts_per_tok": 0,  # 0 is the model's
            },
            "checkpoint": {"every_steps": 1000, "keep": 2},
        }
    )


def _model_placeholders() -> dict:
    hints = typing.get_type_hints(ModelConfig)
    return {
        field.name: config_dict.placeholder(_plain_type(hints[field.name]))
        for field in dataclasses.fields(ModelConfig)
    }


def _recipe_placeholders() -> dict:
    defaults = {}
    for recipe in recipes.RECIPES.values():
        defaults |= recipe.defaults
    return {name: config_dict.placeholder(type(value)) for name, value in defaults.items()}


def _plain_type(hint):
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    return typing.get_origin(hint) or hint


def load(path: str, overrides: dict | None = None) -> ConfigDict:
    """The config that FILE[:arg] makes, with dotted keys overridden. Runs the file's Python code.

    Raises: ConfigError for a file that cannot be used, an unknown key or a value of a wrong type.
    """
    flag = [f"--config.{key}={value}" for key, value in (overrides or {}).items()]
    return parse([f"--config={path}", *flag])


def parse(arguments: list[str]) -> ConfigDict:
    """`load` from command-line arguments: --config=FILE[:arg] and --config.section.key=value."""
    path = next((a.removeprefix("--config=") for a in arguments if a.startswith("--config=")), "")
    if not path:
        raise ConfigError("--config=FILE is missing; for example --config=configs/quickstart.py")
    if not os.path.isfile(path.split(":")[0]):
        raise ConfigError(f"--config={path}: no such file; the examples are under configs/")
    arguments = ["config", *arguments]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
        unused = values(arguments)[1:]
    except (AttributeError, KeyError) as error:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        raise ConfigError("unknown key " + " ".join(error.args[0].split())) from None
    except Exception as error:  # whatever the flag library or the file itself raises
        text = f"{error}".strip() or f"{path}: {error!r}"
        # What a config file itself raises comes as a traceback, the reason last.
        if "Traceback" in text:
            text = f"--config={path}: {text.splitlines()[-1]}"
        raise ConfigError(" ".join(text.split())) from error
    if unused:
        raise ConfigError(
            f"unexpected argument {unused[0]!r}; options are --config.section.key=value"
        )
    return values.config


def model_config(config: ConfigDict) -> ModelConfig:
    """The ModelConfig of a run's `model` section.

    Raises: ConfigError.
    """
    section = {k: v for k, v in config.model.items() if v is not None}
    preset = section.pop("preset")
    if preset and preset not in PRESETS:
        raise ConfigError(
            f"config.model.preset={preset!r} is unknown; use one of {', '.join(PRESETS)}"
        )
    base = dataclasses.asdict(PRESETS[preset]) if preset else {}
    if not preset and "vocab_size" not in section and config.init.source:
        base = _fields_of_source(parents(config)[0])
        if "num_experts" in section:
            base["model_type"] = None
    try:
        return ModelConfig(**{**base, **section})
    except TypeError as error:
        missing = str(error).split("argument")[-1].strip("s: ")
        raise ConfigError(
            f"config.model lacks {missing}; set them, or config.model.preset"
        ) from None
    except ValueError as error:
        raise ConfigError(f"config.model.{error}") from None


def _fields_of_source(source: str) -> dict:
    """Of a model's Hugging Face folder; a run's config says its model itself."""
    if not folders.is_folder(source):
        return {}
    try:
        return dataclasses.asdict(hf_configs.read(hf_configs.load_json(pathlib.Path(source))))
    except ValueError as error:
        raise ConfigError(f"config.init.source={source}: {error}") from None


def parents(config: ConfigDict) -> list[str]:
    """The sources of a run's parameters."""
    return [source for source in config.init.source.split(",") if source]


def model_fields(arguments: list[str]) -> dict:
    """The ModelConfig fields in command-line arguments "--model.NAME=VALUE".

    Raises: ValueError for a field or value that ModelConfig does not have.
    """
    hints = typing.get_type_hints(ModelConfig)
    fields = {}
    for name, text in command_line.options("model", arguments).items():
        if name not in hints:
            raise ValueError(f"--model.{name}: a model's config has no such field")
        fields[name] = command_line.typed(f"model.{name}", text, _plain_type(hints[name]))
    return fields


def upcycle_parameters(config: ConfigDict) -> dict:
    """The recipe's parameters that the config sets."""
    section = config.init.upcycle.to_dict()
    others = ("recipe", "router", "statistics", "optimizer_state")
    return {k: v for k, v in section.items() if k not in others and v is not None}


POSITIVE = """data.sequence_length optimizer.learning_rate optimizer.epsilon training.num_steps
    training.batch_size training.accumulation_steps training.log_every training.max_nonfinite_steps
    evaluation.batch_size evaluation.continuation_tokens checkpoint.every_steps checkpoint.keep
    optimizer.gradient_clip_norm training.distillation.temperature""".split()
NOT_NEGATIVE = """seed optimizer.warmup_steps optimizer.decay_steps optimizer.weight_decay
    optimizer.orthogonal_every training.load_balancing_coefficient training.router_z_coefficient
    training.importance_coefficient training.mutual_information_coefficient
    training.logit_z_coefficient training.adaptive_balance.rate training.adaptive_balance.maximum
    training.bias_update_rate training.distillation.coefficient evaluation.every_steps
    evaluation.max_batches evaluation.num_experts_per_tok""".split()
SHARES = """data.validation_fraction optimizer.final_learning_rate_ratio optimizer.beta1
    optimizer.beta2 training.adaptive_balance.beta""".split()
PATTERNS = ("optimizer.no_weight_decay", "optimizer.frozen")
RULES = """optimizer.gradient_factors optimizer.weight_decay_factors
    optimizer.learning_rate_factors""".split()
CHOICES = {
    "optimizer.schedule": ("cosine", "wsd"),
    "training.load_balancing_scope": ("layer", "all_layers"),
    "training.load_balancing_form": ("switch", "squared"),
    "training.load_balancing_over": ("device", "global", "window"),
    "training.load_balancing_schedule": ("constant", "adaptive"),
    "init.upcycle.optimizer_state": ("fresh", "copy"),
    "init.upcycle.router": ("", *router_init.ROUTER_INITIALISERS, router_init.COPIED),
}


def validate(config: ConfigDict) -> None:
    """Refuses what can be seen from the config alone.

    Raises: ConfigError, in one line that says what to change.
    """
    rules = (
        (POSITIVE, lambda v: v > 0, "must be more than 0"),
        (NOT_NEGATIVE, lambda v: v >= 0, "must not be negative"),
        (SHARES, lambda v: 0 <= v <= 1, "must be from 0 to 1"),
    )
    for keys, holds, complaint in rules:
        for key in keys:
            value = _get(config, key)
            if not math.isfinite(value):
                raise ConfigError(f"config.{key}={value} is not a finite number; it {complaint}")
            if not holds(value):
                raise ConfigError(f"config.{key}={value} {complaint}")
    for key, choices in CHOICES.items():
        if _get(config, key) not in choices:
            raise ConfigError(
                f"config.{key}={_get(config, key)!r} is unknown; use one of {choices}"
            )
    if config.seed >= 2**31:
        raise ConfigError(f"config.seed={config.seed} must be less than 2**31")
    for key in PATTERNS:
        _check_pattern(key, _get(config, key))
    for key in RULES:
        _check_rules(key, _get(config, key))
    training, optimizer = config.training, config.optimizer
    if optimizer.warmup_steps + optimizer.decay_steps > training.num_steps:
        raise ConfigError(
            f"config.optimizer: warmup_steps={optimizer.warmup_steps} and "
            f"decay_steps={optimizer.decay_steps} exceed training.num_steps={training.num_steps}"
        )
    if training.batch_size % training.accumulation_steps:
        raise ConfigError(
            f"config.training.batch_size={training.batch_size} is not divisible by "
            f"accumulation_steps={training.accumulation_steps}; use a multiple of it"
        )
    model = model_config(config)
    _check_routing(config, model)
    recipe = config.init.upcycle.recipe
    if recipe:
        if not config.init.source:
            raise ConfigError(
                f"config.init.upcycle.recipe={recipe!r} needs a parent; set config.init.source"
            )
        try:
            recipes.check(recipe, upcycle_parameters(config))
        except ValueError as error:
            raise ConfigError(f"config.init.upcycle: {error}") from None
        if not model.num_experts and recipes.RECIPES[recipe].gives == recipes.MIXTURE:
            raise ConfigError(
                f"config.init.upcycle.recipe={recipe!r} makes a sparse model; "
                "set config.model.num_experts"
            )
        if config.init.upcycle.optimizer_state == "copy" and (
            len(parents(config)) > 1 or not recipes.RECIPES[recipe].moments
        ):
            raise ConfigError(
                f"config.init.upcycle.optimizer_state='copy' is for one parent, and not for recipe "
                f"{recipe!r} here; use 'fresh'"
            )
    elif len(parents(config)) > 1:
        raise ConfigError(
            f"config.init.source={config.init.source!r} names several models; "
            "set config.init.upcycle.recipe to one that takes several"
        )
    elif given := [*upcycle_parameters(config), *_without_recipe(config)]:
        given = ", ".join(given)
        raise ConfigError(f"config.init.upcycle sets {given} without a recipe; set recipe too")


def _without_recipe(config: ConfigDict) -> list[str]:
    """What only a recipe gives a meaning to, and is set."""
    section, usual = config.init.upcycle, default().init.upcycle
    names = ("router", "statistics", "optimizer_state")
    return [name for name in names if section[name] != usual[name]]


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"config.{key}={pattern!r} is not a regular expression: {error}"
        ) from None


def _check_rules(key: str, rules: tuple) -> None:
    for rule in rules:
        match rule:
            case (str(pattern), int() | float() as factor) if 0 <= factor < math.inf:
                _check_pattern(key, pattern)
            case _:
                raise ConfigError(
                    f"config.{key} has {rule!r}; use pairs of a regular expression and a factor "
                    "of at least 0"
                )


def _check_routing(config: ConfigDict, model: ModelConfig) -> None:
    """Refuses balance, distillation and evaluation that this model cannot have."""
    training = config.training
    if training.load_balancing_schedule == "adaptive" and training.load_balancing_scope != "layer":
        raise ConfigError(
            "config.training.load_balancing_schedule='adaptive' has a coefficient for each layer; "
            "set training.load_balancing_scope='layer'"
        )
    if training.bias_update_rate and model.num_experts and model.router != "sigmoid_topk":
        raise ConfigError(
            f"config.training.bias_update_rate={training.bias_update_rate} needs a router with a "
            f"bias, not model.router={model.router!r}; use 'sigmoid_topk', or a rate of 0"
        )
    if training.distillation.source and not training.distillation.coefficient:
        raise ConfigError(
            f"config.training.distillation.source={training.distillation.source!r} teaches nothing "
            "with a coefficient of 0; set training.distillation.coefficient"
        )
    if training.distillation.coefficient and not training.distillation.source:
        raise ConfigError(
            f"config.training.distillation.coefficient={training.distillation.coefficient} needs "
            "a teacher; set training.distillation.source"
        )
    if config.evaluation.num_experts_per_tok > model.num_experts:
        raise ConfigError(
            f"config.evaluation.num_experts_per_tok={config.evaluation.num_experts_per_tok} is "
            f"more than the {model.num_experts} experts of the model"
        )


def validate_environment(config: ConfigDict, num_devices: int) -> None:
    """Refuses what does not fit this machine: devices, data, tokenizer, parent.

    Raises: ConfigError, in one line that says what to change.
    """
    validate_mesh(config, num_devices)
    try:
        sources.check(config.data.source)
        tokenizer = tokenizers.load(config.data.tokenizer)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None
    vocab_size = model_config(config).vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"config.model.vocab_size={vocab_size} is less than the {tokenizer.vocab_size} of "
            f"tokenizer {config.data.tokenizer!r}; set it to {tokenizer.vocab_size}"
        )
    named = [("init.source", source) for source in parents(config)]
    if config.training.distillation.source:
        named.append(("training.distillation.source", config.training.distillation.source))
    for key, source in named:
        if folders.is_folder(source):
            continue
        if not glob.glob(os.path.join(glob.escape(source), "checkpoints", "*")):
            raise ConfigError(
                f"config.{key}={source!r} has no checkpoints; "
                "give the workdir of a run that saved one, or a Hugging Face folder"
            )


def validate_mesh(config: ConfigDict, num_devices: int) -> None:
    """Refuses a mesh that does not fit the devices, and batches that do not fit the mesh.

    Raises: ConfigError, in one line that says what to change.
    """
    try:
        sizes = mesh.axis_sizes(config.mesh.to_dict(), num_devices)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None
    shards = sharding.batch_shards(sizes)
    microbatch = config.training.batch_size // config.training.accumulation_steps
    for key, size in (
        ("training.batch_size (over accumulation_steps)", microbatch),
        ("evaluation.batch_size", config.evaluation.batch_size),
    ):
        if size % shards:
            raise ConfigError(
                f"config.{key}={size} is not divisible by the {shards} batch shards of the mesh; "
                f"use a multiple of {shards}"
            )


# What decides which text a step sees, and whether routing is learned at all: another value would
# make another run of it.
FIXED = (
    *("seed", "training.batch_size", "model.router"),
    *("data.source", "data.tokenizer", "data.sequence_length"),
)


def changes(before: dict, config: ConfigDict) -> list[str]:
    """What `config` changes of the config that a run began with, as "key: old -> new".

    Raises: ConfigError for a change of what must stay in a run that goes on.
    """
    old, new = _flatten(before), _flatten(config.to_dict())
    changed = [key for key in new if key in old and json.dumps(old[key]) != json.dumps(new[key])]
    for key in changed:
        if key in FIXED:
            raise ConfigError(
                f"config.{key}={new[key]!r} differs from the {old[key]!r} that the run in "
                "--workdir began with; give another --workdir"
            )
    return [f"{key}: {old[key]} -> {new[key]}" for key in changed]


def _flatten(section: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in section.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _get(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def save_json(config: ConfigDict, workdir: pathlib.Path) -> None:
    (workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")


def load_json(workdir: pathlib.Path) -> ConfigDict:
    """The config of the run that lives in `workdir`."""
    config = default()
    stored = json.loads((workdir / "config.json").read_text())
    config.update(stored)
    return config
