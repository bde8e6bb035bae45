"""config.json to ModelConfig and back, one table of keys for each family.

Both spellings are read, that of Transformers 4 (`rope_theta`, `torch_dtype`) and that of 5
(`rope_parameters`, `dtype`), and both are written: readers of 4 ignore those of 5 silently. What
would change the computation and is not understood is refused; nothing is guessed.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable

from moe_jax.hf import safetensors
from moe_jax.hf.families import FAMILIES
from moe_jax.model.config import (
    CHOICES,
    DENSE,
    FULL_ATTENTION,
    MOE,
    SLIDING_ATTENTION,
    ModelConfig,
)

REQUIRED = object()
MAX_CONFIG_BYTES = 10_000_000


class UnsupportedError(ValueError):
    """A config.json that we cannot read, or a model that no family can hold, in one line."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """`fields`: ours -> (theirs, the class's default). `always`: what the architecture is."""

    fields: dict[str, tuple]
    always: dict
    read: Callable[[dict], dict] = lambda values: {}  # what takes more than a name
    write: Callable[[ModelConfig], dict] = lambda config: {}
    only: dict = dataclasses.field(default_factory=dict)  # theirs -> values that we understand


def _rope_read(values: dict) -> dict:
    rope = dict(values.get("rope_scaling") or {})
    rope |= values.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = {
        "rope_theta": float(rope.get("rope_theta", values.get("rope_theta", 10_000.0))),
        "partial_rotary_factor": float(
            rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
        ),
    }
    if kind == "default":
        return fields
    if kind != "llama3":
        raise UnsupportedError(f"rope type {kind!r}; 'default' and 'llama3' are supported")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [name for name in names if name not in rope]:
        raise UnsupportedError(f"rope type 'llama3' without {', '.join(missing)}")
    factor, low, high, length = (rope[name] for name in names)
    return fields | {
        "rope_scaling_factor": float(factor),
        "rope_low_freq_factor": float(low),
        "rope_high_freq_factor": float(high),
        "rope_original_length": int(length),
    }


def _rope_write(config: ModelConfig) -> dict:
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
    partial = {}
    if config.partial_rotary_factor != 1:
        partial = {"partial_rotary_factor": config.partial_rotary_factor}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": rope | partial,
        **partial,
    }


def _bias_read(values: dict) -> dict:
    return {"attention_bias": "all" if values.get("attention_bias") else "none"}


def _bias_write(config: ModelConfig) -> dict:
    return {"attention_bias": config.attention_bias == "all"}


def _window_read(values: dict) -> dict:
    """Qwen's: a width, a switch, and from which layer on."""
    types = values.get("layer_types")
    if types is None:
        first = (
            values.get("max_window_layers", 28) if values.get("use_sliding_window") else math.inf
        )
        types = [
            SLIDING_ATTENTION if layer >= first else FULL_ATTENTION
            for layer in range(values["num_hidden_layers"])
        ]
    if SLIDING_ATTENTION not in types:
        return {"sliding_window": None}
    if values.get("sliding_window") is None:
        raise UnsupportedError("layer_types with sliding layers but no sliding_window")
    every = set(types) == {SLIDING_ATTENTION}
    return {
        "sliding_window": values["sliding_window"],
        "layer_types": None if every else tuple(types),
    }


def _window_write(config: ModelConfig) -> dict:
    slides = [kind.window is not None for kind in config.block_kinds]
    first = slides.index(True) if any(slides) else len(slides)
    return {
        "use_sliding_window": any(slides),
        "sliding_window": config.sliding_window,
        "max_window_layers": first,
        "layer_types": [SLIDING_ATTENTION if s else FULL_ATTENTION for s in slides],
    }


def _sparse_read(values: dict) -> dict:
    """Qwen3-MoE's dense layers."""
    step, dense = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or []
    experts = values.get("num_local_experts", values.get("num_experts", 128))
    return {
        "num_experts": experts,
        **_layers(
            DENSE if layer in dense or (layer + 1) % step else MOE
            for layer in range(values["num_hidden_layers"])
        ),
    }


def _sparse_write(config: ModelConfig) -> dict:
    return {
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "moe_intermediate_size": config.expert_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, kind in enumerate(config.layer_kinds) if kind == DENSE],
    }


def _layers(kinds) -> dict:
    kinds = tuple(kinds)
    return {"layers": None if set(kinds) == {MOE} else kinds}


def _skywork_read(values: dict) -> dict:
    experts = values.get("num_experts")
    if experts in (None, [1], 1):
        return {"num_experts": 0}
    if isinstance(experts, list) and len(set(experts)) > 1:
        raise UnsupportedError(f"num_experts={experts}: layers with different numbers of experts")
    interval = values.get("moe_expert_interval", 1)
    gate = values.get("moe_gate_norm_std", 1.0) if values.get("moe_use_logits_norm") else None
    return {
        "num_experts": experts[0] if isinstance(experts, list) else experts,
        "num_experts_per_tok": 2,
        "gate_norm_std": gate,
        **_layers(
            MOE if (layer + 1) % interval == 0 else DENSE
            for layer in range(values["num_hidden_layers"])
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


def _both(*functions: Callable) -> Callable:
    return lambda argument: {k: v for f in functions for k, v in f(argument).items()}


_NAMES = {
    name: (name, REQUIRED)
    for name in """vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads""".split()
}


def _llama(kv_heads=None, eps=1e-6, head_dim=None, **more) -> dict:
    return {
        **_NAMES,
        "num_key_value_heads": ("num_key_value_heads", kv_heads),
        "head_dim": ("head_dim", head_dim),
        "hidden_act": ("hidden_act", "silu"),
        "max_position_embeddings": ("max_position_embeddings", 2048),
        "rms_norm_eps": ("rms_norm_eps", eps),
        "tie_word_embeddings": ("tie_word_embeddings", False),
        "initializer_range": ("initializer_range", 0.02),
        **more,
    }


_ROPE = {"read": _rope_read, "write": _rope_write}
_ROPE_BIAS = {"read": _both(_rope_read, _bias_read), "write": _both(_rope_write, _bias_write)}
_WINDOW = {
    "read": _both(_rope_read, _bias_read, _window_read),
    "write": _both(_rope_write, _bias_write, _window_write),
}
_NEMOTRON = _llama(eps=1e-5)
_NEMOTRON |= {
    "rms_norm_eps": ("norm_eps", 1e-5),
    "hidden_act": ("hidden_act", "relu2"),
    "mlp_bias": ("mlp_bias", False),
}

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
    read=lambda values: {"intermediate_size": values.get("n_inner") or 4 * values["n_embd"]},
    write=lambda config: {
        "n_inner": config.intermediate_size,
        "n_ctx": config.max_position_embeddings,
    },
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
)

_MIXTRAL_EXPERTS = {
    "num_experts": ("num_local_experts", 8),
    "num_experts_per_tok": ("num_experts_per_tok", 2),
    "sliding_window": ("sliding_window", None),
}

KEYS = {
    "llama": Keys(_llama(mlp_bias=("mlp_bias", False)), {}, **_ROPE_BIAS),
    "mistral": Keys(_llama(kv_heads=8, sliding_window=("sliding_window", 4096)), {}, **_ROPE),
    "qwen2": Keys(
        _llama(kv_heads=32),
        {"attention_bias": "qkv"},
        read=_both(_rope_read, _window_read),
        write=_both(_rope_write, _window_write),
    ),
    "qwen3": Keys(_llama(kv_heads=32, head_dim=128), {"qk_norm": "head"}, **_WINDOW),
    "nemotron": Keys(_NEMOTRON, {"norm": "layer_1p", "gated_mlp": False}, **_ROPE_BIAS),
    "gpt2": _GPT2,
    "mixtral": Keys(_llama(kv_heads=8, eps=1e-5, **_MIXTRAL_EXPERTS), {}, **_ROPE),
    "olmoe": Keys(
        _llama(
            eps=1e-5,
            num_experts=("num_experts", 64),
            num_experts_per_tok=("num_experts_per_tok", 8),
            norm_topk_prob=("norm_topk_prob", False),
            clip_qkv=("clip_qkv", None),
        ),
        {"qk_norm": "full"},
        **_ROPE_BIAS,
    ),
    "qwen3_moe": Keys(
        _llama(
            kv_heads=4,
            moe_intermediate_size=("moe_intermediate_size", 768),
            num_experts_per_tok=("num_experts_per_tok", 8),
            norm_topk_prob=("norm_topk_prob", False),
        ),
        {"qk_norm": "head"},
        read=_both(_rope_read, _bias_read, _window_read, _sparse_read),
        write=_both(_rope_write, _bias_write, _window_write, _sparse_write),
    ),
    "lola_v1": dataclasses.replace(
        _GPT2,
        fields=_GPT2.fields
        | {"num_experts": ("num_experts", 16), "num_experts_per_tok": ("topk", 1)},
        always=_GPT2.always | {"norm_topk_prob": False},
        read=_both(
            _GPT2.read,
            lambda values: _layers((DENSE, MOE)[i % 2] for i in range(values["n_layer"])),
        ),
        only=_GPT2.only | {"topk": (1,)},
    ),
    "skywork": Keys(
        _llama(),
        {},
        read=_both(_rope_read, _skywork_read),
        write=_both(_rope_write, _skywork_write),
        only={"moe_2layer_gate": (False,)},
    ),
}

# Fields that say how a model is computed or trained: a checkpoint does not hold them.
COMPUTED = set(
    """model_type initializer_range router dispatch capacity_factor min_capacity token_priority
    dtype remat grouped_matmul attention""".split()
)


def load_json(folder: pathlib.Path) -> dict:
    """The parsed config.json of a folder.

    Raises: ValueError for one that is missing, too large, or not a JSON object.
    """
    if not (folder / "config.json").exists():
        raise UnsupportedError(f"{folder} has no config.json: not a Hugging Face folder")
    path = safetensors.resolve_inside(folder, "config.json")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UnsupportedError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UnsupportedError(f"{path} is not a JSON object")
    return values


def read(values: dict) -> ModelConfig:
    """The ModelConfig of a parsed config.json.

    Raises: UnsupportedError, in one line.
    """
    model_type = values.get("model_type")
    if model_type not in KEYS:
        raise UnsupportedError(
            f"model_type={model_type!r} is not supported; known are {', '.join(KEYS)}"
        )
    keys = KEYS[model_type]
    if values.get("quantization_config"):
        raise UnsupportedError("quantization_config: quantised weights are not supported")
    fields = dict(keys.always)
    for field, (name, default) in keys.fields.items():
        fields[field] = values.get(name, default)
        if fields[field] is REQUIRED:
            raise UnsupportedError(f"{name} is missing")
    fields |= keys.read({**{n: d for n, d in keys.fields.values()}, **values})
    for name, accepted in keys.only.items():
        if values.get(name, accepted[0]) not in accepted:
            raise UnsupportedError(f"{name}={values[name]!r} is not supported")
    if fields["hidden_act"] not in CHOICES["hidden_act"]:
        known = ", ".join(CHOICES["hidden_act"])
        raise UnsupportedError(f"activation {fields['hidden_act']!r} is not one of {known}")
    try:
        return ModelConfig(**fields, model_type=model_type)
    except (ValueError, TypeError) as error:
        raise UnsupportedError(" ".join(str(error).split())) from None


def write(config: ModelConfig) -> dict:
    """The config.json of a model: of its own family, or of the first that can hold it.

    Raises: UnsupportedError when no Hugging Face class can hold it.
    """
    problems = {}
    for model_type in (config.model_type, *KEYS):
        if model_type in KEYS:
            problems[model_type] = _cannot_hold(config, model_type)
            if not problems[model_type]:
                return _values(config, model_type)
    closest = min(problems, key=lambda name: len(problems[name]))
    raise UnsupportedError(
        f"no Hugging Face model class holds this model; the closest, {closest}, has not "
        f"{', '.join(problems[closest])}; a run's own checkpoint holds it"
    )


def _cannot_hold(config: ModelConfig, model_type: str) -> list[str]:
    """What of the config is lost in a family's config.json, as "name=value"."""
    try:
        other = read(_values(config, model_type))
    except (UnsupportedError, ValueError) as error:
        return [str(error)] * 9
    ours, theirs = (_in_force(c) for c in (config, other))
    return [f"{name}={value!r}" for name, value in ours.items() if theirs.get(name) != value]


def _in_force(config: ModelConfig) -> dict:
    """The fields that decide what is computed, each with the value in force."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in COMPUTED}
    fields |= {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "layers": config.layer_kinds,
        "layer_types": tuple(kind.window for kind in config.block_kinds),
    }
    unused = ["sliding_window"]
    if not config.num_experts:
        unused += ["num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size"]
    else:
        fields["moe_intermediate_size"] = config.expert_size
        if DENSE not in config.layer_kinds:
            unused += ["intermediate_size"]
    if config.position_embedding == "learned":
        unused += ["rope_theta", "partial_rotary_factor"]
    if config.position_embedding == "learned" or config.rope_scaling_factor == 1:
        unused += [
            *("rope_scaling_factor", "rope_low_freq_factor"),
            *("rope_high_freq_factor", "rope_original_length"),
        ]
    return {k: v for k, v in fields.items() if k not in unused}


def _values(config: ModelConfig, model_type: str) -> dict:
    keys = KEYS[model_type]
    config = dataclasses.replace(
        config,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_size,
        intermediate_size=config.intermediate_size
        if DENSE in config.layer_kinds or "moe_intermediate_size" in keys.fields
        else config.expert_size,
    )
    return {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, (theirs, _) in keys.fields.items()},
        **keys.write(config),
    }
