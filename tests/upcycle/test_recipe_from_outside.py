"""A recipe from outside of the package needs one registration."""

import dataclasses
from typing import Annotated

import jax
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import hf, init, stores, train, upcycle
from moe_jax.hf import folders
from moe_jax.parallel import mesh as meshes
from moe_jax.upcycle import parameters, plan, recipes, step_zero
from tests import tiny_runs
from tests.hf.test_golden import GOLDEN
from tests.upcycle.test_recipes import DENSE, parents_of

HALF = Annotated[float, parameters.Parameter(share_of="the output")]


def quieter(ffn, context, *, quiet: HALF = 0.5):
    """Expert e of E gives 1 - quiet · e / E of the parent's output."""
    share = 1 - quiet * context.expert / context.config.num_experts
    return {**ffn, "down": (ffn["down"] * share).astype(ffn["down"].dtype)}


@pytest.fixture
def toy():
    recipes.RECIPES["toy"] = recipes.Recipe(
        quieter,
        source="this test",
        kept="all but the scale",
        changed="scale",
        cost=recipes.ONE,
        start=step_zero.OTHER,
    )
    yield
    del recipes.RECIPES["toy"]


def test_a_recipe_that_is_registered_runs_in_memory_and_from_folder_to_folder(toy, tmp_path):
    source, key = folders.Folder(GOLDEN / "llama"), jax.random.key(0)
    moe = source.config.to_moe(num_experts=4, num_experts_per_tok=2)
    how = {"recipe": "toy", "quiet": 0.25}
    with pytest.raises(ValueError, match="quiet=2 is not a share of the output"):
        upcycle.upcycle(source.params(), source.config, moe, **{**how, "quiet": 2}, key=key)
    in_memory = upcycle.upcycle(source.params(), source.config, moe, **how, key=key)
    hf.save(tmp_path / "whole", moe, in_memory)
    planned = plan.make(source.config, moe, recipe="toy", parameters={"quiet": 0.25})
    stores.upcycle_folders(planned, [source], tmp_path / "streamed", key)
    streamed = folders.Folder(tmp_path / "streamed").params()
    whole = folders.Folder(tmp_path / "whole").params()
    jax.tree.map(np.testing.assert_array_equal, streamed, whole)
    old, new = (p["blocks"]["0"] for p in (source.params(), streamed))
    for e in range(4):
        share = np.float32(1 - 0.25 * e / 4)
        np.testing.assert_array_equal(
            new["moe"]["experts"]["down"][:, e], old["mlp"]["down"] * share
        )


def test_a_recipe_that_is_registered_is_one_of_a_runs_config(toy, tmp_path):
    parent = dataclasses.replace(DENSE, vocab_size=259)
    [params] = parents_of(parent, 1)
    stores.save(tmp_path / "parent", parent, params)
    moe = parent.to_moe(num_experts=4, num_experts_per_tok=2)
    config = tiny_runs.config(tmp_path, moe)
    config.init.source = str(tmp_path / "parent")
    config.init.upcycle.update(recipe="toy", quiet=0.25)
    config.training.num_steps = 1
    mesh = meshes.one_device()
    settings = configs.resolve(config)
    down = init.parameters(settings, mesh, init.plan_of(settings))["blocks"]["0"]["moe"]["experts"][
        "down"
    ]
    old = params["blocks"]["0"]["mlp"]["down"]
    np.testing.assert_array_equal(down[:, 3], old * np.float32(1 - 0.25 * 3 / 4))
    assert train.run(configs.resolve(config), tmp_path / "run")["steps"] == 1
