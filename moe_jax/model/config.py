"""What a model is: one frozen dataclass, the published presets, and the layout of its layers."""

import dataclasses
import functools
import math

DENSE, MOE = "dense", "moe"
CHOICES = {
    "router": ("softmax_topk", "forced_balance"),
    "dispatch": ("dropless", "capacity"),
    "token_priority": ("position", "random"),
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "full", "save_experts", "save_dots", "offload_experts", "offload_dots"),
}


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
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None  # intermediate_size
    norm_topk_prob: bool = True
    router: str = "softmax_topk"  # or "forced_balance": experts in turn, for benchmarks only
    dispatch: str = "dropless"  # or "capacity": an expert drops what does not fit
    capacity_factor: float = 1.25  # dropless: of the virtual drop rate that is reported
    min_capacity: int = 4
    token_priority: str = "position"  # which tokens a full expert keeps; or "random"
    layers: tuple[str, ...] | None = None  # all dense without experts, all sparse with them

    # How it is computed rather than what it is.
    dtype: str = "float32"
    remat: str = "full"
    grouped_matmul: str = "auto"  # or a name that scripts/doctor.py lists; so attention
    attention: str = "auto"

    def __post_init__(self):
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self):
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim moe_intermediate_size num_experts_per_tok min_capacity"
        ).split():
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}={value} must be at least 1"
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
        if self.head_size % 2:
            yield f"head_dim={self.head_size} is odd; rotary positions need an even one"
        if self.num_experts < 0:
            yield f"num_experts={self.num_experts} must be 0 (dense) or more"
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            yield (
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_experts={self.num_experts}; choose at most {self.num_experts}"
            )
        if self.layers is not None:
            if len(self.layers) != self.num_hidden_layers:
                yield (
                    f"layers names {len(self.layers)} layers but "
                    f"num_hidden_layers={self.num_hidden_layers}; make them agree"
                )
            for kind in set(self.layers) - {DENSE, MOE}:
                yield f"layers has the kind {kind!r}; use {DENSE!r} or {MOE!r}"
            if (MOE in self.layers) != (self.num_experts > 0):
                yield (
                    f"num_experts={self.num_experts} does not fit layers={self.layers}; "
                    f"{MOE!r} layers need num_experts >= 1, all-{DENSE!r} models num_experts=0"
                )
        if not 0 < self.capacity_factor < math.inf:
            yield f"capacity_factor={self.capacity_factor} must be a finite number more than 0"
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                yield f"{name}={getattr(self, name)!r} is unknown; use one of {choices}"

    @property
    def num_kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return self.layers or (MOE if self.num_experts else DENSE,) * self.num_hidden_layers

    @property
    def implementations(self) -> dict[str, str]:
        """The implementation of each op that a model of this kind calls."""
        ops = {"attention": self.attention, "cross_entropy": "auto"}
        return {**ops, "grouped_matmul": self.grouped_matmul} if self.num_experts else ops

    def to_moe(
        self, *, num_experts: int, num_experts_per_tok: int, layers: tuple[str, ...] | None = None
    ) -> "ModelConfig":
        """The config of this dense model upcycled, sparse where `layers` says so, else in all."""
        return dataclasses.replace(
            self, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok, layers=layers
        )


@dataclasses.dataclass(frozen=True)
class Segment:
    """A pattern of layer kinds that repeats; its parameters are stacked and scanned.

    `layers[place]` are the indices of the layers that stand at that place of the pattern, one for
    each repeat. Places are keyed "0", "1", … through all segments of a model.
    """

    kinds: dict[str, str]
    layers: dict[str, tuple[int, ...]]

    @property
    def repeats(self) -> int:
        return len(next(iter(self.layers.values())))


@functools.lru_cache
def segments(kinds: tuple[str, ...]) -> tuple[Segment, ...]:
    """Cuts a model's layers into the segments that trace the fewest blocks.

    A leading dense layer becomes a segment of its own, LOLA's alternation one of two places.
    """
    # best[i] = (blocks traced, segments used, cuts) for the layers from i on.
    best = {len(kinds): (0, 0, ())}
    for i in reversed(range(len(kinds))):
        options = []
        for period in range(1, len(kinds) - i + 1):
            pattern, end = kinds[i : i + period], i
            while kinds[end : end + period] == pattern:
                end += period
                blocks, used, cuts = best[end]
                options.append((blocks + period, used + 1, ((i, period, end), *cuts)))
        best[i] = min(options)
    found, place = [], 0
    for start, period, end in best[0][2]:
        names = {str(place + j): start + j for j in range(period)}
        found.append(
            Segment(
                kinds={name: kinds[first] for name, first in names.items()},
                layers={name: tuple(range(first, end, period)) for name, first in names.items()},
            )
        )
        place += period
    return tuple(found)


PRESETS = {
    # The quickstart's parent and child: small enough for two CPU cores.
    "quickstart": ModelConfig(
        vocab_size=259,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        remat="none",
    ),
}
PRESETS["quickstart-8e"] = PRESETS["quickstart"].to_moe(num_experts=8, num_experts_per_tok=2)
