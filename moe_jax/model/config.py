"""What a model is: one frozen dataclass."""

import dataclasses
import math
from typing import NamedTuple

DENSE, MOE = "dense", "moe"
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
CHOICES = {
    "norm": ("rms", "layer", "layer_1p"),
    "hidden_act": ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu2"),
    "attention_bias": ("none", "qkv", "all"),
    "qk_norm": ("none", "head", "full"),
    "position_embedding": ("rotary", "learned"),
    "router": (
        *("softmax_topk", "topk_softmax", "sigmoid_topk", "noisy_topk", "expert_choice"),
        *("group_topk", "forced_balance"),
    ),
    "dispatch": ("dropless", "capacity", "merge"),
    "token_priority": ("position", "random"),
    "expert_parallel": ("auto", "fsdp", "ring", "all_to_all"),
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "full", "save_experts", "save_dots", "offload_experts", "offload_dots"),
}


class BlockKind(NamedTuple):
    """What one layer differs in from another of the same model."""

    feed_forward: str  # DENSE or MOE
    window: int | None  # the keys that a query sees, itself included; None is all before it


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, by its Hugging Face names.

    Hashable, so it can be a static argument of a jitted function. A field left at None takes its
    value from the others; the properties below give the value in force.

    Raises: ValueError, in one line, for sizes that no model can have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # num_attention_heads
    head_dim: int | None = None  # hidden_size / num_attention_heads
    max_position_embeddings: int = 4096  # learned positions end there
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    model_type: str | None = None  # the Hugging Face family to save as; else any that can hold it

    norm: str = "rms"  # or LayerNorm; "layer_1p" is one whose scale is kept less 1 (Nemotron)
    rms_norm_eps: float = 1e-5  # of whichever norm
    hidden_act: str = "silu"
    gated_mlp: bool = True  # down(act(gate x) * up x), else down(act(up x))
    mlp_bias: bool = False

    attention_bias: str = "none"  # "qkv" (Qwen2), or "all": the output projection's too
    qk_norm: str = "none"  # "head": each head of q and k (Qwen3); "full": all at once (OLMoE)
    clip_qkv: float | None = None
    sliding_window: int | None = None  # the keys that a query sees, itself included
    layer_types: tuple[str, ...] | None = None  # which layers slide; None: all that have a window

    position_embedding: str = "rotary"  # or "learned" (GPT-2)
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 1.0  # the share of a head that is rotated
    rope_scaling_factor: float = 1.0  # Llama 3's, for longer texts; 1 is none
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192

    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None  # intermediate_size
    shared_expert_intermediate_size: int | None = None  # of an expert that every token goes to
    norm_topk_prob: bool = True
    gate_norm_std: float | None = None  # the deviation router logits are brought to (Skywork-MoE)
    router: str = "softmax_topk"  # model/router.py has them all
    num_expert_groups: int = 1  # of sigmoid_topk and group_topk
    num_groups_per_tok: int = 1  # sigmoid_topk: those that may be chosen from
    routed_scaling_factor: float = 1.0  # sigmoid_topk: of the weights
    dispatch: str = "dropless"  # or "capacity": an expert drops what does not fit; or "merge"
    merge_segment_length: int = 256  # merge: the tokens that share one merged expert (Lory)
    capacity_factor: float = 1.25  # dropless: of the virtual drop rate that is reported
    min_capacity: int = 4
    token_priority: str = "position"  # which tokens a full expert keeps; or "random"
    num_attention_experts: int = 0  # attentions whose outputs are mixed (BAM); 0 is plain
    layers: tuple[str, ...] | None = None  # all dense without experts, all sparse with them

    # How it is computed rather than what it is.
    dtype: str = "float32"
    remat: str = "full"
    expert_parallel: str = "auto"  # model/exchange.py has the modes and what each moves
    grouped_matmul: str = "auto"  # or a name that scripts/doctor.py lists; so attention
    attention: str = "auto"

    def __post_init__(self):
        for name in ("layers", "layer_types"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self):
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings sliding_window "
            "moe_intermediate_size shared_expert_intermediate_size num_experts_per_tok "
            "min_capacity num_expert_groups num_groups_per_tok merge_segment_length"
        ).split():
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}={value} must be at least 1"
        for name in (
            "rms_norm_eps rope_theta partial_rotary_factor rope_scaling_factor clip_qkv "
            "gate_norm_std capacity_factor routed_scaling_factor"
        ).split():
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield f"{name}={value} must be a finite number more than 0"
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            yield (
                f"hidden_size={self.hidden_size} is not divisible by "
                f"num_attention_heads={self.num_attention_heads}; change one or set head_dim"
            )
        if self.num_attention_heads % self.num_kv_heads:
            yield (
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.position_embedding == "rotary" and not (
            2 <= self.rotary_size <= self.head_size and self.rotary_size % 2 == 0
        ):
            yield (
                f"partial_rotary_factor={self.partial_rotary_factor} rotates {self.rotary_size} of "
                f"head_dim={self.head_size}; rotary positions need an even number from 2 to it"
            )
        if self.num_experts < 0:
            yield f"num_experts={self.num_experts} must be 0 (dense) or more"
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            yield (
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_experts={self.num_experts}; choose at most {self.num_experts}"
            )
        yield from self._problems_of_routing()
        if self.num_experts == 1 and self.gate_norm_std is not None:
            yield "gate_norm_std needs num_experts of 2 or more: one logit has no deviation"
        for name, kinds in (
            ("layers", (DENSE, MOE)),
            ("layer_types", (FULL_ATTENTION, SLIDING_ATTENTION)),
        ):
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
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                yield f"{name}={getattr(self, name)!r} is unknown; use one of {choices}"

    def _problems_of_routing(self):
        if not self.num_experts:
            return
        G = self.num_expert_groups
        if self.num_experts % G:
            yield f"num_experts={self.num_experts} is not divisible by num_expert_groups={G}"
        elif G > 1 and self.router == "sigmoid_topk":
            if self.num_groups_per_tok > G:
                yield f"num_groups_per_tok={self.num_groups_per_tok} is more than the {G} groups"
            room = self.num_groups_per_tok * self.num_experts // G
            if self.num_experts // G < 2 or room < self.num_experts_per_tok:
                yield (
                    f"num_expert_groups={G}: a token chooses {self.num_experts_per_tok} experts "
                    f"among the {room} of {self.num_groups_per_tok} groups, which need 2 or more "
                    "each; use fewer groups"
                )
        elif self.router == "group_topk" and self.num_experts_per_tok > G:
            yield (
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_expert_groups={G}, each of which gives one; use at most {G}"
            )
        elif G > 1 and self.router not in ("sigmoid_topk", "group_topk"):
            yield f"num_expert_groups={G} is of the routers sigmoid_topk and group_topk"
        if self.router == "expert_choice" and self.dispatch != "capacity":
            yield "router='expert_choice' gives each expert as many tokens; set dispatch='capacity'"
        if self.gate_norm_std is not None and self.router not in ("softmax_topk", "forced_balance"):
            yield f"gate_norm_std is of router='softmax_topk', not {self.router!r}"
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
        """How many of a head's dimensions are rotated."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return self.layers or (MOE if self.num_experts else DENSE,) * self.num_hidden_layers

    @property
    def draws(self) -> bool:
        """Whether routing is random in training."""
        dropped = self.dispatch == "capacity" and self.token_priority == "random"
        return self.num_experts > 0 and (dropped or self.router == "noisy_topk")

    @property
    def block_kinds(self) -> tuple[BlockKind, ...]:
        types = self.layer_types or (SLIDING_ATTENTION,) * self.num_hidden_layers
        windows = (self.sliding_window if t == SLIDING_ATTENTION else None for t in types)
        return tuple(map(BlockKind, self.layer_kinds, windows))

    @property
    def implementations(self) -> dict[str, str]:
        """The implementation of each op that a model of this kind calls, or that was named."""
        ops = {"attention": self.attention, "cross_entropy": "auto"}
        if self.num_experts or self.grouped_matmul != "auto":
            ops["grouped_matmul"] = self.grouped_matmul
        return ops

    def to_moe(
        self,
        *,
        num_experts: int,
        num_experts_per_tok: int,
        layers: tuple[str, ...] | None = None,
        **fields,
    ) -> "ModelConfig":
        """The config of this model upcycled, sparse where `layers` says so, else in all.

        `fields` are what else it has of its own: a narrower `moe_intermediate_size`, its router, …
        """
        return dataclasses.replace(
            self,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            layers=layers,
            model_type=None,
            **fields,
        )

    def to_dense(self, **fields) -> "ModelConfig":
        """The config of a dense model as wide as one of this mixture's experts."""
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
