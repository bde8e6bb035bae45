"""The sections of a run's config: all keys with their defaults, explanations and checks.

Each section is a frozen dataclass that checks itself: `Optimizer(learning_rate=-1)` raises
ConfigError. `run.Run` holds one of each.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe_jax.config import checks
from moe_jax.config.checks import DECAY_RATE, NOT_NEGATIVE, POSITIVE, SHARE, one_of
from moe_jax.config.section import Section, key, part
from moe_jax.config.source import Source, source_of
from moe_jax.model.fields import Need
from moe_jax.upcycle import recipes, router_init

SPARSE = Need(lambda run: run.model.num_experts > 0, "config.model.num_experts")
ROUTED = Need(lambda run: run.model.dispatch != "merge", "config.model.dispatch='dropless'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle(Section, path="init.upcycle"):
    """The recipe's parameters are keys of this section too; the recipe defines their defaults."""

    recipe: str = key("", "recipe that makes the model from its parents; empty copies the parent")
    router: str = key(
        "",
        "initialiser of the routers; empty uses the recipe's own",
        checks.OneOf(lambda: ("", *router_init.ROUTER_INITIALISERS, router_init.COPIED)),
        Need(
            lambda run: recipes.RECIPES[run.init.upcycle.recipe].gives == recipes.MIXTURE,
            "an init.upcycle.recipe that makes a mixture",
        ),
    )
    statistics: str = key("", "file written by the command collect_statistics")
    optimizer_state: str = key(
        "fresh",
        "fresh: Adam's moments start at zero; copy: upcycles those of the parent, a run",
        one_of("fresh", "copy"),
    )
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)  # only those that are set

    def problems(self) -> Iterator[str]:
        if self.recipe:
            try:
                recipes.check(self.recipe, self.parameters)
            except ValueError as error:
                yield f"config.init.upcycle: {error}"
        own = (field for field in dataclasses.fields(self) if field.metadata)
        changed = [field.name for field in own if getattr(self, field.name) != field.default]
        if not self.recipe and (given := ", ".join([*self.parameters, *changed])):
            yield f"config.init.upcycle sets {given} without a recipe; set recipe too"


def sources_in(text: str) -> tuple[Source, ...]:
    """The models that `init.source` names."""
    return tuple(source_of(name) for name in text.split(",") if name)


def parents_in(text: str) -> tuple[str, ...]:
    """The folders of the models that `init.source` names."""
    return tuple(str(source.folder) for source in sources_in(text))


GIVEN = Need(
    lambda run: bool(
        run.init.source or run.objective.distillation.source or run.objective.preference.reference
    ),
    "config.init.source",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init(Section, path="init"):
    source: str = key(
        "",
        "source of the parameters: empty for random ones, a run's workdir (RUN@STEP for its "
        "checkpoint of a step), a Hugging Face folder, or several, 'A,B,C', for a recipe with "
        "several parents; if model has neither preset nor sizes, it is the model of the first",
    )
    allow_nonfinite: bool = key(
        False,
        "only warns of NaN and infinite values in a parent or teacher, which are refused otherwise",
        None,
        GIVEN,
    )
    upcycle: Upcycle = part(Upcycle)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of the parameters, as a tuple."""
        return sources_in(self.source)

    @property
    def parents(self) -> tuple[str, ...]:
        """The folders of the sources."""
        return parents_in(self.source)

    def problems(self) -> Iterator[str]:
        recipe, several = self.upcycle.recipe, len(self.parents) > 1
        if recipe and not self.parents:
            yield f"config.init.upcycle.recipe={recipe!r} needs a parent; set config.init.source"
        if several and not recipe:
            yield (
                f"config.init.source={self.source!r} names several models; "
                "set config.init.upcycle.recipe to one that takes several"
            )
        copy = self.upcycle.optimizer_state == "copy"
        if copy and (several or not recipes.RECIPES[recipe].moments):
            yield (
                "config.init.upcycle.optimizer_state='copy' is for one parent, and not for recipe "
                f"{recipe!r} here; use 'fresh'"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh(Section, path="mesh"):
    """Sizes of the axes of `parallel/mesh.py`; one may be -1, which takes the remaining devices."""

    data: int = key(1, "number of replicas of the parameters", checks.AXIS_SIZE)
    fsdp: int = key(-1, "number of shards of the parameters and the batch", checks.AXIS_SIZE)
    expert: int = key(1, "devices with different tokens to spread experts over", checks.AXIS_SIZE)
    tensor: int = key(1, "number of shards of heads and neurons", checks.AXIS_SIZE)
    edp: int = key(1, "devices with the same tokens to spread experts over", checks.AXIS_SIZE)


ADAPTIVE = Need(
    lambda run: run.balance.load_balancing_schedule == "adaptive",
    "config.balance.load_balancing_schedule='adaptive'",
)
SWITCH = Need(
    lambda run: run.balance.load_balancing_form == "switch",
    "config.balance.load_balancing_form='switch'",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveBalance(Section, path="balance.adaptive", needs=(SPARSE, ROUTED, ADAPTIVE)):
    """Constants of load_balancing_schedule='adaptive': see `training.balance.adapted`."""

    rate: float = key(0.2, "adaptive coefficient at a drop rate of 1", NOT_NEGATIVE)
    maximum: float = key(0.01, "largest adaptive coefficient", NOT_NEGATIVE)
    beta: float = key(0.99, "share of an adaptive coefficient that each step keeps", DECAY_RATE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance(Section, path="balance", needs=(SPARSE, ROUTED)):
    """Auxiliary losses, and rules outside the loss, that keep all experts in use."""

    load_balancing_coefficient: float = key(
        0.01, "coefficient of the load-balancing loss", NOT_NEGATIVE
    )
    load_balancing_scope: str = key(
        "layer",
        "layer computes the load-balancing loss per layer, all_layers over all layers together",
        one_of("layer", "all_layers"),
    )
    over_layers: str = key(
        "mean",
        "mean or sum of the router losses over layers; a coefficient applies to one layer's loss "
        "(a loss over all_layers counts as one layer's)",
        one_of("mean", "sum"),
    )
    load_balancing_divide_by_k: bool = key(
        True,
        "divides the load-balancing loss by k, so that it is 1 at uniform routing",
        None,
        SWITCH,
    )
    load_balancing_form: str = key(
        "switch",
        "form of the load-balancing loss: Switch's or, for squared, Skywork-MoE's",
        one_of("switch", "squared"),
    )
    load_balancing_over: str = key(
        "global",
        "tokens that a router loss is computed over: one row's (sequence), one device's, those of "
        "the microbatch of all devices (global), or the whole batch's (window: one more forward "
        "pass if accumulating)",
        one_of("sequence", "device", "global", "window"),
    )
    load_balancing_schedule: str = key(
        "constant",
        "constant, or adaptive: a coefficient per layer, first load_balancing_coefficient",
        one_of("constant", "adaptive"),
    )
    adaptive: AdaptiveBalance = part(AdaptiveBalance)
    bias_update: str = key(
        "sign",
        "update of the selection biases: sign moves them by bias_update_rate towards an even load; "
        "quantile solves for them from each batch's scores",
        one_of("sign", "quantile"),
    )
    bias_update_rate: float = key(
        *(0.0, "change of a router's selection bias per step; 0 turns it off", NOT_NEGATIVE),
        Need(lambda run: run.balance.bias_update == "sign", "config.balance.bias_update='sign'"),
    )
    orthogonality_coefficient: float = key(
        0.0, "coefficient of SimBal's penalty on the routers' matrices", NOT_NEGATIVE
    )
    importance_coefficient: float = key(0.0, "coefficient of the importance loss", NOT_NEGATIVE)
    mutual_information_coefficient: float = key(
        0.0, "coefficient of the mutual information between tokens and experts", NOT_NEGATIVE
    )
    router_z_coefficient: float = key(0.0, "coefficient of the router z-loss", NOT_NEGATIVE)

    def problems(self) -> Iterator[str]:
        if self.load_balancing_schedule == "adaptive" and self.load_balancing_scope != "layer":
            yield (
                "config.balance.load_balancing_schedule='adaptive' has a coefficient for each "
                "layer; set balance.load_balancing_scope='layer'"
            )


WSD = Need(lambda run: run.optimizer.schedule == "wsd", "config.optimizer.schedule='wsd'")
DECAY = Need(
    lambda run: run.optimizer.schedule != "wsd" or run.optimizer.decay_steps > 0,
    "config.optimizer.decay_steps",
)
WARMUP = Need(lambda run: run.optimizer.warmup_steps > 0, "config.optimizer.warmup_steps")
WEIGHT_DECAY = Need(lambda run: run.optimizer.weight_decay > 0, "config.optimizer.weight_decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(Section, path="optimizer"):
    """AdamW. A rule is (regular expression of parameter paths, factor): the first that matches
    decides, and the factor is 1 if none does."""

    learning_rate: float = key(3e-4, "peak learning rate", POSITIVE)
    schedule: str = key(
        "cosine",
        "cosine decay, or wsd: constant, then linear decay over the last decay_steps",
        one_of("cosine", "wsd"),
    )
    warmup_steps: int = key(0, "steps of linear learning-rate warmup", NOT_NEGATIVE)
    initial_learning_rate_ratio: float = key(
        *(0.0, "first learning rate relative to the peak; 0 means 1 / warmup_steps", SHARE),
        WARMUP,
    )
    decay_steps: int = key(0, "steps of the linear decay with wsd", NOT_NEGATIVE, WSD)
    final_learning_rate_ratio: float = key(
        0.1, "last learning rate relative to the peak", SHARE, DECAY
    )
    beta1: float = key(0.9, "decay of Adam's first moments", DECAY_RATE)
    beta2: float = key(0.95, "decay of Adam's second moments", DECAY_RATE)
    epsilon: float = key(1e-8, "Adam's epsilon, added to the root of the second moments", POSITIVE)
    weight_decay: float = key(0.1, "weight decay, decoupled as in AdamW", NOT_NEGATIVE)
    no_weight_decay: str = key(
        r"norm/scale$|bias$|/b[qkvo]$",
        "regular expression for the paths of parameters without weight decay",
        checks.pattern,
        WEIGHT_DECAY,
    )
    gradient_clip_norm: float = key(1.0, "largest global norm of the gradients", POSITIVE)
    gradient_factors: tuple = key((), "rules for gradients, before clipping", checks.rules)
    weight_decay_factors: tuple = key((), "rules for the weight decay", checks.rules, WEIGHT_DECAY)
    learning_rate_factors: tuple = key(
        (), "rules for the learning rate, which also scale the weight decay", checks.rules
    )
    frozen: str = key(
        "", "regular expression for the paths of parameters that are not trained", checks.pattern
    )
    orthogonal_every: int = key(
        0, "steps per phase of OMoE's alternation; 0 turns it off", NOT_NEGATIVE, SPARSE
    )


LOGGED = Need(lambda run: bool(run.training.log_to), "config.training.log_to")


LORA = Need(lambda run: run.lora.rank > 0, "config.lora.rank")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Section, path="lora", fixed=True):
    """LoRA (Hu et al., arXiv 2106.09685): x W + alpha / rank · (x A) B, with A and B trained."""

    rank: int = key(0, "columns of A and rows of B; 0 turns LoRA off", NOT_NEGATIVE, ROUTED)
    alpha: float = key(16.0, "numerator of the scale alpha / rank", POSITIVE, LORA)
    targets: str = key(
        r"/(w[qkvo]|gate|up|down)$",
        "regular expression for the paths of the matrices that get a pair; an expert gets its own",
        checks.pattern,
        LORA,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Section, path="training"):
    num_steps: int = key(
        1000, "number of updates of the parameters; 0 if num_epochs is set", NOT_NEGATIVE
    )
    num_epochs: float = key(
        0.0,
        "passes over the text, in place of num_steps, which is set to them, rounded up, when the "
        "text is known",
        NOT_NEGATIVE,
    )
    stop_step: int = key(
        0, "step to stop at, on the schedule of num_steps; 0 means num_steps", NOT_NEGATIVE
    )
    batch_size: int = key(16, "sequences per step, over all devices", POSITIVE, fixed=True)
    accumulation_steps: int = key(1, "number of microbatches per batch", POSITIVE)
    log_every: int = key(10, "steps between rows of metrics.jsonl", POSITIVE)
    log_to: tuple = key(
        ("tensorboard",),
        "names of back ends that get the numbers of metrics.jsonl too: tensorboard, wandb, trackio",
        checks.texts,
    )
    run_group: str = key(
        "",
        "group of the run in those back ends; a sweep groups runs that differ in seeds",
        None,
        LOGGED,
    )
    max_nonfinite_steps: int = key(
        3,
        "consecutive steps with a non-finite loss or gradient after which the run stops",
        POSITIVE,
    )

    def problems(self) -> Iterator[str]:
        if self.batch_size % self.accumulation_steps:
            yield (
                f"config.training.batch_size={self.batch_size} is not divisible by "
                f"accumulation_steps={self.accumulation_steps}; use a multiple of it"
            )
        if bool(self.num_steps) == bool(self.num_epochs):
            yield (
                f"config.training.num_steps={self.num_steps} and num_epochs={self.num_epochs}: set "
                "exactly one of them to more than 0"
            )
        if self.num_steps and self.stop_step > self.num_steps:
            yield (
                f"config.training.stop_step={self.stop_step} is beyond num_steps={self.num_steps}; "
                "lower it, or raise num_steps"
            )

    @property
    def last_step(self) -> int:
        return self.stop_step or self.num_steps
