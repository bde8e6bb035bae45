"""config.json to ModelConfig and back, one table of keys for each family.

Both spellings are read, that of Transformers 4 (`rope_theta`, `torch_dtype`) and that of 5
(`rope_parameters`, `dtype`), and both are written: readers of 4 ignore those of 5 silently. What
would change the computation and is not understood is refused; nothing is guessed.
"""

import dataclasses
import functools
import json
import pathlib
import reprlib
import sys
import typing
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


class Kind(typing.NamedTuple):
    """What a value of config.json must be, in words and as a test."""

    words: str
    fits: Callable[[object], bool]

    def or_null(self) -> "Kind":
        return Kind(f"{self.words}, or null", lambda value: value is None or self.fits(value))


def _is_number(value: object) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


def _whole(low: int, high: int = 2**31 - 1) -> Kind:
    return Kind(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def _one_of(choices: tuple[str, ...]) -> Kind:
    return Kind(f"one of {', '.join(choices)}", lambda value: value in choices)


def _list_of(kind: Kind) -> Kind:
    return Kind(
        f"a list, each {kind.words}",
        lambda value: type(value) is list and all(map(kind.fits, value)),
    )


COUNT, INDEX = _whole(1), _whole(0)
DEPTH = _whole(1, 10_000)  # layers are listed one by one: no file may ask for a billion
NUMBER = Kind("a number more than 0", lambda value: _is_number(value) and value > 0)
SPREAD = Kind("a number of at least 0", lambda value: _is_number(value) and value >= 0)
FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("a string", lambda value: type(value) is str)
OBJECT = Kind("an object", lambda value: type(value) is dict)
LAYER_TYPES = _list_of(_one_of((FULL_ATTENTION, SLIDING_ATTENTION)))

TYPES = typing.get_type_hints(ModelConfig)
KIND_OF_TYPE = {int: COUNT, float: NUMBER, bool: FLAG, str: TEXT}
KIND_OF_FIELD = {
    "num_hidden_layers": DEPTH,
    "initializer_range": SPREAD,
    "hidden_act": _one_of(CHOICES["hidden_act"]),
}


def _kind(field: str) -> Kind:
    """By its type in ModelConfig."""
    plain, *null = typing.get_args(TYPES[field]) or (TYPES[field],)
    kind = KIND_OF_FIELD.get(field, KIND_OF_TYPE[plain])
    return kind.or_null() if null else kind


def _check(name: str, value: object, kind: Kind) -> None:
    if not kind.fits(value):
        raise UnsupportedError(f"{name}={reprlib.repr(value)} must be {kind.words}")


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
        _check(f"{source}.{name}", value, _ROPE_KEYS.get(name, _OTHER_ROPE_KEY))
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
    write=lambda config: {**_window_write(config), "layer_types": _layer_types(config)},
)
_ONE_WINDOW = Part(
    _WINDOW_KEYS, read=lambda values: {"sliding_window": _window(values)}, write=_window_write
)


def _layer_types(config: ModelConfig) -> list[str]:
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
        "mlp_only_layers": (_list_of(INDEX).or_null(), None),
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
                lambda value: COUNT.fits(value) or value != [] and _list_of(COUNT).fits(value),
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

# Fields that say how a model is computed or trained: a checkpoint does not hold them.
COMPUTED = set(
    """model_type initializer_range capacity_factor min_capacity token_priority
    dtype remat expert_parallel grouped_matmul attention""".split()
)
# Routers that compute, without training's noise or a benchmark's force, what another does.
SAME_ROUTER = {
    "topk_softmax": {"router": "softmax_topk", "norm_topk_prob": True},
    "forced_balance": {"router": "softmax_topk"},
}


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
    if "model_type" not in values:
        raise UnsupportedError("config.json has no model_type")
    model_type = values["model_type"]
    if not isinstance(model_type, str) or model_type not in KEYS:
        raise UnsupportedError(
            f"model_type={reprlib.repr(model_type)} is not supported; known are {', '.join(KEYS)}"
        )
    keys = KEYS[model_type]
    if values.get("quantization_config"):
        raise UnsupportedError("quantization_config: quantised weights are not supported")
    for name, accepted in keys.only.items():
        if values.get(name, accepted[0]) not in accepted:
            raise UnsupportedError(f"{name}={reprlib.repr(values[name])} is not supported")
    found = _found(keys, values)
    fields = keys.always | {ours: found[theirs] for ours, (theirs, _) in keys.fields.items()}
    for part in keys.parts:
        fields |= part.read(found)
    try:
        config = ModelConfig(**fields, model_type=model_type)
    except ValueError as error:
        raise UnsupportedError(" ".join(str(error).split())) from None
    if found["layer_types"] not in (None, computed := _layer_types(config)):
        raise UnsupportedError(
            f"layer_types={reprlib.repr(found['layer_types'])} is not what a {model_type} of these "
            f"settings computes, {reprlib.repr(computed)}; make it that or leave it out"
        )
    return config


def _found(keys: Keys, values: dict) -> dict:
    """What a config.json says of each key of a family, or the family's default."""
    table = {"layer_types": (LAYER_TYPES.or_null(), None)}
    table |= {theirs: (_kind(ours), default) for ours, (theirs, default) in keys.fields.items()}
    for part in keys.parts:
        table |= part.keys
    found = {}
    for name, (kind, default) in table.items():
        given = {n: values[n] for n in (name, keys.aliases.get(name)) if n in values}
        for spelling, value in given.items():
            _check(spelling, value, kind)
        if len(given) > 1 and len(set(given.values())) > 1:
            both = " and ".join(f"{n}={value!r}" for n, value in given.items())
            raise UnsupportedError(f"{both} are the same key; make them agree or leave one out")
        found[name] = next(iter(given.values()), default)
        if found[name] is REQUIRED:
            raise UnsupportedError(f"{name} is missing")
    return found


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
    fields |= SAME_ROUTER.get(config.router, {})
    fields |= {
        "merges": config.dispatch == "merge",
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "layers": config.layer_kinds,
        "layer_types": tuple(kind.window for kind in config.block_kinds),
    }
    unused = ["sliding_window", "dispatch", "merge_segment_length"]
    if not config.num_experts:
        unused += ["num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size", "router"]
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
        **{name: value for part in keys.parts for name, value in part.write(config).items()},
    }
