"""Sizes of the benchmarks: small float32 models on a CPU, layers of published models elsewhere."""

import dataclasses

from moe_jax import model
from moe_jax.ops import implementations


@dataclasses.dataclass(frozen=True)
class Sizes:
    """B rows of T tokens, and MoE models with a few layers."""

    dtype: str
    B: int
    T: int
    models: dict[str, model.ModelConfig]
    groups: dict[str, tuple[int, int, int, int]]  # rows, both widths and number of the matrices
    attention: tuple[tuple[int, int, int, int], ...]  # rows, positions, heads and head size
    vocabularies: tuple[int, ...]
    decoded: tuple[int, ...]  # rows of a batch that is continued
    whole: dict[str, model.ModelConfig]  # trained with all of their layers
    ceiling: int  # the width of a square product that reaches the device's highest rate


def _cpu_model(num_experts: int, per_token: int, width: int) -> model.ModelConfig:
    return model.ModelConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=width,
        num_hidden_layers=4,
        num_attention_heads=8,
        remat="none",
        num_experts=num_experts,
        num_experts_per_tok=per_token,
    )


def _layers_of(preset: str) -> model.ModelConfig:
    return dataclasses.replace(
        model.PRESETS[preset], num_hidden_layers=4, remat="none", dtype="bfloat16"
    )


def _trainable(preset: str, dtype: str) -> model.ModelConfig:
    return dataclasses.replace(model.PRESETS[preset], remat="full", dtype=dtype)


CPU = Sizes(
    dtype="float32",
    B=8,
    T=256,
    models={"8e-top2": _cpu_model(8, 2, 512), "64e-top8": _cpu_model(64, 8, 128)},
    groups={"E=16": (4096, 512, 1024, 16), "E=64": (4096, 512, 1024, 64)},
    attention=((8, 256, 8, 32), (1, 2048, 8, 64)),
    vocabularies=(1024, 32_000),
    decoded=(8,),
    whole={"quickstart-8e": _trainable("quickstart-8e", "float32")},
    ceiling=1024,
)
# One GPU's memory holds four layers of Drop-Upcycling 8x1.5B or OLMoE-1B-7B in training.
ACCELERATOR = Sizes(
    dtype="bfloat16",
    B=4,
    T=4096,
    models={
        "8x1.5b": _layers_of("drop-upcycling-8x1.5b"),
        "olmoe-1b-7b": _layers_of("olmoe-1b-7b"),
    },
    groups={"8x1.5b": (32_768, 2048, 7168, 8), "olmoe-1b-7b": (131_072, 2048, 1024, 64)},
    attention=((4, 4096, 16, 128),),
    vocabularies=(48_640,),
    decoded=(1, 64),
    whole={"olmoe-1b-7b": _trainable("olmoe-1b-7b", "bfloat16")},
    ceiling=8192,
)


def here() -> Sizes:
    """The sizes for the default backend."""
    return CPU if implementations.platform() == "cpu" else ACCELERATOR
