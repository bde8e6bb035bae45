"""The published models, as `ModelConfig`s by name."""

import dataclasses
from typing import Any

from moe_jax.model.config import DENSE, MOE, ModelConfig

# The positional arguments are: vocabulary, hidden size, feed-forward width, layers, attention heads
# and, where they are fewer, key-value heads.
PRESETS = {
    # The quickstart's parent: small enough for two CPU cores.
    "quickstart": ModelConfig(
        *(259, 128, 256, 4, 4, 2),
        remat="none",
    ),
    # Nemotron-4 15B (Parmar et al., arXiv 2402.16819).
    "nemotron-4-15b": ModelConfig(
        *(256_000, 6144, 24_576, 32, 48, 8),
        norm="layer_1p",
        hidden_act="relu2",
        gated_mlp=False,
        partial_rotary_factor=0.5,
        initializer_range=0.0134,
        model_type="nemotron",
    ),
    # LOLA (Srivastava et al., arXiv 2409.11272): GPT-3 XL with every second layer sparse.
    "lola": ModelConfig(
        *(100_096, 2048, 8192, 24, 16),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.01,
        norm="layer",
        hidden_act="gelu_fast",
        gated_mlp=False,
        mlp_bias=True,
        attention_bias="all",
        position_embedding="learned",
        num_experts=16,
        num_experts_per_tok=1,
        norm_topk_prob=False,
        capacity_factor=1.0,
        token_priority="random",
        layers=(DENSE, MOE) * 12,
        model_type="lola_v1",
    ),
    # OLMoE (Muennighoff et al., arXiv 2409.02060).
    "olmoe-1b-7b": ModelConfig(
        *(50_304, 2048, 1024, 16, 16),
        qk_norm="full",
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        model_type="olmoe",
    ),
    # Mixtral (Jiang et al., arXiv 2401.04088).
    "mixtral-8x7b": ModelConfig(
        *(32_000, 4096, 14_336, 32, 32, 8),
        max_position_embeddings=32_768,
        rope_theta=1e6,
        num_experts=8,
        num_experts_per_tok=2,
        model_type="mixtral",
    ),
    # Qwen3 (Yang et al., arXiv 2505.09388).
    "qwen3-30b-a3b": ModelConfig(
        *(151_936, 2048, 6144, 48, 32, 4),
        head_dim=128,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm="head",
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        model_type="qwen3_moe",
    ),
    # LLM-jp-4, as released (config.json of the model card; no layer has the dense width of 7680).
    "llm-jp-4-32b-a3.8b": ModelConfig(
        *(196_608, 2560, 7680, 32, 40, 4),
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=5e5,
        qk_norm="head",
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=960,
        model_type="qwen3_moe",
    ),
    # LLM-jp v1 (model cards): GPT-2's architecture. Its vocabulary of 50,570 pieces, and v2's of
    # 96,869, are padded to a multiple of 128 and of 256 rows, as Megatron does.
    **{
        f"llm-jp-1-{size}": ModelConfig(
            *(50_688, width, 4 * width, layers, heads),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            norm="layer",
            hidden_act="gelu",
            gated_mlp=False,
            mlp_bias=True,
            attention_bias="all",
            position_embedding="learned",
            model_type="gpt2",
        )
        for size, width, layers, heads in (("1.3b", 2048, 24, 16), ("13b", 5120, 40, 40))
    },
    # SmolLM2 (Ben Allal et al., arXiv 2502.02737).
    "smollm2-135m": ModelConfig(
        *(49_152, 576, 1536, 30, 9, 3),
        max_position_embeddings=8192,
        rope_theta=1e5,
        tie_word_embeddings=True,
        model_type="llama",
    ),
}

# Models with Llama's architecture: LLM-jp v2 and v3 (model cards of the LLM-jp project, arXiv
# 2407.03963), Drop-Upcycling's parents (Nakamura et al., arXiv 2502.19261), Skywork-13B (Wei et
# al., arXiv 2310.19341) and Llama 2 (Touvron et al., arXiv 2307.09288).
_LLAMAS = {
    "llm-jp-2-13b": (97_024, 5120, 13_824, 40, 40, 40),
    "llm-jp-3-150m": (99_487, 512, 2048, 12, 8, 8),
    "llm-jp-3-440m": (99_487, 1024, 3584, 16, 8, 8),
    "llm-jp-3-980m": (99_487, 1536, 5376, 20, 8, 8),
    "llm-jp-3-1.8b": (99_487, 2048, 7168, 24, 16, 16),
    "llm-jp-3-3.7b": (99_487, 3072, 8192, 28, 24, 24),
    "llm-jp-3-7.2b": (99_487, 4096, 11_008, 32, 32, 32),
    "llm-jp-3-13b": (99_487, 5120, 13_824, 40, 40, 40),
    "llm-jp-3-172b": (99_487, 12_288, 38_464, 96, 96, 16),
    "drop-upcycling-152m": (99_584, 512, 2048, 12, 8, 8),
    "drop-upcycling-1.5b": (48_640, 2048, 7168, 24, 16, 8),
    "drop-upcycling-3.7b": (99_584, 3072, 8192, 28, 24, 24),
    "drop-upcycling-13b": (99_487, 5120, 13_824, 40, 40, 40),
    "skywork-13b": (65_536, 4608, 12_288, 52, 36, 36),
    "llama-2-7b": (32_000, 4096, 11_008, 32, 32, 32),
}
_EPS = {"skywork-13b": 1e-6}  # config.json of the release; 1e-5 for the others
PRESETS |= {
    name: ModelConfig(*sizes, rms_norm_eps=_EPS.get(name, 1e-5), model_type="llama")
    for name, sizes in _LLAMAS.items()
}

# Upcycled models: parent, number of experts, experts per token, further fields. He et al. (arXiv
# 2410.07524) write E8G8T8 for 8 · 8 experts of an eighth of the parent's width.
_UPCYCLED: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "quickstart-8e": ("quickstart", 8, 2, {}),
    "drop-upcycling-8x152m": ("drop-upcycling-152m", 8, 2, {"model_type": "mixtral"}),
    "drop-upcycling-8x1.5b": ("drop-upcycling-1.5b", 8, 2, {"model_type": "mixtral"}),
    "drop-upcycling-8x3.7b": ("drop-upcycling-3.7b", 8, 2, {"model_type": "mixtral"}),
    "llm-jp-3-8x1.8b": ("llm-jp-3-1.8b", 8, 2, {"model_type": "mixtral"}),
    "llm-jp-3-8x13b": ("llm-jp-3-13b", 8, 2, {"model_type": "mixtral"}),
    "nemotron-4-15b-e8g1t2": ("nemotron-4-15b", 8, 2, {"norm_topk_prob": False}),
    "nemotron-4-15b-e8g8t8": (
        *("nemotron-4-15b", 64, 8),
        {"norm_topk_prob": False, "moe_intermediate_size": 3072},
    ),
    # BAM has attention experts (Zhang et al., arXiv 2408.08274); here at the quickstart's size.
    "quickstart-bam-4e": (
        *("quickstart", 4, 1),
        {"norm_topk_prob": False, "num_attention_experts": 4},
    ),
    # LLaMA-MoE v1 (Zhu et al., arXiv 2406.16554): Llama 2's feed-forwards split into 16, top-4.
    "llama-moe-3.5b": (
        *("llama-2-7b", 16, 4),
        {"moe_intermediate_size": 688, "router": "noisy_topk_mlp"},
    ),
    # Skywork-MoE (Wei et al., arXiv 2406.06563).
    "skywork-moe": (
        *("skywork-13b", 16, 2),
        {"gate_norm_std": 1.0, "max_position_embeddings": 8192, "model_type": "skywork"},
    ),
}
PRESETS |= {
    name: PRESETS[parent].to_moe(num_experts=experts, num_experts_per_tok=per_token, **other)
    for name, (parent, experts, per_token, other) in _UPCYCLED.items()
}
# LLM-jp-4 with the sigmoid router of its ablation scripts; the release does not use it.
PRESETS["llm-jp-4-32b-a3.8b-sigmoid"] = dataclasses.replace(
    PRESETS["llm-jp-4-32b-a3.8b"],
    router="sigmoid_topk",
    routed_scaling_factor=2.5,
    model_type=None,
)
