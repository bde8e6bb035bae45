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
from moe_jax.model.fields import Need
from moe_jax.upcycle import recipes, router_init

SPARSE = Need(lambda run: run.model.num_experts > 0, "config.model.num_experts")
ROUTED = Need(lambda run: run.model.dispatch != "merge", "config.model.dispatch='dropless'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle(Section, path="init.upcycle"):
    """The recipe's parameters are keys of this section too; the recipe defines their defaults."""

    recipe: str = key("", "recipe that makes the model of its parents; empty copies the parent")
    router: str = key(
        "",
        "initialiser of the routers; empty takes the recipe's own",
        checks.OneOf(lambda: ("", *router_init.ROUTER_INITIALISERS, router_init.COPIED)),
        Need(
            lambda run: recipes.RECIPES[run.init.upcycle.recipe].gives == recipes.MIXTURE,
            "an init.upcycle.recipe that makes a mixture",
        ),
    )
    statistics: str = key("", "file that the command collect_statistics wrote")
    optimizer_state: str = key(
        "fresh",
        "fresh starts Adam's moments at zero; copy upcycles those of the parent, which is a run",
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init(Section, path="init"):
    source: str = key(
        "",
        "source of the parameters: empty for random ones, a run's workdir, a Hugging Face folder, "
        "or several, 'A,B,C', for a recipe of several parents; a model without preset and sizes "
        "is that of the first source",
    )
    upcycle: Upcycle = part(Upcycle)

    @property
    def parents(self) -> tuple[str, ...]:
        """The sources of the parameters, as a tuple."""
        return tuple(source for source in self.source.split(",") if source)

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
class Data(Section, path="data", fixed=True):
    source: str = key("embedded", "embedded, tfds:NAME, or a path or glob of .txt and .jsonl files")
    tokenizer: str = key(
        "",
        "bytes, or the path of a tokenizer.json or SentencePiece model; empty is that of "
        "init.source, or bytes without one",
        fixed=False,  # a moved file is the same tokenizer; the tokens themselves are compared
    )
    other_tokenizer: bool = key(
        False,
        "trains with another tokenizer than that of init.source, whose embeddings the model has",
        fixed=False,
    )
    sequence_length: int = key(
        256, "number of tokens in a row; 0 is what the model can read, at most 4096", NOT_NEGATIVE
    )
    validation_fraction: float = key(
        0.05, "share of documents to hold out where no file or split is named validation", SHARE
    )
    cache_dir: str = key(
        "", "folder for tokens and compiled steps; empty is the user's cache folder", fixed=False
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh(Section, path="mesh"):
    """Sizes of the axes of `parallel/mesh.py`; one may be -1, which takes the remaining devices."""

    data: int = key(1, "number of copies of the parameters", checks.AXIS_SIZE)
    fsdp: int = key(-1, "number of parts of the parameters and the batch", checks.AXIS_SIZE)
    expert: int = key(1, "devices of other tokens to spread experts over", checks.AXIS_SIZE)
    tensor: int = key(1, "number of parts of the heads and neurons", checks.AXIS_SIZE)
    edp: int = key(1, "devices of the same tokens to spread experts over", checks.AXIS_SIZE)


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
    beta: float = key(0.99, "share of an adaptive coefficient that a step keeps", DECAY_RATE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance(Section, path="balance", needs=(SPARSE, ROUTED)):
    """Auxiliary losses, and rules outside the loss, that keep all experts in use."""

    load_balancing_coefficient: float = key(
        0.01, "coefficient of the load-balancing loss", NOT_NEGATIVE
    )
    load_balancing_scope: str = key(
        "layer",
        "layer takes the load-balancing loss layer by layer, all_layers over all together",
        one_of("layer", "all_layers"),
    )
    over_layers: str = key(
        "mean",
        "mean or sum of the layers' router losses in the loss: a coefficient is for one of them "
        "(a loss over all_layers together is one)",
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
        "load-balancing loss of Switch or, for squared, of Skywork-MoE",
        one_of("switch", "squared"),
    )
    load_balancing_over: str = key(
        "global",
        "tokens that a router loss is taken over: a device's, those of all devices' microbatch "
        "(global), or the whole batch's (window: one more forward pass if it has microbatches)",
        one_of("device", "global", "window"),
    )
    load_balancing_schedule: str = key(
        "constant",
        "constant, or adaptive: a coefficient per layer, at first load_balancing_coefficient",
        one_of("constant", "adaptive"),
    )
    adaptive: AdaptiveBalance = part(AdaptiveBalance)
    bias_update_rate: float = key(
        0.0, "change of a router's selection bias in a step; 0 turns it off", NOT_NEGATIVE
    )
    importance_coefficient: float = key(0.0, "coefficient of the importance loss", NOT_NEGATIVE)
    mutual_information_coefficient: float = key(
        0.0, "coefficient of the mutual information of tokens and experts", NOT_NEGATIVE
    )
    router_z_coefficient: float = key(0.0, "coefficient of the router z-loss", NOT_NEGATIVE)

    def problems(self) -> Iterator[str]:
        if self.load_balancing_schedule == "adaptive" and self.load_balancing_scope != "layer":
            yield (
                "config.balance.load_balancing_schedule='adaptive' has a coefficient for each "
                "layer; set balance.load_balancing_scope='layer'"
            )


TEACHER = Need(
    lambda run: bool(run.objective.distillation.source), "config.objective.distillation.source"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Section, path="objective.distillation", needs=(TEACHER,)):
    source: str = key("", "teacher of the same vocabulary: a run or a Hugging Face folder")
    coefficient: float = key(0.0, "coefficient of the divergence from the teacher", NOT_NEGATIVE)
    temperature: float = key(1.0, "divisor of the logits of model and teacher", POSITIVE)

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
    name: str = key("next_token", "name of the loss that is minimised")
    logit_z_coefficient: float = key(
        0.0, "coefficient of the z-loss of the output's logits", NOT_NEGATIVE
    )
    distillation: Distillation = part(Distillation)


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

    learning_rate: float = key(3e-4, "largest learning rate", POSITIVE)
    schedule: str = key(
        "cosine",
        "cosine decay, or wsd: constant, then linear over the last decay_steps",
        one_of("cosine", "wsd"),
    )
    warmup_steps: int = key(0, "steps in which the learning rate grows linearly", NOT_NEGATIVE)
    initial_learning_rate_ratio: float = key(
        *(0.0, "first learning rate of the warmup over the largest; 0 is 1 / warmup_steps", SHARE),
        WARMUP,
    )
    decay_steps: int = key(0, "steps of the linear decay of wsd", NOT_NEGATIVE, WSD)
    final_learning_rate_ratio: float = key(0.1, "last learning rate over the largest", SHARE, DECAY)
    beta1: float = key(0.9, "decay of Adam's first moments", DECAY_RATE)
    beta2: float = key(0.95, "decay of Adam's second moments", DECAY_RATE)
    epsilon: float = key(1e-8, "number that Adam adds to the root of second moments", POSITIVE)
    weight_decay: float = key(0.1, "weight decay, decoupled as in AdamW", NOT_NEGATIVE)
    no_weight_decay: str = key(
        r"norm/scale$|bias$|/b[qkvo]$",
        "regular expression of the paths of parameters that do not decay",
        checks.pattern,
        WEIGHT_DECAY,
    )
    gradient_clip_norm: float = key(1.0, "largest norm of all gradients together", POSITIVE)
    gradient_factors: tuple = key((), "rules for gradients before they are clipped", checks.rules)
    weight_decay_factors: tuple = key((), "rules for the weight decay", checks.rules, WEIGHT_DECAY)
    learning_rate_factors: tuple = key(
        (), "rules for the learning rate, weight decay included", checks.rules
    )
    frozen: str = key(
        "", "regular expression of the paths of parameters that are not trained", checks.pattern
    )
    orthogonal_every: int = key(
        0, "steps in a phase of OMoE's alternation; 0 turns it off", NOT_NEGATIVE, SPARSE
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Section, path="training"):
    num_steps: int = key(1000, "number of updates of the parameters", POSITIVE)
    stop_step: int = key(
        0, "step to stop at, with the schedule of num_steps; 0 is num_steps", NOT_NEGATIVE
    )
    batch_size: int = key(16, "sequences in a step, over all devices", POSITIVE, fixed=True)
    accumulation_steps: int = key(1, "number of microbatches in a batch", POSITIVE)
    log_every: int = key(10, "steps between the rows of metrics.jsonl", POSITIVE)
    max_nonfinite_steps: int = key(
        3, "steps in a row without a finite loss or gradient before the run stops", POSITIVE
    )

    def problems(self) -> Iterator[str]:
        if self.batch_size % self.accumulation_steps:
            yield (
                f"config.training.batch_size={self.batch_size} is not divisible by "
                f"accumulation_steps={self.accumulation_steps}; use a multiple of it"
            )
        if self.stop_step > self.num_steps:
            yield (
                f"config.training.stop_step={self.stop_step} is beyond num_steps={self.num_steps}; "
                "lower it, or raise num_steps"
            )

    @property
    def last_step(self) -> int:
        return self.stop_step or self.num_steps


PROMPTS = Need(lambda run: bool(run.evaluation.prompts), "config.evaluation.prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Section, path="evaluation"):
    every_steps: int = key(
        0, "steps between losses of held-out text; 0 for one at the end", NOT_NEGATIVE
    )
    intervals: tuple = key(
        (),
        "pairs of another evaluator's name and the steps between its runs; 0 for one at the end",
        checks.intervals,
    )
    batch_size: int = key(32, "sequences in a batch of held-out text, over all devices", POSITIVE)
    max_batches: int = key(
        0, "batches of held-out text in an evaluation between steps; 0 for all", NOT_NEGATIVE
    )
    final_max_batches: int = key(
        0, "batches of held-out text for the result of the run; 0 for all", NOT_NEGATIVE
    )
    prompts: tuple = key((), "texts that the trained model continues", checks.texts)
    continuation_tokens: int = key(96, "tokens that continue a prompt", POSITIVE, PROMPTS)
    num_experts_per_tok: int = key(
        0, "experts per token in evaluation; 0 for the model's own number", NOT_NEGATIVE, ROUTED
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Section, path="checkpoint"):
    every_steps: int = key(
        1000, "steps between checkpoints; one more is saved at the end", POSITIVE
    )
    keep: int = key(2, "number of checkpoints that are kept, the newest ones", POSITIVE)
