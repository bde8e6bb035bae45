"""Converts config.json to ModelConfig and back.

The spellings of Transformers 4 (`rope_theta`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`) are
both read and both written, because version 4 silently ignores the keys of version 5. A key that
would change the computation and is not supported is refused; nothing is guessed.
"""

import dataclasses
import difflib
import pathlib
import reprlib

from moe_jax import spelling, strict_json
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
    "is_encoder_decoder": (False,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None, {}),
    "transformers_weights": (None,),
}
# Keys of any family that do not change what the model computes from given weights: settings of
# training, generation and tokenizers, names, and what other programs leave in the file. The first
# three lines are of Transformers 5.24, the next seven of earlier versions.
HARMLESS = frozenset(
    """
    architectures attention_dropout attn_pdrop auto_map bos_token_id chunk_size_feed_forward dtype
    embd_pdrop eos_token_id id2label label2id output_attentions output_hidden_states
    output_router_logits pad_token_id problem_type resid_pdrop return_dict router_aux_loss_coef
    router_jitter_noise tokenizer_class torch_dtype transformers_version use_cache
    attn_implementation bad_words_ids base_model_tp_plan base_model_pp_plan begin_suppress_tokens
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    is_decoder length_penalty max_length max_sequence_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_scores predict_special_tokens
    prefix pretraining_tp remove_invalid_values reorder_and_upcast_attn repetition_penalty
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder top_k top_p torchscript typical_p use_bfloat16
    consider_aux_loss gradient_checkpointing is_llama_config max_window_layers
    moe_feature_no_mul_topk moe_use_mixtral_gating n_ctx n_special output_past router_z_loss_coef
    transformers.js_config unsloth_fixed unsloth_version use_flash_attention use_flash_attn
    """.split()
)
HARMLESS_PREFIXES = ("_", "summary_")
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
    _check_names(keys, values)
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


def _check_names(keys: Keys, values: dict) -> None:
    """Refuses a key that this family is not known to have: it may be a misspelt one, whose default
    would be used in silence, or one that changes what the model computes.

    A key without a value asks for nothing, unless it is nearly one that the family has.
    """
    known = {"model_type", "layer_types", *EVERY, *keys.only, *keys.aliases, *keys.aliases.values()}
    known |= {theirs for theirs, _ in keys.fields.values()}
    known |= {name for part in keys.parts for name in part.keys}
    for name, value in values.items():
        if name in known or name in HARMLESS or name.startswith(HARMLESS_PREFIXES):
            continue
        if value or difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            meant = spelling.did_you_mean(name, sorted(known))
            raise UnsupportedError(
                f"{reprlib.repr(name)} is no key that a {values['model_type']} is known to have"
                f"{meant}; correct it, or remove it if the model computes the same without it"
            )


def _found(keys: Keys, values: dict) -> dict:
    """The value of each key of a family in a config.json, or the family's default."""
    table = {"layer_types": (LAYER_TYPES.or_null(), None)}
    table |= {theirs: (kind_of(ours), default) for ours, (theirs, default) in keys.fields.items()}
    for part in keys.parts:
        table |= part.keys
    found = {}
    for name, (kind, default) in table.items():
        given = {n: values[n] for n in (name, keys.aliases.get(name, name)) if n in values}
        for given_name, value in given.items():
            check(given_name, value, kind)
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
