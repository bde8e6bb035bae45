"""A key that is set and that nothing reads is refused, with what would make it effective."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax import config as configs
from moe_jax.config import sections
from moe_jax.config.section import Section
from moe_jax.model.config import ModelConfig, fields_of
from moe_jax.model.fields import EXPERTS, ROUTER

ROOT = Path(__file__).parents[2]


def config_of(keys):
    config = configs.default()
    config.model.preset = "quickstart"
    config.update_from_flattened_dict(keys)
    return config


def complaint(keys):
    with pytest.raises(configs.ConfigError) as error:
        configs.resolve(config_of(keys))
    assert "\n" not in str(error.value)
    return str(error.value)


def other(default):
    """Another value than a key's default, which its check accepts."""
    match default:
        case bool():
            return not default
        case int():
            return default + 1
        case float():
            return default / 2 or 0.5
        case tuple():
            return (("a", 1.0),)
    others = {"layer": "all_layers", "switch": "squared", "global": "device", "mean": "sum"}
    others["sign"] = "quantile"
    return others.get(default, "adaptive")


# A value of each field of a mixture.
OF_MIXTURES = {
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "router": "sigmoid_topk",
    "norm_topk_prob": False,
    "gate_norm_std": 1.0,
    "num_expert_groups": 2,
    "num_groups_per_tok": 2,
    "routed_scaling_factor": 2.5,
    "router_parameters": (("sharpness", 2.0),),
    "dispatch": "capacity",
    "merge_segment_length": 128,
    "capacity_factor": 2.0,
    "min_capacity": 8,
    "token_priority": "random",
}


def test_every_field_of_mixtures_needs_experts():
    """A field that is added belongs to experts or routers, and needs them by that."""
    assert set(OF_MIXTURES) == fields_of(EXPERTS, ROUTER) - {"num_experts", "layers"}


@pytest.mark.parametrize("name", [*OF_MIXTURES, "expert_parallel", "grouped_matmul"])
def test_a_field_of_mixtures_is_refused_for_a_dense_model(name):
    value = {"expert_parallel": "fsdp", "grouped_matmul": "blocked"} | OF_MIXTURES
    shown = f"config.model.{name}={value[name]!r} has no effect without num_experts; set it, or"
    assert complaint({f"model.{name}": value[name]}).startswith(shown)


@pytest.mark.parametrize(
    "key",
    [
        f"{section.path}.{field.name}"
        for section in (sections.Balance, sections.AdaptiveBalance)
        for field in dataclasses.fields(section)
        if "explanation" in field.metadata
    ],
)
def test_a_key_of_balance_is_refused_for_a_dense_model(key):
    section = sections.AdaptiveBalance if "adaptive." in key else sections.Balance
    value = other(section.__dataclass_fields__[key.rpartition(".")[2]].default)
    assert "has no effect without config.model.num_experts" in complaint({key: value})


SPARSE = {"model.num_experts": 4}
MERGED = {**SPARSE, "model.dispatch": "merge", "model.merge_segment_length": 128}
BIASED = {**SPARSE, "model.router": "sigmoid_topk"}
PREPARED = {"data.source": "prepared:tokens"}
UPCYCLED = {"init.source": "a", "init.upcycle.recipe": "merge_back"}


@pytest.mark.parametrize(
    ("others", "key", "value", "needed"),
    [
        (SPARSE, "model.min_capacity", 8, "dispatch='capacity'"),
        (SPARSE, "model.token_priority", "random", "dispatch='capacity'"),
        (SPARSE, "model.merge_segment_length", 128, "dispatch='merge'"),
        (MERGED, "model.norm_topk_prob", False, "dispatch='dropless' or 'capacity'"),
        (MERGED, "model.gate_norm_std", 1.0, "dispatch='dropless' or 'capacity'"),
        (MERGED, "model.num_experts_per_tok", 1, "dispatch='dropless' or 'capacity'"),
        (MERGED, "model.capacity_factor", 2.0, "dispatch='dropless' or 'capacity'"),
        (MERGED, "balance.router_z_coefficient", 0.1, "config.model.dispatch='dropless'"),
        (MERGED, "evaluation.num_experts_per_tok", 1, "config.model.dispatch='dropless'"),
        (BIASED, "model.num_groups_per_tok", 2, "num_expert_groups of 2 or more"),
        ({"model.position_embedding": "learned"}, "model.rope_theta", 1e6, "'rotary'"),
        ({"model.position_embedding": "learned"}, "model.rope_type", "linear", "'rotary'"),
        (
            {"model.layer_types": ("full_attention",) * 4},
            *("model.sliding_window", 8, "'sliding_attention' in layer_types"),
        ),
        (SPARSE, "balance.adaptive.beta", 0.5, "load_balancing_schedule='adaptive'"),
        (
            {**SPARSE, "balance.load_balancing_form": "squared"},
            *("balance.load_balancing_divide_by_k", False, "load_balancing_form='switch'"),
        ),
        (
            {**BIASED, "balance.bias_update": "quantile"},
            *("balance.bias_update_rate", 0.1, "config.balance.bias_update='sign'"),
        ),
        ({}, "optimizer.decay_steps", 5, "config.optimizer.schedule='wsd'"),
        (
            {"optimizer.schedule": "wsd"},
            *("optimizer.final_learning_rate_ratio", 0.0, "config.optimizer.decay_steps"),
        ),
        ({}, "optimizer.initial_learning_rate_ratio", 0.1, "config.optimizer.warmup_steps"),
        ({}, "optimizer.orthogonal_every", 5, "config.model.num_experts"),
        (
            {"optimizer.weight_decay": 0.0},
            *("optimizer.weight_decay_factors", (("a", 0.5),), "config.optimizer.weight_decay"),
        ),
        ({}, "objective.distillation.temperature", 2.0, "config.objective.distillation.source"),
        ({}, "evaluation.continuation_tokens", 5, "config.evaluation.prompts"),
        (UPCYCLED, "init.upcycle.router", "normal", "recipe that makes a mixture"),
        (PREPARED, "data.label_field", "topic", "config.data.source that is not prepared"),
        (PREPARED, "data.validation_fraction", 0.5, "config.data.source that is not prepared"),
    ],
)
def test_a_key_that_another_key_switches_off_is_refused_with_that_key(others, key, value, needed):
    configs.resolve(config_of(others))
    said = complaint({**others, key: value})
    assert said.startswith(f"config.{key}={value!r} has no effect without ") and needed in said


@pytest.mark.parametrize(
    ("router", "name"),
    [
        ("topk_softmax", "gate_norm_std"),
        ("topk_softmax", "norm_topk_prob"),
        ("noisy_topk", "norm_topk_prob"),
        ("softmax_topk", "routed_scaling_factor"),
        ("softmax_topk", "num_expert_groups"),
    ],
)
def test_a_key_that_the_router_does_not_read_is_refused_with_routers_that_do(router, name):
    keys = {**SPARSE, "model.router": router, f"model.{name}": OF_MIXTURES[name]}
    assert f"has no effect with router='{router}'; leave it out, or use" in complaint(keys)


def test_what_is_read_what_is_the_default_and_what_a_preset_has_is_accepted():
    for keys in (
        {"model.norm_topk_prob": True, "model.min_capacity": 4, "optimizer.decay_steps": 0},
        {"model.preset": "lola"},  # has a token_priority, and is dropless
        {**SPARSE, "model.capacity_factor": 2.0},  # of the drop rate that is reported
        {"optimizer.schedule": "wsd", "optimizer.decay_steps": 5},
        {"balance.load_balancing_coefficient": 0.0},  # off, as it is in a dense model
    ):
        configs.resolve(config_of(keys))


def test_a_stored_run_is_read_whatever_it_was_given():
    config = config_of({"optimizer.decay_steps": 5, "model.min_capacity": 8})
    assert configs.of_stored(config).optimizer.decay_steps == 5


def test_every_need_is_a_condition_on_what_it_is_asked_of():
    run = configs.resolve(config_of({}))
    for field in dataclasses.fields(ModelConfig):
        assert all(need.holds(run.model) in (True, False) for need in field.metadata["needs"])
    for section in Section.__subclasses__():
        for field in dataclasses.fields(section):
            needs = (*section.needs, *field.metadata.get("needs", ()))
            if section is not sections.Upcycle:  # whose recipe is empty here
                assert all(need.holds(run) in (True, False) for need in needs)


def test_the_command_upcycle_refuses_such_a_field_too(tmp_path):
    command = [sys.executable, "scripts/upcycle.py", "--source=tests/golden/llama"]
    command += [f"--output={tmp_path / 'moe'}", "--model.min_capacity=8"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    said = "--model.min_capacity=8 has no effect without dispatch='capacity'; set it, or leave"
    assert said in ended.stderr
