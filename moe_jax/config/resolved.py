"""A run's settings: its config, resolved once into dataclasses of which functions take a part."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from ml_collections import ConfigDict

from moe_jax import spelling
from moe_jax.config import checks, sections
from moe_jax.config.checks import ConfigError
from moe_jax.config.sections import Section, key, part, section_of
from moe_jax.hf import configs as hf_configs
from moe_jax.hf import folders
from moe_jax.model.config import ModelConfig
from moe_jax.model.needs import no_effect, without_effect
from moe_jax.model.presets import PRESETS
from moe_jax.model.router import ROUTERS
from moe_jax.upcycle import recipes

Part = TypeVar("Part", bound=Section)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Section, path=""):
    """All settings of a run. In a config `model` is a preset and the fields that differ from it,
    or all fields that ModelConfig has no default for."""

    seed: int = key(
        0, "seed of the parameters and of the order of the text", checks.seed, fixed=True
    )
    # The router decides whether routing is learned at all.
    model: ModelConfig = dataclasses.field(metadata={"fixed": ("router",)})
    init: sections.Init = part(sections.Init)
    data: sections.Data = part(sections.Data)
    mesh: sections.Mesh = part(sections.Mesh)
    optimizer: sections.Optimizer = part(sections.Optimizer)
    training: sections.Training = part(sections.Training)
    balance: sections.Balance = part(sections.Balance)
    objective: sections.Objective = part(sections.Objective)
    evaluation: sections.Evaluation = part(sections.Evaluation)
    checkpoint: sections.Checkpoint = part(sections.Checkpoint)
    # The settings come from this config, which is stored in the run's workdir and checkpoints.
    config: ConfigDict = dataclasses.field(default_factory=ConfigDict, compare=False, repr=False)

    def problems(self) -> Iterator[str]:
        with checks.refusing("config.data.sequence_length: "):
            self.model.check_rows(self.data.sequence_length)
        optimizer, num_steps = self.optimizer, self.training.num_steps
        if optimizer.warmup_steps + optimizer.decay_steps > num_steps:
            yield (
                f"config.optimizer: warmup_steps={optimizer.warmup_steps} and "
                f"decay_steps={optimizer.decay_steps} exceed training.num_steps={num_steps}"
            )
        model, rate = self.model, self.balance.bias_update_rate
        if rate and model.num_experts and "bias" not in ROUTERS[model.router].leaves:
            biased = " or ".join(repr(n) for n, row in ROUTERS.items() if "bias" in row.leaves)
            yield (
                f"config.balance.bias_update_rate={rate} needs a router with a bias, "
                f"not model.router={model.router!r}; use {biased}, or a rate of 0"
            )
        yield from _problems_of_merging(model, self.data.sequence_length)
        yield from _problems_of_top_1(model, optimizer.frozen)
        if self.evaluation.num_experts_per_tok > model.num_experts:
            yield (
                f"config.evaluation.num_experts_per_tok={self.evaluation.num_experts_per_tok} is "
                f"more than the {model.num_experts} experts of the model"
            )
        recipe = self.init.upcycle.recipe
        if recipe and not model.num_experts and recipes.RECIPES[recipe].gives == recipes.MIXTURE:
            yield (
                f"config.init.upcycle.recipe={recipe!r} makes a sparse model; "
                "set config.model.num_experts"
            )


def _problems_of_merging(model: ModelConfig, T: int) -> Iterator[str]:
    S = model.merge_segment_length
    if model.num_experts and model.dispatch == "merge" and (T % S or T == S):
        yield (
            f"config.model.merge_segment_length={S} does not cut rows of {T} tokens into two or "
            "more segments, of which the first sees its own later tokens; use a smaller divisor of "
            "data.sequence_length"
        )


def _problems_of_top_1(model: ModelConfig, frozen: str) -> Iterator[str]:
    to_be_trained = not (frozen and re.search(frozen, "moe/router/kernel"))
    if model.weight_is_constant and to_be_trained:
        yield (
            f"config.model.num_experts_per_tok=1 with weights that sum to one "
            f"(router={model.router!r}, norm_topk_prob={model.norm_topk_prob}) gives the router "
            "no gradient; use router='softmax_topk' with norm_topk_prob=False (Switch), 2 experts "
            "per token, or keep the router as it is by optimizer.frozen='moe/router'"
        )


def resolve(config: ConfigDict) -> Run:
    """The settings that a config gives, with the ModelConfig of its model.

    Raises: ConfigError, in one line that says what to change, for any mistake that the config
      itself shows, a key that is set and that nothing reads among them.
    """
    run = of_stored(config)
    given = [n for n, v in config.model.items() if n != "preset" and v is not None]
    of_model = without_effect(run.model, given, "config.model.")
    for line in (*of_model, *_without_effect(run, run)):
        raise ConfigError(line)
    return run


def _without_effect(run: Run, section: Section) -> Iterator[str]:
    """A line for each key of the section, and of those in it, that is set and not read."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        # Where a number may not be negative, 0 asks for nothing.
        asks = value != field.default and (
            value or field.metadata.get("check") != checks.NOT_NEGATIVE
        )
        if isinstance(value, Section):
            yield from _without_effect(run, value)
        elif "explanation" in field.metadata and asks:
            needs = (*section.needs, *field.metadata["needs"])
            yield from no_effect(f"config.{section.path}.{field.name}", value, needs, run)


def of_stored(config: ConfigDict) -> Run:
    """`resolve` for a config that a run has stored, which may have keys that nothing reads."""
    values = _with_tuples(config.to_dict())
    upcycle = values["init"]["upcycle"]
    own = sections.key_names(sections.Upcycle)
    values["init"]["upcycle"] = {
        **{name: value for name, value in upcycle.items() if name in own},
        "parameters": {n: v for n, v in upcycle.items() if n not in own and v is not None},
    }
    values["model"] = _model(values["model"], _section(sections.Init, values["init"]))
    return _section(Run, {**values, "config": config})


def _section(kind: type[Part], values: dict[str, Any]) -> Part:
    parts = {
        field.name: _section(section, values[field.name])
        for field in dataclasses.fields(kind)
        if (section := section_of(field))
    }
    return kind(**{**values, **parts})


def _with_tuples(value: Any) -> Any:
    """`value` with tuples in the place of the lists that JSON has for them."""
    if isinstance(value, dict):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value


def _model(section: dict[str, Any], init: sections.Init) -> ModelConfig:
    fields = {name: value for name, value in section.items() if value is not None}
    preset = fields.pop("preset")
    if preset and preset not in PRESETS:
        raise ConfigError(spelling.unknown("config.model.preset", preset, PRESETS))
    base = dataclasses.asdict(PRESETS[preset]) if preset else {}
    source = init.parents[0] if init.parents else ""
    # A run's own config has the fields of its model; a Hugging Face folder gives those of its own.
    if source and not preset and "vocab_size" not in fields and folders.is_folder(source):
        with checks.refusing(f"config.init.source={source}: "):
            parent = hf_configs.read(hf_configs.load_json(pathlib.Path(source)))
        base = dataclasses.asdict(parent)
        if "num_experts" in fields:
            base["model_type"] = None
    try:
        with checks.refusing("config.model."):
            return ModelConfig(**{**base, **fields})
    except TypeError as error:
        missing = str(error).split("argument")[-1].strip("s: ")
        raise ConfigError(
            f"config.model lacks {missing}; set them, or config.model.preset"
        ) from None
