"""The description of a model: one frozen dataclass."""

import dataclasses
from typing import NamedTuple

from moe_jax.model.fields import (
    ARCHITECTURE,
    ATTENTION_EXPERTS,
    CAPACITY,
    COMPUTATION,
    EXPERTS,
    GROUPS,
    MERGED,
    ORIGIN,
    ROPE,
    ROTARY,
    ROUTED,
    ROUTER,
    SLIDING,
    SPARSE,
    field,
    out_of_range,
    unread,
)
from moe_jax.model.initialisation import INITIALIZERS
from moe_jax.model.rope import ROPES
from moe_jax.model.router import ROUTERS

DENSE, MOE = "dense", "moe"
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


class BlockKind(NamedTuple):
    """The ways in which the layers of one model differ."""

    feed_forward: str  # DENSE or MOE
    window: int | None  # number of keys a query attends to, its own included; None is all up to it


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer; the fields have their Hugging Face names.

    Hashable, so it can be a static argument of a jitted function. A field left at None takes its
    value from the others; the properties below give the value in force.

    Raises: ValueError, in one line, for sizes that no model can have.
    """

    vocab_size: int = field("number of token ids", at_least=1)
    hidden_size: int = field("width of the residual stream", at_least=1)
    intermediate_size: int = field("width of a dense feed-forward", at_least=1)
    # Bounded, because layers are listed one by one and grouped by comparing them.
    num_hidden_layers: int = field("number of layers", at_least=1, at_most=256)
    num_attention_heads: int = field("number of query heads", at_least=1)
    num_key_value_heads: int | None = field(
        "number of key and value heads; none means num_attention_heads", None, at_least=1
    )
    head_dim: int | None = field(
        "size of a head; none means hidden_size / num_attention_heads", None, at_least=1
    )
    max_position_embeddings: int = field("length limit of learned positions", 4096, at_least=1)
    tie_word_embeddings: bool = field("output matrix is the transposed embedding", False)
    initializer_range: float = field("standard deviation of initial weights", 0.02, ORIGIN)
    initializer: str = field(
        "distribution of initial weights", "normal", ORIGIN, choices=INITIALIZERS
    )
    model_type: str | None = field(
        "Hugging Face family to save as; none means any that can hold the model", None, ORIGIN
    )

    norm: str = field(
        "kind of norm; layer_1p is a LayerNorm that stores its scale minus 1 (Nemotron)",
        "rms",
        choices=("rms", "layer", "layer_1p"),
    )
    rms_norm_eps: float = field("epsilon of the norm, of any kind", 1e-5, positive=True)
    hidden_act: str = field(
        "activation of feed-forwards",
        "silu",
        choices=("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu2"),
    )
    gated_mlp: bool = field("feed-forwards are down(act(gate x) * up x), not down(act(up x))", True)
    mlp_bias: bool = field("feed-forwards have biases", False)

    attention_bias: str = field(
        "biases; qkv: as in Qwen2; all: output projection too",
        "none",
        choices=("none", "qkv", "all"),
    )
    qk_norm: str = field(
        "norm of queries and keys: per head (Qwen3) or over all heads (full, OLMoE)",
        "none",
        choices=("none", "head", "full"),
    )
    clip_qkv: float | None = field("limit to clip queries, keys, values to", None, positive=True)
    sliding_window: int | None = field(
        "keys that a query sees, its own included", None, ARCHITECTURE, SLIDING, at_least=1
    )
    layer_types: tuple[str, ...] | None = field(
        "full_attention or sliding_attention per layer; none: all slide if sliding_window is set",
        None,
    )

    position_embedding: str = field(
        "kind of positions; learned ones as in GPT-2", "rotary", choices=("rotary", "learned")
    )
    rope_theta: float = field(
        "base of the rotary frequencies", 10_000.0, ARCHITECTURE, ROTARY, positive=True
    )
    partial_rotary_factor: float = field(
        "share of each head that is rotated", 1.0, ARCHITECTURE, ROTARY, positive=True
    )
    rope_type: str = field(
        "RoPE scaling method for longer sequences", "default", ARCHITECTURE, ROTARY, choices=ROPES
    )
    rope_scaling_factor: float = field("RoPE scaling factor", 1.0, ROPE, positive=True)
    rope_original_length: int = field("sequence length before RoPE scaling", 8192, ROPE, at_least=1)
    rope_low_freq_factor: float = field("llama3: for low frequencies", 1.0, ROPE, positive=True)
    rope_high_freq_factor: float = field("llama3: for high frequencies", 4.0, ROPE, positive=True)
    rope_attention_factor: float | None = field(
        "factor on queries and keys; none means YaRN's formula", None, ROPE, positive=True
    )
    rope_beta_fast: float = field("YaRN: for high frequencies", 32.0, ROPE, positive=True)
    rope_beta_slow: float = field("YaRN: for low frequencies", 1.0, ROPE, positive=True)
    rope_truncate: bool = field("YaRN: rounds the ends of the ramp to whole dimensions", True, ROPE)

    num_experts: int = field("experts per sparse layer; 0 is a dense model", 0, EXPERTS, at_least=0)
    num_experts_per_tok: int = field("experts per token", 2, EXPERTS, ROUTED, at_least=1)
    moe_intermediate_size: int | None = field(
        "width of an expert; none means intermediate_size", None, EXPERTS, at_least=1
    )
    shared_expert_intermediate_size: int | None = field(
        "width of a shared expert, which every token uses", None, EXPERTS, at_least=1
    )
    router: str = field("how experts are chosen", "softmax_topk", EXPERTS, choices=ROUTERS)
    norm_topk_prob: bool = field("divides a token's weights by their sum", True, ROUTER)
    gate_norm_std: float | None = field(
        "deviation that router logits are scaled to (Skywork-MoE)", None, ROUTER, positive=True
    )
    num_expert_groups: int = field("number of groups of experts", 1, ROUTER, at_least=1)
    num_groups_per_tok: int = field(
        "number of groups that a token chooses experts from", 1, ROUTER, GROUPS, at_least=1
    )
    routed_scaling_factor: float = field("factor on the weights", 1.0, ROUTER, positive=True)
    router_parameters: tuple[tuple[str, float | int | str | bool], ...] = field(
        "(name, value) pairs of parameters that only the chosen router has", (), ROUTER
    )
    dispatch: str = field(
        "capacity: experts drop tokens that do not fit; merge: Lory's merged expert",
        "dropless",
        EXPERTS,
        choices=("dropless", "capacity", "merge"),
    )
    merge_segment_length: int = field(
        "tokens that share one merged expert", 256, EXPERTS, MERGED, at_least=1
    )
    capacity_factor: float = field(
        "capacity relative to an even load; dropless: used for the reported virtual drop rate",
        1.25,
        EXPERTS,
        ROUTED,
        positive=True,
    )
    min_capacity: int = field(
        "smallest capacity of an expert, in tokens", 4, EXPERTS, CAPACITY, at_least=1
    )
    token_priority: str = field(
        "order in which an expert accepts tokens until it is full",
        "position",
        EXPERTS,
        CAPACITY,
        choices=("position", "random"),
    )
    num_attention_experts: int = field(
        "number of attention experts (BAM); 0 is plain attention",
        0,
        ATTENTION_EXPERTS,
        at_least=0,
    )
    layers: tuple[str, ...] | None = field(
        "dense or moe per layer; none: all moe if there are experts, else all dense", None, EXPERTS
    )

    # The following fields say how the model is computed, not which function it computes.
    dtype: str = field(
        "dtype of the computation; auto in a config: bfloat16 if the hardware has units for it",
        "float32",
        COMPUTATION,
        choices=("float32", "bfloat16"),
    )
    remat: str = field(
        "what is kept for the backward pass; see model/remat.py",
        "full",
        COMPUTATION,
        choices=("none", "full", "save_experts", "save_dots", "offload_experts", "offload_dots"),
    )
    expert_parallel: str = field(
        "how tokens reach experts on other devices; see model/exchange.py",
        "auto",
        COMPUTATION,
        SPARSE,
        choices=("auto", "fsdp", "ring", "all_to_all"),
    )
    grouped_matmul: str = field("implementation of experts' matmuls", "auto", COMPUTATION, SPARSE)
    attention: str = field("implementation of attention", "auto", COMPUTATION)

    def __post_init__(self):
        for name in ("layers", "layer_types"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        pairs = tuple(sorted(dict(self.router_parameters).items()))
        object.__setattr__(self, "router_parameters", pairs)
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self):
        if self.dtype == "float16":
            unscaled = "would need a loss scale, which training does not have"
            yield f"dtype='float16' {unscaled}; use bfloat16, or float32 on a T4 or V100 GPU"
        yield from out_of_range(self)
        yield from self._problems_of_sizes()
        yield from unread(self, "rope_type", ROPES, sorted(fields_of(ROPE)))
        yield from ROPES[self.rope_type].problems(self)
        yield from self._problems_of_layers()
        if self.num_experts:
            yield from self._problems_of_routing()

    def _problems_of_sizes(self):
        N, K = self.num_attention_heads, self.num_kv_heads
        if self.head_dim is None and self.hidden_size % N:
            yield (
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={N}; "
                "change one or set head_dim"
            )
        if N % K:
            yield f"num_attention_heads={N} is not divisible by num_key_value_heads={K}"
        if self.position_embedding == "rotary" and not (
            2 <= self.rotary_size <= self.head_size and self.rotary_size % 2 == 0
        ):
            yield (
                f"partial_rotary_factor={self.partial_rotary_factor} rotates {self.rotary_size} of "
                f"head_dim={self.head_size}; rotary positions need an even number from 2 to it"
            )
        A, E = self.num_experts_per_tok, self.num_experts
        if 0 < E < A:
            yield f"num_experts_per_tok={A} is more than num_experts={E}; choose at most {E}"

    def _problems_of_layers(self):
        kinds_of = {"layers": (DENSE, MOE), "layer_types": (FULL_ATTENTION, SLIDING_ATTENTION)}
        for name, kinds in kinds_of.items():
            value = getattr(self, name)
            if value is None:
                continue
            if len(value) != self.num_hidden_layers:
                yield (
                    f"{name} names {len(value)} layers but "
                    f"num_hidden_layers={self.num_hidden_layers}; make them agree"
                )
            for kind in set(value) - set(kinds):
                yield f"{name} has the kind {kind!r}; use {kinds[0]!r} or {kinds[1]!r}"
        if self.layers is not None and (MOE in self.layers) != (self.num_experts > 0):
            yield (
                f"num_experts={self.num_experts} does not fit layers={self.layers}; "
                f"{MOE!r} layers need num_experts >= 1, all-{DENSE!r} models num_experts=0"
            )
        if self.sliding_window is None and SLIDING_ATTENTION in (self.layer_types or ()):
            yield f"layer_types has {SLIDING_ATTENTION!r} layers; set sliding_window"

    def _problems_of_routing(self):
        row = ROUTERS[self.router]
        names = sorted(fields_of(ROUTER) - {"router_parameters"})  # these are checked below
        yield from unread(self, "router", ROUTERS, names)
        for name, value in self.router_parameters:
            if name not in row.parameters:
                takes = ", ".join(row.parameters) or "none"
                yield f"router_parameters has {name!r}, but router={self.router!r} takes {takes}"
            elif type(value) is not (kind := type(row.parameters[name])) and not (
                kind is float and type(value) is int
            ):
                yield f"router_parameters: {name}={value!r} must be of the type {kind.__name__}"
        E, G = self.num_experts, self.num_expert_groups
        if E % G:
            yield f"num_experts={E} is not divisible by num_expert_groups={G}"
        yield from row.problems(self)
        if E == 1 and self.gate_norm_std is not None:
            yield "gate_norm_std needs num_experts of 2 or more: one logit has no deviation"
        if self.dispatch == "merge" and self.router != "softmax_topk":
            yield f"dispatch='merge' weighs experts by their softmax, not by {self.router!r}"
        if self.expert_parallel == "ring" and self.dispatch != "dropless":
            yield (
                f"expert_parallel='ring' is dropless; dispatch={self.dispatch!r} needs 'fsdp' "
                "or, with 'capacity', 'all_to_all'"
            )
        if self.expert_parallel == "all_to_all" and self.dispatch == "merge":
            yield "dispatch='merge' averages all experts; it needs expert_parallel='fsdp'"
        if self.dispatch == "merge" and self.shared_expert_intermediate_size:
            yield "dispatch='merge' has no shared expert; leave shared_expert_intermediate_size out"

    @property
    def num_kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """The number of dimensions of a head that rotary positions rotate."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def active_experts(self) -> int:
        """The number of experts that process each token; merged experts count as one."""
        return 1 if self.dispatch == "merge" else self.num_experts_per_tok

    @property
    def weight_is_constant(self) -> bool:
        """True if each token goes to one expert whose weight is divided by itself.

        p / p is 1 whatever the logits, so the language-model loss gives the router no gradient: at
        most the balance losses train it.
        """
        row = ROUTERS[self.router]
        chooses = self.num_experts > 1 and self.dispatch != "merge" and row.learned and row.causal
        return chooses and self.num_experts_per_tok == 1 and row.sum_is_fixed(self)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return self.layers or (MOE if self.num_experts else DENSE,) * self.num_hidden_layers

    @property
    def block_kinds(self) -> tuple[BlockKind, ...]:
        types = self.layer_types or (SLIDING_ATTENTION,) * self.num_hidden_layers
        windows = (self.sliding_window if t == SLIDING_ATTENTION else None for t in types)
        return tuple(map(BlockKind, self.layer_kinds, windows))

    @property
    def implementations(self) -> dict[str, str]:
        """The implementation of each op that this model calls, or for which one was named."""
        ops = {"attention": self.attention, "cross_entropy": "auto"}
        if self.num_experts or self.grouped_matmul != "auto":
            ops["grouped_matmul"] = self.grouped_matmul
        return ops

    def check_rows(self, length: int, fix: str = "") -> None:
        """Raises: ValueError, with the fix, for rows longer than the learned positions."""
        limit = self.max_position_embeddings
        if self.position_embedding == "learned" and length > limit:
            raise ValueError(
                f"rows of {length} tokens are beyond the model's {limit} learned positions; "
                f"{fix or f'use a sequence length of at most {limit}'}"
            )

    def to_moe(self, *, num_experts: int, num_experts_per_tok: int, **fields) -> "ModelConfig":
        """The config of this model upcycled: all layers are sparse, unless `layers` lists kinds.

        `fields` are further fields that it sets: `layers`, `moe_intermediate_size`, `router`, …
        """
        fields |= {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
        return dataclasses.replace(self, **{"layers": None, "model_type": None} | fields)

    def to_dense(self, **fields) -> "ModelConfig":
        """The config of a dense model whose feed-forward has the width of one expert."""
        return dataclasses.replace(
            self,
            intermediate_size=self.expert_size,
            num_experts=0,
            num_expert_groups=1,
            moe_intermediate_size=None,
            layers=None,
            model_type=None,
            **fields,
        )


def fields_of(*belongs: str) -> frozenset[str]:
    """The names of the fields of ModelConfig that belong to any of these."""
    fields = dataclasses.fields(ModelConfig)
    return frozenset(f.name for f in fields if f.metadata["belongs"] in belongs)


def choices(name: str) -> tuple[str, ...]:
    """The values that a field of ModelConfig may have."""
    return tuple(ModelConfig.__dataclass_fields__[name].metadata["choices"])
