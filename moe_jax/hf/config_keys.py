"""The keys of config.json for each family: our name, their name, and the class's default."""

import dataclasses

from moe_jax.hf.config_kinds import (
    COUNT,
    FLAG,
    INDEX,
    NUMBER,
    Kind,
    Part,
    UnsupportedError,
    list_of,
)
from moe_jax.hf.config_rope import rope
from moe_jax.model.config import DENSE, FULL_ATTENTION, MOE, SLIDING_ATTENTION, ModelConfig

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Keys:
    """`fields`: our name -> (their name, the class's default). `always`: values that the family
    fixes."""

    fields: dict[str, tuple]
    always: dict
    parts: tuple[Part, ...] = ()
    only: dict = dataclasses.field(default_factory=dict)  # their name -> values that we support
    aliases: dict = dataclasses.field(default_factory=dict)  # their name -> its other spelling


_BIAS = Part(
    {"attention_bias": (FLAG, False)},
    read=lambda values: {"attention_bias": "all" if values["attention_bias"] else "none"},
    write=lambda config: {"attention_bias": config.attention_bias == "all"},
)


def _window(values: dict) -> int | None:
    return values["sliding_window"] if values["use_sliding_window"] else None


def _windows_read(values: dict) -> dict:
    """The windows from Qwen's keys: a width, a switch, and the first layer with a window."""
    window, types = _window(values), values["layer_types"]
    if types is None:
        first = values["max_window_layers"]
        types = [
            SLIDING_ATTENTION if window and layer >= first else FULL_ATTENTION
            for layer in range(values["num_hidden_layers"])
        ]
    elif SLIDING_ATTENTION in types and window is None:
        raise UnsupportedError(
            f"layer_types has {SLIDING_ATTENTION!r} layers, but use_sliding_window="
            f"{values['use_sliding_window']} and sliding_window={values['sliding_window']} give "
            "them no window; set both"
        )
    if SLIDING_ATTENTION not in types:
        return {"sliding_window": None}
    every = FULL_ATTENTION not in types
    return {"sliding_window": window, "layer_types": None if every else tuple(types)}


def _window_write(config: ModelConfig) -> dict:
    slides = [kind.window is not None for kind in config.block_kinds]
    return {
        "use_sliding_window": any(slides),
        "sliding_window": config.sliding_window,
        "max_window_layers": slides.index(True) if any(slides) else len(slides),
    }


_WINDOW_KEYS = {"use_sliding_window": (FLAG, False), "sliding_window": (COUNT.or_null(), 4096)}
_WINDOWS = Part(
    {**_WINDOW_KEYS, "max_window_layers": (INDEX, 28)},
    _windows_read,
    write=lambda config: {**_window_write(config), "layer_types": layer_types(config)},
)
_ONE_WINDOW = Part(
    _WINDOW_KEYS, read=lambda values: {"sliding_window": _window(values)}, write=_window_write
)


def layer_types(config: ModelConfig) -> list[str]:
    types = FULL_ATTENTION, SLIDING_ATTENTION
    return [types[kind.window is not None] for kind in config.block_kinds]


def _sparse(experts: int, kinds) -> dict:
    kinds = tuple(kinds)
    if MOE not in kinds:
        return {"num_experts": 0}
    return {"num_experts": experts, "layers": kinds if DENSE in kinds else None}


def _qwen_read(values: dict) -> dict:
    step, dense = values["decoder_sparse_step"], values["mlp_only_layers"] or []
    layers = range(values["num_hidden_layers"])
    kinds = (DENSE if layer in dense or (layer + 1) % step else MOE for layer in layers)
    return _sparse(values["num_experts"], kinds)


def _qwen_write(config: ModelConfig) -> dict:
    return {
        "num_experts": config.num_experts,  # Transformers 4 reads only this spelling; 5 reads both
        "moe_intermediate_size": config.expert_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, kind in enumerate(config.layer_kinds) if kind == DENSE],
    }


_QWEN_EXPERTS = Part(
    {
        "num_experts": (COUNT, 128),
        "decoder_sparse_step": (COUNT, 1),
        "mlp_only_layers": (list_of(INDEX).or_null(), None),
    },
    _qwen_read,
    _qwen_write,
)


def _skywork_read(values: dict) -> dict:
    experts = values["num_experts"] or 1
    experts, *others = set(experts) if isinstance(experts, list) else {experts}
    if others:
        raise UnsupportedError(
            f"num_experts={values['num_experts']}: layers with different numbers of experts"
        )
    if experts == 1:
        return {"num_experts": 0}
    interval, layers = values["moe_expert_interval"], range(values["num_hidden_layers"])
    return {
        "num_experts_per_tok": 2,
        "gate_norm_std": values["moe_gate_norm_std"] if values["moe_use_logits_norm"] else None,
        **_sparse(experts, (DENSE if (layer + 1) % interval else MOE for layer in layers)),
    }


def _skywork_write(config: ModelConfig) -> dict:
    if not config.num_experts:
        return {}
    interval = config.layer_kinds.index(MOE) + 1
    return {
        "num_experts": [config.num_experts],
        "moe_expert_interval": interval,
        "moe_use_logits_norm": config.gate_norm_std is not None,
        "moe_gate_norm_std": config.gate_norm_std or 1.0,
        "moe_use_mixtral_gating": False,
        "moe_2layer_gate": False,
        "moe_feature_no_mul_topk": True,
    }


_SKYWORK_EXPERTS = Part(
    {
        "num_experts": (
            Kind(
                f"{COUNT.words}, or a list of such",
                lambda value: COUNT.fits(value) or value != [] and list_of(COUNT).fits(value),
            ).or_null(),
            None,
        ),
        "moe_expert_interval": (COUNT, 1),
        "moe_use_logits_norm": (FLAG, False),
        "moe_gate_norm_std": (NUMBER, 1.0),
    },
    _skywork_read,
    _skywork_write,
)


def _same(**defaults) -> dict:
    """Fields that have the same name in config.json, with the class's defaults."""
    return {name: (name, default) for name, default in defaults.items()}


def _llama(length: int, **defaults) -> dict:
    """The fields that most families share; `defaults` are a family's additional fields."""
    return _same(
        vocab_size=REQUIRED,
        hidden_size=REQUIRED,
        intermediate_size=REQUIRED,
        num_hidden_layers=REQUIRED,
        num_attention_heads=REQUIRED,
        max_position_embeddings=length,
        **{
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            **defaults,
        },
    )


_INNER = Part(
    {"n_inner": (COUNT.or_null(), None)},
    read=lambda values: {"intermediate_size": values["n_inner"] or 4 * values["n_embd"]},
    write=lambda config: {
        "n_inner": config.intermediate_size,
        "n_ctx": config.max_position_embeddings,
    },
)
_GPT2 = Keys(
    fields=_same(vocab_size=50_257, initializer_range=0.02, tie_word_embeddings=True)
    | {
        "hidden_size": ("n_embd", 768),
        "num_hidden_layers": ("n_layer", 12),
        "num_attention_heads": ("n_head", 12),
        "max_position_embeddings": ("n_positions", 1024),
        "hidden_act": ("activation_function", "gelu_new"),
        "rms_norm_eps": ("layer_norm_epsilon", 1e-5),
    },
    always={
        "norm": "layer",
        "gated_mlp": False,
        "mlp_bias": True,
        "attention_bias": "all",
        "position_embedding": "learned",
    },
    parts=(_INNER,),
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    aliases={
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    },
)
_LOLA_LAYERS = Part(
    {},
    read=lambda values: _sparse(
        values["num_experts"], ((DENSE, MOE)[i % 2] for i in range(values["n_layer"]))
    ),
    write=lambda config: {},
)

KEYS = {
    "llama": Keys(_llama(2048, mlp_bias=False), {}, (rope(), _BIAS)),
    "mistral": Keys(_llama(131_072, num_key_value_heads=8, sliding_window=4096), {}, (rope(),)),
    "qwen2": Keys(
        _llama(32_768, num_key_value_heads=32), {"attention_bias": "qkv"}, (rope(), _WINDOWS)
    ),
    "qwen3": Keys(
        _llama(32_768, num_key_value_heads=32, head_dim=128),
        {"qk_norm": "head"},
        (rope(), _BIAS, _WINDOWS),
    ),
    "nemotron": Keys(
        _llama(4096, hidden_act="relu2", mlp_bias=False, initializer_range=0.0134)
        | {"rms_norm_eps": ("norm_eps", 1e-5)},
        {"norm": "layer_1p", "gated_mlp": False},
        (rope(share=0.5), _BIAS),
    ),
    "gpt2": _GPT2,
    "mixtral": Keys(
        _llama(
            131_072,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            num_experts_per_tok=2,
            sliding_window=None,
        )
        | {"num_experts": ("num_local_experts", 8)},
        {},
        (rope(theta=1e6),),
        aliases={"num_local_experts": "num_experts"},
    ),
    "olmoe": Keys(
        _llama(
            4096,
            rms_norm_eps=1e-5,
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            clip_qkv=None,
        ),
        {"qk_norm": "full"},
        (rope(), _BIAS),
        only={"sliding_window": (None,)},  # only some of Transformers' attention kernels use it
        aliases={"num_experts": "num_local_experts"},
    ),
    "qwen3_moe": Keys(
        _llama(
            32_768,
            num_key_value_heads=4,
            moe_intermediate_size=768,
            num_experts_per_tok=8,
            norm_topk_prob=False,
        ),
        {"qk_norm": "head"},
        (rope(), _BIAS, _ONE_WINDOW, _QWEN_EXPERTS),
        aliases={"num_experts": "num_local_experts"},
    ),
    "lola_v1": dataclasses.replace(
        _GPT2,
        fields=_GPT2.fields | _same(num_experts=16) | {"num_experts_per_tok": ("topk", 1)},
        always=_GPT2.always | {"norm_topk_prob": False},
        parts=(_INNER, _LOLA_LAYERS),
        only=_GPT2.only | {"topk": (1,)},
    ),
    "skywork": Keys(
        _llama(2048), {}, (rope(), _SKYWORK_EXPERTS), only={"moe_2layer_gate": (False,)}
    ),
}
