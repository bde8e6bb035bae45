"""The sections of a run's config: all keys with their defaults, explanations and checks.

Each section is a frozen dataclass that checks itself: `Optimizer(learning_rate=-1)` raises
ConfigError. `resolved.Run` holds one of each.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from moe_jax.config import checks
from moe_jax.config.checks import NOT_NEGATIVE, POSITIVE, SHARE, ConfigError, one_of
from moe_jax.upcycle import recipes, router_init


def key(
    default: Any,
    explanation: str,
    check: Callable[[str, Any], None] | None = None,
    *,
    fixed: bool = False,
) -> Any:
    """A field that is a key of the config.

    A `fixed` key decides which text a step sees: it may not change in a run that goes on.
    """
    metadata = {"explanation": explanation, "check": check, "fixed": fixed}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a config, at the dotted `path`, which checks its values when it is made."""

    path: ClassVar[str]

    def __init_subclass__(cls, path: str):
        cls.path = path

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if check := field.metadata.get("check"):
                name = ".".join(filter(None, ("config", self.path, field.name)))
                check(name, getattr(self, field.name))
        for problem in self.problems():
            raise ConfigError(problem)

    def problems(self) -> Iterator[str]:
        """Mistakes that only several values together show."""
        yield from ()


def part(section: type[Section]) -> Any:
    """A field that is a section within a section."""
    return dataclasses.field(default_factory=section)


def section_of(field: dataclasses.Field) -> type[Section] | None:
    """The section that a field is, if it is one."""
    factory = field.default_factory
    return factory if isinstance(factory, type) and issubclass(factory, Section) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle(Section, path="init.upcycle"):
    """Parameters of the recipe are keys of this section too; the recipe has their defaults."""

    recipe: str = key("", "how a mixture is made of its parents; empty: their parameters as is")
    router: str = key(
        "",
        "the initialiser of the routers; empty: the recipe's own",
        checks.OneOf(lambda: ("", *router_init.ROUTER_INITIALISERS, router_init.COPIED)),
    )
    statistics: str = key("", "a file of the command collect_statistics")
    optimizer_state: str = key(
        "fresh",
        "or copy: Adam's moments of the parent, which is a run, take the way of its weights",
        one_of("fresh", "copy"),
    )
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)  # those that are set

    def problems(self) -> Iterator[str]:
        if self.recipe:
            try:
                recipes.check(self.recipe, self.parameters)
            except ValueError as error:
                yield f"config.init.upcycle: {error}"
        own = (field for field in dataclasses.fields(self) if field.metadata)
        changed = [field.name for field in own if getattr(self, field.name) != field.default]
        if (given := [*self.parameters, *changed]) and not self.recipe:
            given = ", ".join(given)
            yield f"config.init.upcycle sets {given} without a recipe; set recipe too"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init(Section, path="init"):
    source: str = key(
        "",
        "where parameters come from: empty is random, else a run's workdir or a Hugging Face "
        "folder; several, 'A,B,C', for a recipe that takes several parents. Without a preset and "
        "sizes the model is that of the Hugging Face folder",
    )
    upcycle: Upcycle = part(Upcycle)

    @property
    def parents(self) -> tuple[str, ...]:
        """The sources of the parameters, one by one."""
        return tuple(source for source in self.source.split(",") if source)

    def problems(self) -> Iterator[str]:
        recipe = self.upcycle.recipe
        if recipe and not self.parents:
            yield f"config.init.upcycle.recipe={recipe!r} needs a parent; set config.init.source"
        several = len(self.parents) > 1
        if several and not recipe:
            yield (
                f"config.init.source={self.source!r} names several models; "
                "set config.init.upcycle.recipe to one that takes several"
            )
        if self.upcycle.optimizer_state == "copy" and (
            several or not recipes.RECIPES[recipe].moments
        ):
            yield (
                "config.init.upcycle.optimizer_state='copy' is for one parent, and not for recipe "
                f"{recipe!r} here; use 'fresh'"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Section, path="data"):
    source: str = key(
        "embedded", "or tfds:NAME, or a path or glob of .txt and .jsonl files", fixed=True
    )
    tokenizer: str = key("bytes", "or the path of a SentencePiece model", fixed=True)
    sequence_length: int = key(256, "tokens of a row", POSITIVE, fixed=True)
    validation_fraction: float = key(
        0.05, "of a path's documents, held out; other sources have a split", SHARE
    )
    cache_dir: str = key("", "of tokens and compiled steps; empty is the user's cache folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh(Section, path="mesh"):
    """Sizes of the axes of `parallel/mesh.py`; -1 fills one of them."""

    data: int = key(1, "copies of the parameters", checks.AXIS_SIZE)
    fsdp: int = key(-1, "cuts parameters and the batch", checks.AXIS_SIZE)
    expert: int = key(1, "spreads experts over devices of other tokens", checks.AXIS_SIZE)
    tensor: int = key(1, "cuts heads and neurons", checks.AXIS_SIZE)
    edp: int = key(1, "spreads experts over devices of the same tokens", checks.AXIS_SIZE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveBalance(Section, path="balance.adaptive"):
    """Of load_balancing_schedule='adaptive': see `training.balancing.adapted`."""

    rate: float = key(0.2, "the coefficient for a drop rate of 1", NOT_NEGATIVE)
    maximum: float = key(0.01, "the largest coefficient", NOT_NEGATIVE)
    beta: float = key(0.99, "the share of a coefficient that a step keeps", SHARE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance(Section, path="balance"):
    """Terms of the loss, and rules beside it, that keep all experts in use."""

    load_balancing_coefficient: float = key(0.01, "of the load-balancing loss", NOT_NEGATIVE)
    load_balancing_scope: str = key(
        "layer", "layer by layer, or all_layers together", one_of("layer", "all_layers")
    )
    load_balancing_divide_by_k: bool = key(True, "so that the loss is 1 at uniform routing")
    load_balancing_form: str = key(
        "switch", "or squared (Skywork-MoE's)", one_of("switch", "squared")
    )
    load_balancing_over: str = key(
        "global",
        "the tokens of a router loss: of a device, of the devices' microbatch (global), or of the "
        "whole batch (window), which takes another forward pass if there are microbatches",
        one_of("device", "global", "window"),
    )
    load_balancing_schedule: str = key(
        "constant",
        "or adaptive: layer by layer, from load_balancing_coefficient on",
        one_of("constant", "adaptive"),
    )
    adaptive: AdaptiveBalance = part(AdaptiveBalance)
    bias_update_rate: float = key(0.0, "of the selection bias of sigmoid_topk", NOT_NEGATIVE)
    importance_coefficient: float = key(0.0, "of the importance loss", NOT_NEGATIVE)
    mutual_information_coefficient: float = key(
        0.0, "of the mutual information of tokens and experts", NOT_NEGATIVE
    )
    router_z_coefficient: float = key(0.0, "of the z-loss of router logits", NOT_NEGATIVE)

    def problems(self) -> Iterator[str]:
        if self.load_balancing_schedule == "adaptive" and self.load_balancing_scope != "layer":
            yield (
                "config.balance.load_balancing_schedule='adaptive' has a coefficient for each "
                "layer; set balance.load_balancing_scope='layer'"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Section, path="objective.distillation"):
    source: str = key("", "the teacher, of the same vocabulary: a run or a Hugging Face folder")
    coefficient: float = key(0.0, "of the divergence from the teacher", NOT_NEGATIVE)
    temperature: float = key(1.0, "by which both models' logits are divided", POSITIVE)

    def problems(self) -> Iterator[str]:
        if self.source and not self.coefficient:
            yield (
                f"config.objective.distillation.source={self.source!r} teaches nothing "
                "with a coefficient of 0; set objective.distillation.coefficient"
            )
        if self.coefficient and not self.source:
            yield (
                f"config.objective.distillation.coefficient={self.coefficient} needs "
                "a teacher; set objective.distillation.source"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(Section, path="objective"):
    name: str = key("next_token", "the loss that is minimised")
    logit_z_coefficient: float = key(0.0, "of the z-loss of the output's logits", NOT_NEGATIVE)
    distillation: Distillation = part(Distillation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(Section, path="optimizer"):
    """AdamW. A rule is (regular expression of parameter paths, factor): the first that matches
    decides, and the factor is 1 where none does."""

    learning_rate: float = key(3e-4, "the peak", POSITIVE)
    schedule: str = key(
        "cosine",
        "or wsd: constant, then linear over the last decay_steps",
        one_of("cosine", "wsd"),
    )
    warmup_steps: int = key(0, "in which the rate grows linearly", NOT_NEGATIVE)
    decay_steps: int = key(0, "of the schedule wsd", NOT_NEGATIVE)
    final_learning_rate_ratio: float = key(0.1, "of the last rate to the peak", SHARE)
    beta1: float = key(0.9, "the decay of Adam's first moments", SHARE)
    beta2: float = key(0.95, "the decay of Adam's second moments", SHARE)
    epsilon: float = key(1e-8, "what Adam adds to the root of second moments", POSITIVE)
    weight_decay: float = key(0.1, "decoupled, as in AdamW", NOT_NEGATIVE)
    no_weight_decay: str = key(
        r"norm/scale$|bias$|/b[qkvo]$", "a regular expression of parameter paths", checks.pattern
    )
    gradient_clip_norm: float = key(1.0, "the largest norm of all gradients together", POSITIVE)
    gradient_factors: tuple = key((), "rules, before gradients are clipped", checks.rules)
    weight_decay_factors: tuple = key((), "rules", checks.rules)
    learning_rate_factors: tuple = key((), "rules, weight decay included", checks.rules)
    frozen: str = key(
        "", "a regular expression of parameter paths that are not trained", checks.pattern
    )
    orthogonal_every: int = key(0, "steps of a phase of OMoE's alternation; 0: off", NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Section, path="training"):
    num_steps: int = key(1000, "updates of the parameters", POSITIVE)
    batch_size: int = key(16, "sequences a step, over all devices", POSITIVE, fixed=True)
    accumulation_steps: int = key(1, "microbatches of a batch", POSITIVE)
    log_every: int = key(10, "steps between the rows of metrics.jsonl", POSITIVE)
    max_nonfinite_steps: int = key(3, "skipped in a row before the run stops", POSITIVE)

    def problems(self) -> Iterator[str]:
        if self.batch_size % self.accumulation_steps:
            yield (
                f"config.training.batch_size={self.batch_size} is not divisible by "
                f"accumulation_steps={self.accumulation_steps}; use a multiple of it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Section, path="evaluation"):
    every_steps: int = key(0, "between losses of held-out text; 0: only at the end", NOT_NEGATIVE)
    intervals: tuple = key(
        (), "pairs of another evaluator's name and its steps; 0: only at the end", checks.intervals
    )
    batch_size: int = key(32, "sequences, over all devices", POSITIVE)
    max_batches: int = key(0, "0 is all of the held-out text", NOT_NEGATIVE)
    prompts: tuple = key((), "texts that the trained model continues")
    continuation_tokens: int = key(96, "of a prompt", POSITIVE)
    num_experts_per_tok: int = key(0, "in evaluation; 0 is the model's", NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Section, path="checkpoint"):
    every_steps: int = key(1000, "between checkpoints; one more is saved at the end", POSITIVE)
    keep: int = key(2, "the newest ones", POSITIVE)
