"""The presets are the published models: sizes, constants and numbers of parameters."""

import csv
import dataclasses
import pathlib

import pytest

from moe_jax import model
from moe_jax.model.config import MOE

# The released checkpoints' config.json files and cards. An empty cell is not published there, or
# has no meaning for that model; a width is that of the experts where there are some; a number of
# parameters has embeddings and the whole router in it.
TABLE = pathlib.Path(__file__).with_name("published_models.csv")
ROWS = {row["preset"]: row for row in csv.DictReader(TABLE.read_text().splitlines())}
# Ours, or without a table of its own.
ELSEWHERE = {
    *("quickstart", "quickstart-8e", "quickstart-bam-4e", "smollm2-135m", "drop-upcycling-13b"),
    *("nemotron-4-15b-e8g1t2", "nemotron-4-15b-e8g8t8", "llama-moe-3.5b"),
    "llm-jp-4-32b-a3.8b-sigmoid",
}


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_has_the_published_sizes_and_constants(name):
    config, published = model.PRESETS[name], ROWS[name]
    total, active = model.count_parameters(config)
    copies = 1 if config.tie_word_embeddings else 2
    here = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "ffn": config.expert_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "vocabulary": config.vocab_size,
        "experts": config.num_experts,
        "per_token": config.num_experts_per_tok,
        "embedding_and_head": copies * config.vocab_size * config.hidden_size,
        "total": total,
        "active": active,
        "eps": config.rms_norm_eps,
        "theta": config.rope_theta,
        "context": config.max_position_embeddings,
    }
    known = {key: float(published[key]) for key in here if published[key]}
    assert {key: float(here[key]) for key in known} == known
    assert config.tie_word_embeddings == (published["tied"] == "yes")


def test_every_preset_is_in_the_table_or_says_that_it_is_not():
    assert set(model.PRESETS) == set(ROWS) | ELSEWHERE


def test_the_parameters_by_name_are_those_of_the_cards():
    """LLM-jp's cards give their v1, 172B and 32B-A3.8B models by rounded numbers only."""
    rounded = {
        "llm-jp-1-1.3b": (1.3e9, 1.3e9),
        "llm-jp-1-13b": (13e9, 13e9),
        "llm-jp-2-13b": (13.7e9, 13.7e9),
        "llm-jp-3-172b": (172e9, 172e9),
        "llm-jp-4-32b-a3.8b": (32e9, 3.8e9),
    }
    for name, published in rounded.items():
        found = model.count_parameters(model.PRESETS[name])
        assert found == pytest.approx(published, rel=0.02), name


def test_llm_jp_4_as_released_routes_by_softmax_and_its_ablation_by_biased_sigmoids():
    released, ablation = (
        model.PRESETS[f"llm-jp-4-32b-a3.8b{suffix}"] for suffix in ("", "-sigmoid")
    )
    assert (released.router, released.norm_topk_prob) == ("softmax_topk", True)
    assert (released.qk_norm, released.model_type) == ("head", "qwen3_moe")
    assert released.layer_kinds == (MOE,) * 32
    assert (ablation.router, ablation.routed_scaling_factor) == ("sigmoid_topk", 2.5)
    same = {"router": "softmax_topk", "routed_scaling_factor": 1.0, "model_type": "qwen3_moe"}
    assert dataclasses.replace(ablation, **same) == released
