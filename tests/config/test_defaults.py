"""The defaults that every config file starts from."""

import ast
import dataclasses
import pathlib

import pytest

from moe_jax import config as configs
from moe_jax.model.config import ModelConfig
from moe_jax.upcycle import recipes, router_init


def test_every_field_of_a_model_and_parameter_of_a_recipe_is_a_key_that_is_not_set():
    config = configs.default()
    assert set(config.model) == {"preset"} | {f.name for f in dataclasses.fields(ModelConfig)}
    assert all(config.model[name] is None for name in config.model if name != "preset")
    parameters = {name for recipe in recipes.RECIPES.values() for name in recipe.defaults}
    assert all(config.init.upcycle[name] is None for name in parameters)


def test_a_key_that_does_not_exist_cannot_be_set():
    config = configs.default()
    with pytest.raises(AttributeError, match="num_stps"):
        config.training.num_stps = 3


def test_two_configs_share_nothing():
    one, other = configs.default(), configs.default()
    one.balance.adaptive.rate = 0.9
    assert other.balance.adaptive.rate == 0.2


def test_a_recipe_and_an_initialiser_from_outside_are_known(monkeypatch):
    def outside(ffn, place, *, sharpness: float = 1.0):
        del place, sharpness
        return ffn

    row = dataclasses.replace(recipes.RECIPES["naive"], make=outside)
    monkeypatch.setitem(recipes.RECIPES, "outside", row)
    monkeypatch.setitem(router_init.ROUTER_INITIALISERS, "ones", lambda place: None)
    config = configs.default()
    config.model.update(preset="quickstart", num_experts=4)
    config.init.source = "runs/dense"
    config.init.upcycle.update(recipe="outside", sharpness=2.0, router="ones")
    assert configs.resolve(config).init.upcycle.parameters == {"sharpness": 2.0}


def test_reading_a_config_needs_no_tokenizer_no_corpus_and_no_mesh():
    """A mistake in a flag is answered at once: `environment` alone imports what is slow."""
    room = pathlib.Path(configs.__file__).parent
    for path in room.glob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        slow = {name for name in imported if name.startswith(("moe_jax.data", "moe_jax.parallel"))}
        # These import nothing but the standard library.
        slow -= {"moe_jax.data.shares.WEIGHTS", "moe_jax.data.packings.PACKINGS"}
        assert not slow or path.stem == "environment"
        assert not any("environment" in name for name in imported)
