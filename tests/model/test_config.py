"""ModelConfig: its refusals, its groups of layers, its counts of parameters."""

import dataclasses

import pytest

from moe_jax import model
from moe_jax.model.config import DENSE, MOE
from moe_jax.model.layout import layer_groups

TINY = model.ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize(
    ("kinds", "patterns"),
    [
        ((DENSE,) * 5, [((DENSE,), 5)]),
        ((DENSE, MOE) * 12, [((DENSE, MOE), 12)]),  # LOLA
        ((DENSE, MOE, MOE, MOE), [((DENSE,), 1), ((MOE,), 3)]),  # a leading dense layer
        ((DENSE, MOE, DENSE, MOE, MOE), [((DENSE, MOE), 2), ((MOE,), 1)]),
    ],
)
def test_layers_are_grouped_into_the_fewest_traced_blocks(kinds, patterns):
    found = layer_groups(kinds)
    assert [(tuple(s.kinds.values()), s.repeats) for s in found] == patterns


def test_slots_are_keyed_through_all_layer_groups_and_hold_every_layer_once():
    kinds = (DENSE, MOE, DENSE, MOE, MOE, MOE)
    found = layer_groups(kinds)
    keys = [slot for group in found for slot in group.kinds]
    assert keys == [str(i) for i in range(len(keys))]
    of_layer = {layer: s.kinds[p] for s in found for p, ls in s.layers.items() for layer in ls}
    assert tuple(of_layer[i] for i in range(len(kinds))) == kinds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok=3 is more than num_exp",
        ),
        ({"hidden_size": 30}, "hidden_size=30 is not divisible by num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by"),
        ({"layers": (DENSE, MOE)}, "layers names 2 layers but num_hidden_layers=4"),
        ({"layers": (MOE,) * 4}, "does not fit layers"),
        ({"layers": ("sparse",) * 4, "num_experts": 4}, "kind 'sparse'"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be at least 1"),
        ({"num_attention_experts": -2}, "num_attention_experts=-2 must be at least 0"),
        ({"dtype": "float64"}, "dtype='float64'"),
        ({"dtype": "float16"}, "loss scale.*; use bfloat16, or float32 on a T4"),
        ({"router": "topk"}, "router='topk' is unknown: did you mean 'topk_softmax'"),
        ({"rope_type": "ntk"}, "rope_type='ntk' is unknown; use one of"),
        ({"rope_scaling_factor": 8.0}, "no effect .*'default'; .* reads it: linear, llama3, yarn"),
        ({"rope_type": "linear", "rope_truncate": False}, "rope_truncate=False has no effect"),
        ({"rope_type": "llama3", "rope_low_freq_factor": 4.0}, "must be less than rope_high"),
        ({"rope_type": "yarn", "rope_beta_slow": 64.0}, "rope_beta_fast=32.0 must be at least"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(TINY, **change)
    assert "\n" not in str(error.value)


def test_a_dense_model_has_the_product_of_experts_checked_only_if_it_names_one():
    assert "grouped_matmul" not in TINY.implementations
    named = dataclasses.replace(TINY, grouped_matmul="nonesuch")
    assert named.implementations["grouped_matmul"] == "nonesuch"


def test_parameter_counts_agree_with_a_count_by_hand():
    V, D, F, L, N, K, H, E, A = 64, 32, 48, 4, 4, 2, 8, 8, 2
    attention = D * H * (2 * N + 2 * K)
    other = V * D * 2 + D + L * (attention + 2 * D)
    assert model.count_parameters(TINY) == (other + L * 3 * D * F,) * 2
    moe = TINY.to_moe(num_experts=E, num_experts_per_tok=A)
    router = L * D * E
    assert model.count_parameters(moe) == (
        other + router + L * E * 3 * D * F,
        other + router + L * A * 3 * D * F,
    )
    merged = dataclasses.replace(moe, dispatch="merge")
    assert model.count_parameters(merged)[1] == other + router + L * 3 * D * F
