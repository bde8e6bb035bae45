"""The lists of keys have every key; a resolved run and a difference show what is set."""

import pytest

from moe_jax import config as configs
from moe_jax.config import listing, reading


def settings(**values):
    config = configs.load("configs/quickstart.py", values)
    return configs.resolve(config)


def test_every_key_of_a_config_is_listed_with_a_default_and_an_explanation():
    listed = {key.name: key for key in listing.keys()}
    assert listed.keys() == reading.kinds().keys()
    assert all(key.explanation for key in listed.values())
    assert listed["optimizer.learning_rate"].default == 3e-4
    assert "drop (0.5)" in listed["init.upcycle.ratio"].explanation


def test_a_section_is_listed_alone_and_a_misspelt_one_is_refused():
    assert {key.name.split(".")[0] for key in listing.keys("optimizer")} == {"optimizer"}
    with pytest.raises(configs.ConfigError, match="did you mean 'optimizer'"):
        listing.keys("optimiser")


def test_a_resolved_run_shows_the_fields_of_its_preset_and_what_was_set():
    found = listing.resolved(settings(**{"training.num_steps": 77}))
    assert found["training.num_steps"] == 77
    assert found["model.hidden_size"] == 128


def test_a_difference_names_the_keys_that_differ_and_no_others():
    one, two = settings(), settings(**{"optimizer.beta2": 0.9, "seed": 3})
    assert listing.difference(one, one) == []
    assert listing.difference(one, two) == [("seed", 0, 3), ("optimizer.beta2", 0.95, 0.9)]
