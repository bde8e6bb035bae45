"""Rotary positions in config.json, as spelled by Transformers 4 and 5."""

import functools

from moe_jax.hf.config_kinds import (
    COUNT,
    NUMBER,
    OBJECT,
    SPREAD,
    TEXT,
    Kind,
    Part,
    UnsupportedError,
    check,
    kind_of,
)
from moe_jax.model.config import ModelConfig
from moe_jax.model.rope import ROPES, yarn_mscale

_BESIDE = {  # keys that may be inside the object for rotary positions or next to it
    "rope_theta": NUMBER,
    "partial_rotary_factor": NUMBER,
    "original_max_position_embeddings": COUNT,
}
_PARAMETERS = {  # their name -> our name
    "factor": "rope_scaling_factor",
    "original_max_position_embeddings": "rope_original_length",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "attention_factor": "rope_attention_factor",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "truncate": "rope_truncate",
}
# YaRN's parameters that are optional in Transformers; our fields have the same defaults.
_OPTIONAL = dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), NUMBER.or_null())
_MSCALES = dict.fromkeys(("mscale", "mscale_all_dim"), SPREAD.or_null())
_KINDS = {
    **{"rope_type": TEXT, "type": TEXT},
    **{theirs: kind_of(ours) for theirs, ours in _PARAMETERS.items()},
    **{**_OPTIONAL, **_MSCALES, **_BESIDE},
}
_OTHER_KEY = Kind("no object: all layers share one rope", lambda value: type(value) is not dict)
_ADVICE = {
    "dynamic": " (its waves depend on the longest text of a batch; up to max_position_embeddings "
    "they are those of 'default')",
}


def rope(theta: float = 10_000.0, share: float | None = None) -> Part:
    """Rotary positions; `share` is the default rotated fraction, for families with that key."""
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
    fields, *others = (_rope_fields(rope, values["max_position_embeddings"]) for rope in ropes)
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
    """The keys inside one of the two objects, together with those that may be next to it."""
    rope = values[source] or {}
    for name, value in rope.items():
        check(f"{source}.{name}", value, _KINDS.get(name, _OTHER_KEY))
    rope = {name: value for name, value in rope.items() if value is not None}
    beside = {name: values[name] for name in _BESIDE if values[name] is not None}
    for name, value in beside.items():
        if rope.get(name, value) != value:
            raise UnsupportedError(
                f"{name}={value} contradicts {source}.{name}={rope[name]}; make them agree"
            )
    kinds = sorted({rope.pop(name) for name in ("rope_type", "type") if name in rope})
    if len(kinds) > 1:  # Transformers 4 and 5 would each use a different one
        raise UnsupportedError(f"{source} has the types {kinds}; leave out type or rope_type")
    return beside | rope | {"rope_type": kinds[0] if kinds else "default"}


def _rope_fields(rope: dict, length: int) -> dict:
    """The fields of ModelConfig; `length` is YaRN's original length if `rope` does not give it."""
    rope = dict(rope)
    kind = rope.pop("rope_type")
    fields = {name: float(rope[name]) for name in ("rope_theta", "partial_rotary_factor")}
    if kind not in ROPES:
        advice = _ADVICE.get(kind, "")
        raise UnsupportedError(
            f"rope type {kind!r} is not supported{advice}; use one of {', '.join(ROPES)}"
        )
    takes = {theirs: ours for theirs, ours in _PARAMETERS.items() if ours in ROPES[kind].reads}
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", length)
        mscales = [rope.pop(name, 0) for name in _MSCALES]
        if all(mscales) and "attention_factor" not in rope and "factor" in rope:
            one, other = (yarn_mscale(rope["factor"], mscale) for mscale in mscales)
            rope["attention_factor"] = one / other
    if unknown := [name for name in rope if name not in (*takes, *_BESIDE)]:
        raise UnsupportedError(
            f"rope type {kind!r} has no parameter {unknown[0]!r}; it takes "
            f"{', '.join(takes) or 'none'}"
        )
    if missing := [name for name in takes if name not in (*rope, *_OPTIONAL, "truncate")]:
        raise UnsupportedError(f"rope type {kind!r} without {', '.join(missing)}")
    given = {ours: rope[theirs] for theirs, ours in takes.items() if theirs in rope}
    exact = {"rope_original_length", "rope_truncate"}
    numbers = {name: v if name in exact else float(v) for name, v in given.items()}
    return {**fields, "rope_type": kind, **numbers}


def _rope_write(share: float | None, config: ModelConfig) -> dict:
    values = {theirs: getattr(config, ours) for theirs, ours in _PARAMETERS.items()}
    reads = ROPES[config.rope_type].reads
    scaling = {"rope_type": config.rope_type} | {
        theirs: value
        for theirs, value in values.items()
        if _PARAMETERS[theirs] in reads and value is not None
    }
    partial = {"partial_rotary_factor": config.partial_rotary_factor} if share else {}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_type == "default" else scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling} | partial,
        **partial,
    }
