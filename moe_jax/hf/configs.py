"""Converts config.json to ModelConfig and back.

The spellings of Transformers 4 (`rope_theta`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`) are
both read and both written, because version 4 silently ignores the keys of version 5. A key that
would change the computation and is not supported is refused; nothing is guessed.
"""

import dataclasses
import pathlib
import reprlib

from moe_jax import strict_json
from moe_jax.hf import safetensors
from moe_jax.hf.config_keys import KEYS, REQUIRED, Keys, layer_types
from moe_jax.hf.config_kinds import LAYER_TYPES, UnsupportedError, check, kind_of
from moe_jax.hf.families import FAMILIES
from moe_jax.model.comparison import SAME_ACTIVATION, in_force
from moe_jax.model.config import DENSE, ModelConfig, choices

MAX_CONFIG_BYTES = 10_000_000

# Keys of any family that can change the computation or where weights are stored, each with the
# values that do not: https://github.com/huggingface/transformers, masking_utils.py and
# modeling_utils.py.
EVERY: dict[str, tuple] = {
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None, {}),
    "transformers_weights": (None,),
}
OF_FULL_EXPERTS = {"capacity_factor", "min_capacity", "token_priority"}


def load_json(folder: pathlib.Path) -> dict:
    """A folder's config.json; raises ValueError if missing, too large, or not a JSON object."""
    if not (folder / "config.json").exists():
        raise UnsupportedError(f"{folder} has no config.json: not a Hugging Face folder")
    path = safetensors.resolve_inside(folder, "config.json")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UnsupportedError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        return strict_json.read_object(path)
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def of_folder(folder: pathlib.Path) -> ModelConfig:
    """The ModelConfig of a folder's config.json; raises UnsupportedError, in one line."""
    values = load_json(folder)
    try:
        return read(values)
    except UnsupportedError as error:
        raise UnsupportedError(f"{folder}/config.json: {error}") from None


def read(values: dict) -> ModelConfig:
    """The ModelConfig of a parsed config.json; raises UnsupportedError, in one line."""
    if "model_type" not in values:
        raise UnsupportedError("config.json has no model_type")
    model_type = values["model_type"]
    if not isinstance(model_type, str) or model_type not in KEYS:
        raise UnsupportedError(
            f"model_type={reprlib.repr(model_type)} is not supported; known are {', '.join(KEYS)}"
        )
    keys = KEYS[model_type]
    for name, accepted in {**EVERY, **keys.only}.items():
        if values.get(name, accepted[0]) not in accepted:
            raise UnsupportedError(
                f"{name}={reprlib.repr(values[name])} is not supported; "
                f"only {accepted[0]!r}, or no such key, is"
            )
    found = _found(keys, values)
    fields = keys.always | {ours: found[theirs] for ours, (theirs, _) in keys.fields.items()}
    for part in keys.parts:
        fields |= part.read(found)
    if fields["hidden_act"] not in choices("hidden_act"):
        fields["hidden_act"] = SAME_ACTIVATION[fields["hidden_act"]]
    try:
        config = ModelConfig(**fields, model_type=model_type)
    except ValueError as error:
        raise UnsupportedError(" ".join(str(error).split())) from None
    if found["layer_types"] not in (None, computed := layer_types(config)):
        raise UnsupportedError(
            f"layer_types={reprlib.repr(found['layer_types'])} is not what a {model_type} of these "
            f"settings computes, {reprlib.repr(computed)}; make it that or leave it out"
        )
    return config


def _found(keys: Keys, values: dict) -> dict:
    """The value of each key of a family in a config.json, or the family's default."""
    table = {"layer_types": (LAYER_TYPES.or_null(), None)}
    table |= {theirs: (kind_of(ours), default) for ours, (theirs, default) in keys.fields.items()}
    for part in keys.parts:
        table |= part.keys
    found = {}
    for name, (kind, default) in table.items():
        given = {n: values[n] for n in (name, keys.aliases.get(name, name)) if n in values}
        for spelling, value in given.items():
            check(spelling, value, kind)
        if len(given) > 1 and len(set(given.values())) > 1:
            both = " and ".join(f"{n}={value!r}" for n, value in given.items())
            raise UnsupportedError(f"{both} are the same key; make them agree or leave one out")
        found[name] = next(iter(given.values()), default)
        if found[name] is REQUIRED:
            raise UnsupportedError(f"{name} is missing")
    return found


def write(config: ModelConfig) -> dict:
    """The config.json of a model, for its own family or else the first that can hold it.

    Raises: UnsupportedError if no Hugging Face class can hold it.
    """
    problems = {}
    for model_type in (config.model_type, *KEYS):
        if model_type in KEYS:
            problems[model_type] = _cannot_hold(config, model_type)
            if not problems[model_type]:
                return _values(config, model_type)
    closest = min(problems, key=lambda name: len(problems[name]))
    lost = ", ".join(problems[closest])
    drops = lost == "dispatch='capacity'"
    without = ", and convert.py --dropless writes it as one that drops none" if drops else ""
    raise UnsupportedError(
        f"no Hugging Face model class holds this model; the closest, {closest}, has not {lost}; "
        f"a run's own checkpoint (--to=orbax) holds it{without}"
    )


def _cannot_hold(config: ModelConfig, model_type: str) -> list[str]:
    """The fields that a family's config.json cannot hold, as "name=value"."""
    try:
        other = read(_values(config, model_type))
    except ValueError as error:
        return [str(error)] * 9
    # max_position_embeddings is compared even with rotary positions, because a folder must state
    # how long texts may be. Which tokens a full expert drops is not compared, because no family
    # states it (`dispatch` is compared).
    ours = in_force(config) | {"max_position_embeddings": config.max_position_embeddings}
    theirs = in_force(other) | {"max_position_embeddings": other.max_position_embeddings}
    return [
        f"{name}={value!r}"
        for name, value in ours.items()
        if theirs.get(name) != value and name not in OF_FULL_EXPERTS
    ]


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
