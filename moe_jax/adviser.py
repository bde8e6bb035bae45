"""Upcycle a dense parent or train from scratch? Computes the cost of each, and applies published
rules.

A rule compares a quantity of the budgets with two thresholds, between which its authors' runs give
no clear answer. Each rule was found with a single family of models; none is a law of nature.
"""

import dataclasses
import functools
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from moe_jax import model
from moe_jax.model.config import (
    ATTENTION_EXPERTS,
    DENSE,
    EXPERTS,
    MOE,
    ROUTER,
    ModelConfig,
    fields_of,
)
from moe_jax.training import flops
from moe_jax.upcycle import plan

UPCYCLE, SCRATCH, UNCLEAR = "upcycle", "scratch", "no clear answer"


def dense_parent(config: ModelConfig, granularity: int = 1) -> ModelConfig:
    """The dense model that a sparse model was, or could have been, upcycled from.

    Its feed-forward is `granularity` times as wide as an expert (G in He et al., arXiv 2410.07524).
    """
    if granularity < 1:
        raise ValueError(f"granularity={granularity} must be at least 1")
    own = fields_of(EXPERTS, ROUTER, ATTENTION_EXPERTS) | {"model_type"}
    plain: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(config) if f.name in own}
    width = granularity * config.expert_size
    return dataclasses.replace(config, intermediate_size=width, **plain)


@dataclasses.dataclass(frozen=True)
class Budgets:
    """The training that a dense parent has had, and the training planned for its sparse child."""

    moe: ModelConfig
    dense: ModelConfig
    moe_tokens: float
    dense_tokens: float
    moe_flops_per_token: float  # in training: forward and backward
    dense_flops_per_token: float

    @property
    def moe_flops(self) -> float:
        return self.moe_tokens * self.moe_flops_per_token

    @property
    def dense_flops(self) -> float:
        return self.dense_tokens * self.dense_flops_per_token


def budgets(
    moe: ModelConfig,
    dense: ModelConfig,
    *,
    moe_tokens: float,
    dense_tokens: float,
    moe_sequence_length: int,
    dense_sequence_length: int,
) -> Budgets:
    """Raises: ValueError, in one line, for models or token counts that cannot be compared."""
    for name, tokens in (("dense_tokens", dense_tokens), ("moe_tokens", moe_tokens)):
        if not 0 < tokens < math.inf:
            raise ValueError(f"{name}={tokens:g} must be a finite number more than 0")
    if MOE not in moe.layer_kinds:
        raise ValueError("config is a dense model's; give the sparse one, with num_experts")
    if set(dense.layer_kinds) != {DENSE}:
        raise ValueError(
            f"dense_config is a sparse model's (num_experts={dense.num_experts}); give its parent's"
        )
    # An expert may be a shard of the parent's feed-forward, or consist of some of its neurons.
    own = plan.OWN | plan.OF_ATTENTION | {"intermediate_size"}
    for name, ours, theirs in plan.differences(dense, moe, own):
        raise ValueError(
            f"dense_config is of no parent of this model: its {name}={theirs}, not {ours}; "
            "give the parent's, or leave it out"
        )
    return Budgets(
        moe=moe,
        dense=dense,
        moe_tokens=moe_tokens,
        dense_tokens=dense_tokens,
        moe_flops_per_token=flops.model_flops(moe, moe_sequence_length),
        dense_flops_per_token=flops.model_flops(dense, dense_sequence_length),
    )


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to spend the MoE's budget; `total_flops` includes the parent's if it needs one."""

    name: str
    tokens: float
    flops: float
    total_flops: float


def ways(b: Budgets) -> tuple[Way, ...]:
    """The parent's own training first, then the ways to get an MoE with or without the parent."""
    own, parent = b.moe_flops, b.dense_flops
    both = own + parent
    return (
        Way("dense parent", b.dense_tokens, parent, parent),
        Way("MoE from scratch", b.moe_tokens, own, own),
        Way("MoE upcycled from the parent", b.moe_tokens, own, both),
        Way("parent trained on, same FLOP", own / b.dense_flops_per_token, own, both),
        Way("MoE from scratch, same total", both / b.moe_flops_per_token, both, both),
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """Upcycle if the quantity is below `upcycle_below`; train from scratch from `scratch_from` on.

    These are nan if a finding is known but its numbers are not: every comparison with nan is False.
    """

    name: str
    source: str
    quantity: str  # a key of QUANTITIES
    upcycle_below: float
    scratch_from: float
    finding: str
    conditions: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    rule: Rule
    value: float
    answer: str  # UPCYCLE, SCRATCH or UNCLEAR


def judge(rule: Rule, b: Budgets) -> Verdict:
    value = QUANTITIES[rule.quantity](b)
    if value < rule.upcycle_below:
        return Verdict(rule, value, UPCYCLE)
    return Verdict(rule, value, SCRATCH if value >= rule.scratch_from else UNCLEAR)


FLOP, TOKENS = "MoE / parent's FLOP", "MoE / parent's tokens"
QUANTITIES = {
    FLOP: lambda b: b.moe_flops / b.dense_flops,
    TOKENS: lambda b: b.moe_tokens / b.dense_tokens,
}
RULES = (
    Rule(
        name="Skywork-MoE",
        source="Wei et al., arXiv 2406.06563",
        quantity=FLOP,
        upcycle_below=1 / 3,  # its "much less", read as half of the tie
        scratch_from=2,
        finding="upcycle where the MoE's cost is much less than the parent's, scratch from twice "
        "it; about equal at 2/3 (below half of that is taken as much less)",
        conditions="0.3 B parent of 300 B tokens, 8 experts top-2; the learning rate has to be "
        "tuned for each case",
    ),
    Rule(
        name="OLMoE",
        source="Muennighoff et al., arXiv 2409.02060",
        quantity=TOKENS,
        upcycle_below=0.25,
        scratch_from=0.30,
        finding="scratch catches up after 25 % of the parent's tokens and is ahead at 30 %",
        conditions="OLMo-1B of 2 T tokens, 8 experts top-2, 0.6 T more; the upcycled arm had to "
        "keep the parent's lack of QK-norm and of truncated initial weights",
    ),
    Rule(
        name="Sparse Upcycling",
        source="Komatsuzaki et al., arXiv 2212.05055",
        quantity=FLOP,
        upcycle_below=1,
        scratch_from=1.2,
        finding="best for 10 to 60 % more budget, ahead of scratch at 100 %, caught up near 120 %",
        conditions="T5 and ViT, 32 experts in half of the layers, expert choice in encoders",
    ),
    Rule(
        name="Joint scaling law",
        source="Liew et al., arXiv 2502.03009",
        quantity=TOKENS,
        upcycle_below=math.nan,
        scratch_from=math.nan,
        finding="the longer the parent was trained, the slower the upcycled model learns, so "
        "upcycling wins below some budget and scratch above it; the fitted constants, which say "
        "where, are not included here, so it gives no verdict",
        conditions="Mixtral-like models, 8 experts top-2, of up to 7 B parameters, and hundreds of "
        "billions of tokens",
    ),
)

CAVEAT = (
    "The rules are of experts copied whole or with noise; Nakamura et al. (arXiv 2502.19261) "
    "report half-redrawn ones ahead of scratch still after 0.5 T tokens on a parent of 1 T."
)


def verdicts(b: Budgets) -> tuple[Verdict, ...]:
    return tuple(judge(rule, b) for rule in RULES)


_SAYS = {  # one rule, several
    UPCYCLE: ("says upcycle", "say upcycle"),
    SCRATCH: ("says from scratch", "say from scratch"),
    UNCLEAR: ("gives no clear answer", "give no clear answer"),
}


def disagreement(found: tuple[Verdict, ...]) -> str:
    """One sentence that states how the rules disagree."""
    by_answer = {a: [v.rule.name for v in found if v.answer == a] for a in _SAYS}
    says = [
        f"{' and '.join(names)} {_SAYS[answer][len(names) > 1]}"
        for answer, names in by_answer.items()
        if names
    ]
    if len(says) == 1:
        return f"They agree: {says[0]}."
    decided = by_answer[UPCYCLE] and by_answer[SCRATCH]
    return f"They {'disagree' if decided else 'do not contradict each other'}: {'; '.join(says)}."


def report(b: Budgets) -> str:
    """The models, costs, rules and verdicts as text for a terminal."""
    found = verdicts(b)
    costs = [
        (
            *(way.name, _count(way.tokens), f"{way.flops:.2e}", f"{way.total_flops:.2e}"),
            *(f"{cost / b.dense_flops:.2f}" for cost in (way.flops, way.total_flops)),
        )
        for way in ways(b)
    ]
    judged = [
        (
            *(v.rule.name, v.answer, v.rule.quantity, f"{v.value:.3g}"),
            *(_limit(v.rule.upcycle_below), _limit(v.rule.scratch_from)),
        )
        for v in found
    ]
    lines = [_described("MoE", b.moe), _described("parent", b.dense), ""]
    lines += aligned(("way", "tokens", "FLOP", "with parent's", "/ parent's", "with it"), costs)
    head = ("rule", "verdict", "judged on", "here", "upcycle <", "scratch >=")
    lines += ["", *aligned(head, judged, left=3)]
    wrapped = functools.partial(
        textwrap.fill, width=96, subsequent_indent="  ", break_on_hyphens=False
    )
    for rule in RULES:
        lines += ["", wrapped(f"{rule.name} ({rule.source}): {rule.finding}.")]
        lines += [wrapped(f"  Found with: {rule.conditions}.")]
    return "\n".join([*lines, "", wrapped(disagreement(found)), wrapped(CAVEAT)])


def as_json(b: Budgets) -> dict:
    found = verdicts(b)
    return {
        "ways": [dataclasses.asdict(way) for way in ways(b)],
        "rules": [
            {name: None if value != value else value for name, value in row.items()}  # nan
            for row in (
                {**dataclasses.asdict(v.rule), "verdict": v.answer, "value": v.value} for v in found
            )
        ],
        "disagreement": disagreement(found),
        "caveat": CAVEAT,
    }


def _described(what: str, config: ModelConfig) -> str:
    total, active = model.count_parameters(config)
    width = f"feed-forward width {config.expert_size}"
    if not config.num_experts:
        return f"{what}: {_count(total)} parameters, {width}"
    return (
        f"{what}: {_count(total)} parameters, {_count(active)} active, "
        f"{config.num_experts} experts top-{config.num_experts_per_tok}, {width}"
    )


def _limit(limit: float) -> str:
    return "-" if math.isnan(limit) else f"{limit:.3g}"


def _count(number: float) -> str:
    """A number with three digits and a unit: 1.25 B."""
    unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if number >= s), (1, ""))
    return f"{number / unit[0]:.3g} {unit[1]}".strip()


def aligned(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: int = 1) -> list[str]:
    """Lines with columns as wide as their widest cell; the first `left` are left-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i < left else '>'}{width}}}" for i, width in enumerate(widths))
    return [form.format(*row).rstrip() for row in (head, *rows)]
