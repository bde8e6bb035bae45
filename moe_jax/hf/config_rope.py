"""Rotary positions in config.json, in the spellings of Transformers 4 and 5."""

import functools

from moe_jax.hf.config_kinds import (
    COUNT,
    NUMBER,
    OBJECT,
    TEXT,
    TYPES,
    Kind,
    Part,
    UnsupportedError,
    check,
)
from moe_jax.model.config import ModelConfig

_BESIDE = {  # keys that may stand beside the object of rotary positions, as well as in it
    "rope_theta": NUMBER,
    "partial_rotary_factor": NUMBER,
    "original_max_position_embeddings": COUNT,
}
_LLAMA3 = {  # theirs -> ours
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_length",
}
_ROPE_KEYS = {"rope_type": TEXT, "type": TEXT, **dict.fromkeys(_LLAMA3, NUMBER), **_BESIDE}
_OTHER_ROPE_KEY = Kind("no object: all layers share one rope", lambda x: type(x) is not dict)


def rope(theta: float = 10_000.0, share: float | None = None) -> Part:
    """Rotary positions; `share` is the default of a family that can rotate a part of a head."""
    keys = {name: (OBJECT.or_null(), None) for name in ("rope_parameters", "rope_scaling")}
    return Part(
        keys | {name: (kind, None) for name, kind in _BESIDE.items()},
        functools.partial(_rope_read, theta, share),
        functools.partial(_rope_write, share),
    )


def _rope_read(theta: float, share: float | None, values: dict) -> dict:
    defaults = {"rope_theta": theta, "partial_rotary_factor": share or 1.0}
    sources = [name for name in ("rope_parameters", "rope_scaling") if values[name]]
    ropes = [defaults | _rope_of(source, values) for source in sources or ["rope_parameters"]]
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


def _rope_of(source: str, values: dict) -> dict:
    """The keys of one of the two objects, and those that may stand beside it."""
    rope = values[source] or {}
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
    if (low := rope["low_freq_factor"]) >= (high := rope["high_freq_factor"]):
        raise UnsupportedError(
            f"rope type 'llama3': low_freq_factor={low} must be less than high_freq_factor={high}"
        )
    return fields | {ours: TYPES[ours](rope[theirs]) for theirs, ours in _LLAMA3.items()}


def _rope_write(share: float | None, config: ModelConfig) -> dict:
    scaling = None
    if config.rope_scaling_factor != 1:
        scaling = {theirs: getattr(config, ours) for theirs, ours in _LLAMA3.items()}
        scaling = {"rope_type": "llama3", **scaling}
    rope = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    partial = {"partial_rotary_factor": config.partial_rotary_factor} if share else {}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": rope | partial,
        **partial,
    }
