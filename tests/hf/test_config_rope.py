"""Stretched rotary positions are those of Transformers, in both of its spellings."""

import json

import numpy as np
import pytest

from moe_jax.hf import configs
from moe_jax.model import rope
from tests.hf.test_configs import DEFAULT_ROPE, GOLDEN, LLAMA3, SIZES, YARN, read


@pytest.mark.parametrize(
    "scaling",
    [LLAMA3, YARN, {**YARN, "attention_factor": 1.5}, {"rope_type": "linear", "factor": 2.0}],
)
def test_a_stretched_rope_is_written_in_both_spellings(scaling):
    config = read("qwen2", rope_scaling=scaling, rope_theta=5e5, head_dim=8)
    written = configs.write(config)
    # A key that is left out has the same default in Transformers.
    assert scaling.items() <= written["rope_scaling"].items()
    assert written["rope_parameters"] == {"rope_theta": 5e5, **written["rope_scaling"]}
    for spelling in ("rope_scaling", "rope_parameters"):
        one = {n: v for n, v in written.items() if n != spelling}
        assert configs.read(one) == configs.read(written) == config


def frequencies_recorded():
    rows = json.loads((GOLDEN / "rope_frequencies.json").read_text())
    return [pytest.param(row, id=f"{i}") for i, row in enumerate(rows)]


ROPE_SIZES = {**SIZES, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 256}


@pytest.mark.parametrize("row", frequencies_recorded())
def test_frequencies_and_attention_factor_are_those_of_transformers(row):
    """Recorded from Transformers 5.24; 4.57.6 gives the same for what both read."""
    changes = {**ROPE_SIZES, "rope_parameters": row["rope_parameters"]}
    first = read(row["model_type"], **changes)
    for config in (first, configs.read(configs.write(first))):
        np.testing.assert_allclose(rope.frequencies(config), row["frequencies"], rtol=2e-6)
        length = rope.ROPES[config.rope_type].length(config)
        np.testing.assert_allclose(length, row["attention_factor"], rtol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("row", frequencies_recorded())
def test_the_recorded_frequencies_are_those_of_the_installed_transformers(row):
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    changes = {**ROPE_SIZES, "rope_parameters": dict(row["rope_parameters"])}
    config = transformers.AutoConfig.for_model(row["model_type"], **changes)
    frequencies, factor = functions[config.rope_parameters["rope_type"]](config, "cpu")
    assert (frequencies.tolist(), factor) == (row["frequencies"], row["attention_factor"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": LLAMA3, "rope_parameters": DEFAULT_ROPE},
            r"rope_scaling=.*llama3.* contradicts rope_parameters=.*default",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": DEFAULT_ROPE},
            r"rope_scaling=.*linear.* contradicts rope_parameters=.*default",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
            "rope_scaling=.* contradicts rope_parameters=",
        ),
        (
            {"rope_theta": 500.0, "rope_parameters": DEFAULT_ROPE},
            r"rope_theta=500\.0 contradicts rope_parameters\.rope_theta=10000\.0",
        ),
        (
            {"original_max_position_embeddings": 32, "rope_scaling": LLAMA3},
            "original_max_position_embeddings=32 contradicts rope_scaling",
        ),
    ],
)
def test_settings_of_rope_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(configs.UnsupportedError, match=message):
        read("llama", **changes)


def test_both_spellings_of_rope_side_by_side_are_read_when_they_agree():
    scaled = {"rope_theta": 5e5, **LLAMA3}
    written = configs.write(read("llama", rope_parameters=scaled))
    assert written["rope_scaling"] == LLAMA3 and written["rope_parameters"] == scaled
    assert configs.write(configs.read(written)) == written
    assert read("llama", rope_scaling={}, rope_parameters=None).rope_scaling_factor == 1
