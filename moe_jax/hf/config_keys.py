"""The keys of config.json, one table for each family: ours, theirs, and their defaults."""

import dataclasses
import functools
from collections.abc import Callable

from moe_jax.hf.config_kinds import (
    COUNT,
    FLAG,
    INDEX,
    NUMBER,
    OBJECT,
    TEXT,
    Kind,
    UnsupportedError,
    check,
    list_of,
)
from moe_jax.model.config import DENSE, FULL_ATTENTION, MOE, SLIDING_ATTENTION, ModelConfig

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Part:
    """Keys that mean something together only; `keys`: theirs -> (kind, the class's default)."""

    keys: dict[str, tuple]
    read: Callable[[dict], dict]  # of the values of all the family's keys
    write: Callable[[ModelConfig], dict]


@dataclasses.dataclass(frozen=True)
class Keys:
    """`fields`: ours -> (theirs, the class's default). `always`: what the architecture is."""

    fields: dict[str, tuple]
    always: dict
    parts: tuple[Part, ...] = ()
    only: dict = dataclasses.field(default_factory=dict)  # theirs -> values that we understand
    aliases: dict = dataclasses.field(default_factory=dict)  # theirs -> their other spelling


_ROPE_KEYS = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": NUMBER,
    "partial_rotary_factor": NUMBER,
    "factor": NUMBER,
    "low_freq_factor": NUMBER,
    "high_freq_factor": NUMBER,
    "original_max_position_embeddings": COUNT,
}
_OTHER_ROPE_KEY = Kind(
    "no object: all layers share one rope", lambda value: type(value) is not dict
)
_BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope(theta: float = 10_000.0, share: float | None = None) -> Part:
    """Rotary positions; `share` is the default of a family that can rotate a part of a head."""
    keys = {name: (OBJECT.or_null(), None) for name in ("rope_parameters", "rope_scaling")}
    return Part(
        keys | {name: (_ROPE_KEYS[name], None) for name in _BESIDE},
        functools.partial(_rope_read, theta, share),
        functools.partial(_rope_write, share),
    )


def _rope_read(theta: float, share: float | None, values: dict) -> dict:
    defaults = {"rope_theta": theta, "partial_rotary_factor": share or 1.0}
    sources = [name for name in ("rope_parameters", "rope_scaling") if values[name]]
    ropes = [defaults | _rope_of(source, values) for source in sources or [None]]
    fields, *others = map(_rope_fields, ropes)
    if others and others != [fields]:
        raise UnsupportedError(
            f"rope_scaling={values['rope_scaling']} contradicts "
            f"rope_parameters={values['rope_parameters']}; make them agree or leave one out"
        )
    if share is None and fields["partial_rotary_factor"] != 1:
        raise UnsupportedError(
            f"partial_rotary_factor={fields['partial_rotary_factor']}: models of this model_type "
            "rotate whole heads; leave it out or set it to 1"
        )
    return fields


def _rope_of(source: str | None, values: dict) -> dict:
    """The keys of one of the two objects, and those that may stand beside it."""
    rope = values[source] if source else {}
    for name, value in rope.items():
        check(f"{source}.{name}", value, _ROPE_KEYS.get(name, _OTHER_ROPE_KEY))
    beside = {name: values[name] for name in _BESIDE if values[name] is not None}
    for name, value in beside.items():
        if rope.get(name, value) != value:
            raise UnsupportedError(
                f"{name}={value} contradicts {source}.{name}={rope[name]}; make them agree"
            )
    return beside | rope


def _rope_fields(rope: dict) -> dict:
    fields = {name: float(rope[name]) for name in ("rope_theta", "partial_rotary_factor")}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return fields
    if kind != "llama3":
        raise UnsupportedError(f"rope type {kind!r}; 'default' and 'llama3' are supported")
    if missing := [name for name in _LLAMA3 if name not in rope]:
        raise UnsupportedError(f"rope type 'llama3' without {', '.join(missing)}")
    factor, low, high, length = (rope[name] for name in _LLAMA3)
    if low >= high:
        raise UnsupportedError(
            f"rope type 'llama3': low_freq_factor={low} must be less than high_freq_factor={high}"
        )
    return fields | {
        "rope_scaling_factor": float(factor),
        "rope_low_freq_factor": float(low),
        "rope_high_freq_factor": float(high),
        "rope_original_length": length,
    }


def _rope_write(share: float | None, config: ModelConfig) -> dict:
    scaling = None
    if config.rope_scaling_factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_length,
        }
    rope = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    partial = {"partial_rotary_factor": config.partial_rotary_factor} if share else {}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": rope | partial,
        **partial,
    }


_BIAS = Part(
    {"attention_bias": (FLAG, False)},
    read=lambda values: {"attention_bias": "all" if values["attention_bias"] else "none"},
    write=lambda config: {"attention_bias": config.attention_bias == "all"},
)


def _window(values: dict) -> int | None:
    return values["sliding_window"] if values["use_sliding_window"] else None


def _windows_read(values: dict) -> dict:
    """Qwen's: a width, a switch, and from which layer on."""
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


_WINDOW_KEYS = {
    "use_sliding_window": (FLAG, False),
    "sliding_window": (COUNT.or_null(), 4096),
}
_WINDOWS = Part(
    {**_WINDOW_KEYS, "max_window_layers": (INDEX, 28)},
    _windows_read,
    write=lambda config: {**_window_write(config), "layer_types": layer_types(config)},
)
_ONE_WINDOW = Part(
    _WINDOW_KEYS, read=lambda values: {"sliding_window": _window(values)}, write=_window_write
)


def layer_types(config: ModelConfig) -> list[str]:
    return [
        FULL_ATTENTION if kind.window is None else SLIDING_ATTENTION for kind in config.block_kinds
    ]


def _sparse(experts: int, kinds) -> dict:
    kinds = tuple(kinds)
    if MOE not in kinds:
        return {"num_experts": 0}
    return {"num_experts": experts, "layers": kinds if DENSE in kinds else None}


def _qwen_read(values: dict) -> dict:
    step, dense = values["decoder_sparse_step"], values["mlp_only_layers"] or []
    return _sparse(
        values["num_local_experts"],
        (
            DENSE if layer in dense or (layer + 1) % step else MOE
            for layer in range(values["num_hidden_layers"])
        ),
    )


def _qwen_write(config: ModelConfig) -> dict:
    return {
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "moe_intermediate_size": config.expert_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, kind in enumerate(config.layer_kinds) if kind == DENSE],
    }


_QWEN_EXPERTS = Part(
    {
        "num_local_experts": (COUNT, 128),
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
    interval = values["moe_expert_interval"]
    return {
        "num_experts_per_tok": 2,
        "gate_norm_std": values["moe_gate_norm_std"] if values["moe_use_logits_norm"] else None,
        **_sparse(
            experts,
            (
                MOE if (layer + 1) % interval == 0 else DENSE
                for layer in range(values["num_hidden_layers"])
            ),
        ),
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

_NAMES = {
    name: (name, REQUIRED)
    for name in """vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads""".split()
}


def _llama(length, kv_heads=None, eps=1e-6, head_dim=None, **more) -> dict:
    return {
        **_NAMES,
        "num_key_value_heads": ("num_key_value_heads", kv_heads),
        "head_dim": ("head_dim", head_dim),
        "hidden_act": ("hidden_act", "silu"),
        "max_position_embeddings": ("max_position_embeddings", length),
        "rms_norm_eps": ("rms_norm_eps", eps),
        "tie_word_embeddings": ("tie_word_embeddings", False),
        "initializer_range": ("initializer_range", 0.02),
        **more,
    }


_NEMOTRON = _llama(4096) | {
    "rms_norm_eps": ("norm_eps", 1e-5),
    "hidden_act": ("hidden_act", "relu2"),
    "mlp_bias": ("mlp_bias", False),
    "initializer_range": ("initializer_range", 0.0134),
}

_INNER = Part(
    {"n_inner": (COUNT.or_null(), None)},
    read=lambda values: {"intermediate_size": values["n_inner"] or 4 * values["n_embd"]},
    write=lambda config: {
        "n_inner": config.intermediate_size,
        "n_ctx": config.max_position_embeddings,
    },
)
_GPT2 = Keys(
    fields={
        "vocab_size": ("vocab_size", 50_257),
        "hidden_size": ("n_embd", 768),
        "num_hidden_layers": ("n_layer", 12),
        "num_attention_heads": ("n_head", 12),
        "max_position_embeddings": ("n_positions", 1024),
        "hidden_act": ("activation_function", "gelu_new"),
        "rms_norm_eps": ("layer_norm_epsilon", 1e-5),
        "initializer_range": ("initializer_range", 0.02),
        "tie_word_embeddings": ("tie_word_embeddings", True),
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
    "llama": Keys(_llama(2048, mlp_bias=("mlp_bias", False)), {}, (_rope(), _BIAS)),
    "mistral": Keys(
        _llama(131_072, kv_heads=8, sliding_window=("sliding_window", 4096)), {}, (_rope(),)
    ),
    "qwen2": Keys(_llama(32_768, kv_heads=32), {"attention_bias": "qkv"}, (_rope(), _WINDOWS)),
    "qwen3": Keys(
        _llama(32_768, kv_heads=32, head_dim=128), {"qk_norm": "head"}, (_rope(), _BIAS, _WINDOWS)
    ),
    "nemotron": Keys(
        _NEMOTRON, {"norm": "layer_1p", "gated_mlp": False}, (_rope(share=0.5), _BIAS)
    ),
    "gpt2": _GPT2,
    "mixtral": Keys(
        _llama(
            131_072,
            kv_heads=8,
            eps=1e-5,
            num_experts=("num_local_experts", 8),
            num_experts_per_tok=("num_experts_per_tok", 2),
            sliding_window=("sliding_window", None),
        ),
        {},
        (_rope(theta=1e6),),
        aliases={"num_local_experts": "num_experts"},
    ),
    "olmoe": Keys(
        _llama(
            4096,
            eps=1e-5,
            num_experts=("num_experts", 64),
            num_experts_per_tok=("num_experts_per_tok", 8),
            norm_topk_prob=("norm_topk_prob", False),
            clip_qkv=("clip_qkv", None),
        ),
        {"qk_norm": "full"},
        (_rope(), _BIAS),
        aliases={"num_experts": "num_local_experts"},
    ),
    "qwen3_moe": Keys(
        _llama(
            32_768,
            kv_heads=4,
            moe_intermediate_size=("moe_intermediate_size", 768),
            num_experts_per_tok=("num_experts_per_tok", 8),
            norm_topk_prob=("norm_topk_prob", False),
        ),
        {"qk_norm": "head"},
        (_rope(), _BIAS, _ONE_WINDOW, _QWEN_EXPERTS),
        aliases={"num_local_experts": "num_experts"},
    ),
    "lola_v1": dataclasses.replace(
        _GPT2,
        fields=_GPT2.fields
        | {"num_experts": ("num_experts", 16), "num_experts_per_tok": ("topk", 1)},
        always=_GPT2.always | {"norm_topk_prob": False},
        parts=(_INNER, _LOLA_LAYERS),
        only=_GPT2.only | {"topk": (1,)},
    ),
    "skywork": Keys(
        _llama(2048), {}, (_rope(), _SKYWORK_EXPERTS), only={"moe_2layer_gate": (False,)}
    ),
}
