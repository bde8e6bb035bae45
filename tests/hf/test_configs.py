"""config.json is read as Transformers computes it, or refused in a line that says what is wrong."""

import dataclasses
import json
import pathlib
import shutil

import pytest

from moe_jax import hf
from moe_jax.hf import configs
from moe_jax.model.config import ModelConfig

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2_SIZES = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
ROTARY = [name for name, keys in configs.KEYS.items() if "position_embedding" not in keys.always]
DENSE = ModelConfig(**SIZES)
SPARSE = dataclasses.replace(DENSE, num_experts=16)


def values(model_type, **changes):
    sizes = SIZES if model_type in ROTARY else GPT2_SIZES
    return {"model_type": model_type, **sizes, **changes}


def read(model_type, **changes):
    return configs.read(values(model_type, **changes))


def refusal(config_json):
    with pytest.raises(configs.UnsupportedError) as error:
        configs.read(config_json)
    assert "\n" not in str(error.value)
    return str(error.value)


def windows(config):
    return [kind.window for kind in config.block_kinds]


def test_a_window_of_qwen3_moe_is_of_all_layers():
    changes = {"use_sliding_window": True, "sliding_window": 8}
    assert windows(read("qwen3_moe", **changes)) == [8] * 3
    assert windows(read("qwen3_moe", **changes, max_window_layers=2)) == [8] * 3
    assert windows(read("qwen3_moe", sliding_window=8)) == [None] * 3
    assert windows(read("qwen2", **changes, max_window_layers=2)) == [None, None, 8]


def test_qwen3_moe_is_written_with_a_window_in_all_layers_or_none():
    config = dataclasses.replace(SPARSE, qk_norm="head", sliding_window=8)
    written = configs.write(config)
    assert written["model_type"] == "qwen3_moe"
    assert written["use_sliding_window"] and written["sliding_window"] == 8
    assert "layer_types" not in written
    assert windows(configs.read(written)) == [8] * 3
    mixed = dataclasses.replace(config, layer_types=(FULL, SLIDING, SLIDING))
    with pytest.raises(ValueError, match="no Hugging Face model class holds this model"):
        configs.write(mixed)
    dense = dataclasses.replace(mixed, num_experts=0)
    assert configs.write(dense)["layer_types"] == [FULL, SLIDING, SLIDING]


@pytest.mark.parametrize("model_type", ROTARY)
@pytest.mark.parametrize(
    "spelling",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
        {"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}},
    ],
)
def test_only_nemotron_rotates_a_part_of_a_head(model_type, spelling):
    if model_type == "nemotron":
        assert read(model_type, **spelling).partial_rotary_factor == 0.5
    else:
        assert "partial_rotary_factor=0.5" in refusal(values(model_type, **spelling))
        assert read(model_type, partial_rotary_factor=1).partial_rotary_factor == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 8},
        {"attention_bias": "qkv"},
        {"qk_norm": "head"},
        {"num_experts": 8},
        {"num_experts": 8, "qk_norm": "full", "norm_topk_prob": False},
        {"num_experts": 8, "qk_norm": "head"},
    ],
)
def test_a_rotated_part_is_not_written_where_it_would_be_ignored(changes):
    config = dataclasses.replace(DENSE, **changes)
    configs.write(config)
    with pytest.raises(ValueError, match=r"has not partial_rotary_factor=0\.5"):
        configs.write(dataclasses.replace(config, partial_rotary_factor=0.5))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_nemotron_is_written_with_the_share_of_a_head_that_it_rotates(share):
    config = dataclasses.replace(
        *(DENSE,),
        norm="layer_1p",
        gated_mlp=False,
        hidden_act="relu2",
        partial_rotary_factor=share,
    )
    written = configs.write(config)
    assert written["partial_rotary_factor"] == share
    assert written["rope_parameters"]["partial_rotary_factor"] == share
    assert configs.read(written).partial_rotary_factor == share


def test_a_dense_model_is_not_written_as_one_of_no_experts():
    with pytest.raises(ValueError, match="has not qk_norm='full'"):
        configs.write(dataclasses.replace(DENSE, qk_norm="full"))
    for model_type in ("mixtral", "qwen3_moe", "olmoe"):
        written = configs.write(dataclasses.replace(DENSE, model_type=model_type))
        assert written["model_type"] == "llama"
    assert "num_experts=0" in refusal(values("olmoe", num_experts=0))


def test_a_qwen3_moe_of_dense_layers_is_dense():
    config = read("qwen3_moe", mlp_only_layers=[0, 1, 2])
    assert config.num_experts == 0
    assert configs.write(config)["model_type"] == "qwen3"


@pytest.mark.parametrize(
    ("model_type", "field", "default"),
    [
        ("nemotron", "partial_rotary_factor", 0.5),
        ("nemotron", "initializer_range", 0.0134),
        ("mixtral", "rope_theta", 1e6),
        ("mixtral", "max_position_embeddings", 131_072),
        ("llama", "rope_theta", 1e4),
        ("gpt2", "tie_word_embeddings", True),
        ("qwen3_moe", "rms_norm_eps", 1e-6),
        ("olmoe", "rms_norm_eps", 1e-5),
    ],
)
def test_an_absent_key_has_the_default_of_its_class(model_type, field, default):
    assert getattr(read(model_type), field) == default


@pytest.mark.long
@pytest.mark.parametrize("model_type", [n for n in configs.KEYS if n not in ("lola_v1", "skywork")])
def test_the_defaults_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    theirs = transformers.AutoConfig.for_model(model_type)
    keys = configs.KEYS[model_type]
    table = dict(keys.fields.values()) | {
        name: default for part in keys.parts for name, (_, default) in part.keys.items()
    }
    # Filled in from other keys: a default of None is theirs too, before that.
    computed = {"head_dim", "num_key_value_heads", "layer_types", "rope_parameters", "rope_scaling"}
    for name, default in table.items():
        if default is configs.REQUIRED or not hasattr(theirs, name):
            continue
        if name in computed and default is None:
            continue
        # Switched off with use_sliding_window.
        if name == "sliding_window" and not getattr(theirs, "use_sliding_window", True):
            continue
        assert (getattr(theirs, name) or None) == (default or None), name
    if model_type in ROTARY:
        rope = theirs.rope_parameters
        config = read(model_type)
        assert config.rope_theta == rope["rope_theta"]
        assert config.partial_rotary_factor == rope.get("partial_rotary_factor", 1.0)


def test_a_key_may_have_the_other_name_of_its_class():
    changes = {"num_attention_heads": 8, "n_head": 8}
    assert read("gpt2", **changes).num_attention_heads == 8
    del changes["n_head"]
    other = values("gpt2", **changes)
    del other["n_head"]
    assert configs.read(other).num_attention_heads == 8
    message = refusal(values("gpt2", num_attention_heads=8))
    assert "n_head=4 and num_attention_heads=8" in message
    assert read("mixtral", num_experts=5).num_experts == 5
    assert read("olmoe", num_local_experts=9).num_experts == 9


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": False}, {}])
def test_a_missing_unembedding_of_an_untied_model_is_a_missing_tensor(changes, tmp_path):
    folder = copied("llama_tied_bias", tmp_path, **changes)
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        hf.load(folder)


def test_gpt2_is_tied_unless_it_says_otherwise(tmp_path):
    config, params = hf.load(copied("gpt2_hub", tmp_path))
    assert config.tie_word_embeddings
    assert "unembed" not in params


def copied(name, tmp_path, **changes):
    """A golden folder with `changes` in place of its tie_word_embeddings."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    config_json = json.loads((folder / "config.json").read_text())
    del config_json["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config_json | changes))
    return folder


WRONG = [
    ("llama", {"hidden_size": "32"}, "hidden_size='32' must be a whole number"),
    ("llama", {"hidden_size": 32.0}, "hidden_size=32.0 must be a whole number"),
    ("llama", {"num_attention_heads": True}, "num_attention_heads=True must be"),
    ("llama", {"vocab_size": None}, "vocab_size=None must be a whole number"),
    ("llama", {"vocab_size": 10**30}, "vocab_size=1000000"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be"),
    ("llama", {"head_dim": "8"}, "head_dim='8' must be a whole number"),
    ("llama", {"initializer_range": None}, "initializer_range=None must be a number"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps=None must be a number more than 0"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a number more than 0"),
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or"),
    ("llama", {"attention_bias": 1}, "attention_bias=1 must be true or false"),
    ("llama", {"hidden_act": 3}, "hidden_act=3 must be one of silu"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act=['silu'] must be one of silu"),
    ("llama", {"rope_theta": None}, "rope_theta=None must be a number more than 0"),
    ("llama", {"rope_theta": "abc"}, "rope_theta='abc' must be a number more than 0"),
    ("llama", {"rope_theta": 10**400}, "rope_theta="),
    ("llama", {"rope_scaling": 2}, "rope_scaling=2 must be an object, or null"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters=[1] must be an object, or null"),
    ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_parameters.rope_theta=None must"),
    ("llama", {"rope_parameters": {"rope_type": ["llama3"]}}, "rope_parameters.rope_type=["),
    ("llama", {"rope_parameters": {FULL: DEFAULT_ROPE}}, f"rope_parameters.{FULL}={{"),
    ("llama", {"rope_scaling": {**LLAMA3, "factor": "x"}}, "rope_scaling.factor='x' must be"),
    (
        "llama",
        {"rope_scaling": {**LLAMA3, "low_freq_factor": 4}},
        "low_freq_factor=4.0 must be less",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "up to max_position_embeddings",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "ntk"}},
        "'ntk' is not supported; use one of default, linear",
    ),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope type 'linear' without factor"),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn' without factor"),
    ("llama", {"rope_scaling": {**YARN, "low_freq_factor": 1.0}}, "no parameter 'low_freq_factor'"),
    ("llama", {"rope_scaling": {**YARN, "finetuned": True}}, "it takes factor, original_max"),
    ("llama", {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "it takes none"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor=0 must be"),
    ("llama", {"rope_scaling": {**YARN, "truncate": None}}, "truncate=None must be true or false"),
    ("llama", {"rope_scaling": {**YARN, "beta_fast": -1}}, "rope_scaling.beta_fast=-1 must be"),
    ("llama", {"rope_scaling": {**YARN, "beta_fast": 0.5}}, "rope_beta_fast=0.5 must be at least"),
    ("llama", {"rope_scaling": YARN, "rope_theta": 1}, "rope_theta=1.0 must be more than 1"),
    ("llama", {"rope_scaling": {**YARN, "type": "linear"}}, "has the types ['linear', 'yarn']"),
    ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window='yes' must be true or false"),
    ("qwen2", {"max_window_layers": "1"}, "max_window_layers='1' must be a whole number"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be a whole number"),
    ("qwen3_moe", {"decoder_sparse_step": "2"}, "decoder_sparse_step='2' must be a whole"),
    ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers=1 must be a list"),
    ("qwen3_moe", {"num_experts": [4]}, "num_experts=[4] must be a whole number"),
    ("olmoe", {"norm_topk_prob": None}, "norm_topk_prob=None must be true or false"),
    ("skywork", {"num_experts": []}, "num_experts=[] must be a whole number"),
    ("skywork", {"num_experts": ["4"]}, "num_experts=['4'] must be a whole number"),
    ("gpt2", {"n_embd": "32"}, "n_embd='32' must be a whole number"),
    ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon=0 must be a number more than 0"),
    ("gpt2", {"n_inner": 2.5}, "n_inner=2.5 must be a whole number"),
    ("qwen2", {"layer_types": 3}, "layer_types=3 must be a list"),
    ("qwen2", {"layer_types": "full"}, "layer_types='full' must be a list"),
    ("qwen2", {"layer_types": ["a", "b", "c"]}, "layer_types=['a', 'b', 'c'] must be a list"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "must be a list"),
    ("qwen2", {"layer_types": [FULL]}, "layer_types=['full_attention'] is not what a qwen2"),
    ("qwen2", {"layer_types": [FULL, SLIDING, FULL]}, "use_sliding_window=False"),
    ("qwen3_moe", {"layer_types": [FULL, SLIDING, FULL]}, "is not what a qwen3_moe"),
    ("mistral", {"layer_types": [FULL, SLIDING, FULL]}, "is not what a mistral"),
    ("llama", {"layer_types": [SLIDING] * 3}, "is not what a llama"),
    ("gpt2", {"layer_types": [SLIDING] * 3}, "is not what a gpt2"),
]


COMPUTE_OTHERWISE = {
    "is_causal": False,
    "per_layer_config": {"1": {"intermediate_size": 8}},
    "pruned_heads": {"0": [1]},
    "quantization_config": {"quant_method": "awq"},
    "transformers_weights": "other.safetensors",
}


@pytest.mark.parametrize("model_type", configs.KEYS)
@pytest.mark.parametrize("name", COMPUTE_OTHERWISE)
def test_a_key_of_any_model_that_changes_the_computation_is_refused(model_type, name):
    """Transformers 5 looks both ways, computes layers of other sizes, reads another file, …"""
    assert f"{name}=" in refusal(values(model_type, **{name: COMPUTE_OTHERWISE[name]}))
    assert read(model_type, **{name: configs.EVERY[name][0]}) == read(model_type)


def test_an_olmoe_with_a_window_is_refused():
    """Transformers 5 gives the window to some of its attention kernels, and not to its masks."""
    assert "sliding_window=8 is not supported" in refusal(values("olmoe", sliding_window=8))
    assert read("olmoe", sliding_window=None) == read("olmoe")


@pytest.mark.parametrize(
    ("model_type", "name", "other", "same"),
    [
        ("llama", "hidden_act", "swish", "silu"),
        ("gpt2", "activation_function", "gelu_python", "gelu"),
        ("gpt2", "activation_function", "gelu_accurate", "gelu_new"),
    ],
)
def test_another_name_of_an_activation_is_read(model_type, name, other, same):
    config = read(model_type, **{name: other})
    assert config == read(model_type, **{name: same})
    assert configs.write(config)[name] == same


@pytest.mark.parametrize(("model_type", "changes", "message"), WRONG)
def test_a_wrong_value_is_named_with_what_it_should_be(model_type, changes, message):
    assert message in refusal(values(model_type, **changes))


@pytest.mark.parametrize("model_type", configs.KEYS)
def test_no_key_of_a_family_goes_unchecked(model_type):
    keys = configs.KEYS[model_type]
    names = {theirs for theirs, _ in keys.fields.values()} - set(keys.only)
    for name in names.union(*(part.keys for part in keys.parts), keys.aliases.values()):
        for wrong in ("x", -1, [{}], {"rope_type": 3}):
            message = refusal(values(model_type, **{name: wrong}))
            assert message.startswith((f"{name}=", f"{name}."))


def test_layer_types_that_say_what_is_computed_are_read():
    assert windows(read("mistral", layer_types=[SLIDING] * 3, sliding_window=8)) == [8] * 3
    assert windows(read("llama", layer_types=[FULL] * 3)) == [None] * 3
    config = read("qwen3", layer_types=[FULL, SLIDING, FULL], use_sliding_window=True)
    assert windows(config) == [None, 4096, None]


def test_a_config_without_a_model_type_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    with pytest.raises(ValueError, match=r"config\.json has no model_type"):
        hf.load(tmp_path)


@pytest.mark.parametrize("model_type", [None, ["llama"], "gemma3", 3])
def test_an_unknown_model_type_is_refused(model_type):
    message = refusal({**SIZES, "model_type": model_type})
    assert f"model_type={model_type!r} is not supported; known are llama" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "sigmoid_topk"},
        {"router": "noisy_topk"},
        {"router": "expert_choice", "dispatch": "capacity"},
        {"router": "group_topk", "num_expert_groups": 2},
        {"dispatch": "merge"},
        {"dispatch": "capacity"},
        {"num_attention_experts": 2},
        {"shared_expert_intermediate_size": 48},
    ],
)
def test_a_mixture_that_no_class_computes_is_not_written(changes):
    with pytest.raises(configs.UnsupportedError, match="no Hugging Face model class holds"):
        configs.write(dataclasses.replace(SPARSE, **changes))


def test_a_router_is_written_as_the_one_that_computes_the_same():
    topk = dataclasses.replace(SPARSE, router="topk_softmax")
    for config in (SPARSE, topk):
        assert configs.write(config)["model_type"] == "mixtral"
    plain = dataclasses.replace(SPARSE, qk_norm="full")
    assert not configs.write(dataclasses.replace(plain, norm_topk_prob=False))["norm_topk_prob"]
    assert configs.write(dataclasses.replace(plain, router="topk_softmax"))["norm_topk_prob"]
