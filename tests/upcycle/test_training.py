"""Every recipe with every router that it makes sense with learns: 30 steps on the embedded text.

A short run takes some recipes of each router, --long all of them.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe_jax import model, upcycle
from moe_jax.config import Run
from moe_jax.config.sections import Balance, Optimizer
from moe_jax.data import batches as text_batches
from moe_jax.data import prepare, tokenizers
from moe_jax.data.cache import cache_folder
from moe_jax.data.packing import RowPlan
from moe_jax.model.router import ROUTERS
from moe_jax.training import optimizer, step
from moe_jax.training.state import TrainState
from moe_jax.upcycle import recipes

DENSE = model.ModelConfig(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    remat="none",
)
STEPS = 30


def mixture(**fields):
    return DENSE.to_moe(**{"num_experts": 4, "num_experts_per_tok": 2, **fields})


SHARDS = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
PARTS = {**SHARDS, "num_experts": 4, "num_experts_per_tok": 2}
WHOLE = [
    name
    for name, recipe in recipes.RECIPES.items()
    if recipe.takes == "dense" and not (recipe.cut or recipe.shared or recipe.attention)
]
CUT = ["virtual_group", "virtual_group+drop"]
# The model, the recipes that can make it, and those of them in a short run.
MODELS = {
    "softmax_topk renormalised": (mixture(), WHOLE, ["naive", "drop", "branch_train_mix"]),
    "softmax_topk": (mixture(norm_topk_prob=False), WHOLE, []),
    "switch": (mixture(num_experts_per_tok=1, norm_topk_prob=False), WHOLE, []),
    "gate normalisation": (mixture(gate_norm_std=1.0), WHOLE, ["skywork"]),
    "topk_softmax": (mixture(router="topk_softmax"), WHOLE, []),
    "sigmoid_topk": (mixture(router="sigmoid_topk"), WHOLE, ["svd_residual"]),
    "noisy_topk": (mixture(router="noisy_topk"), WHOLE, []),
    "expert_choice": (mixture(router="expert_choice", dispatch="capacity"), WHOLE, ["noise"]),
    "capacity": (mixture(dispatch="capacity", token_priority="random"), WHOLE, []),
    "merge": (mixture(dispatch="merge", merge_segment_length=32), WHOLE, ["naive"]),
    "all experts": (mixture(num_experts_per_tok=4, norm_topk_prob=False), WHOLE, []),
    "shards softmax_topk": (mixture(**SHARDS, norm_topk_prob=False), CUT, CUT),
    "shards topk_softmax": (mixture(**SHARDS, router="topk_softmax"), CUT, []),
    "shards sigmoid_topk": (mixture(**SHARDS, router="sigmoid_topk"), CUT, []),
    "shards group_topk": (
        mixture(**SHARDS, router="group_topk", num_expert_groups=4),
        [*CUT, "divmoe"],
        ["divmoe"],
    ),
    "parts softmax_topk": (mixture(**PARTS), ["llama_moe"], []),
    "parts noisy_topk": (mixture(**PARTS, router="noisy_topk"), ["llama_moe"], ["llama_moe"]),
    "parts noisy_topk_mlp": (mixture(**PARTS, router="noisy_topk_mlp"), ["llama_moe"], []),
    "shared": (mixture(shared_expert_intermediate_size=64), ["moe_ct"], ["moe_ct"]),
    "attention": (mixture(num_attention_experts=2), ["bam"], []),
}


@functools.cache
def batches():
    corpus = prepare.open_corpus(
        "embedded",
        "train",
        tokenizers.load("bytes"),
        validation_fraction=0.05,
        cache=cache_folder(""),
    )
    rows = text_batches.batches(
        corpus,
        RowPlan(corpus.pairs, sequence_length=64, seed=0),
        batch_size=4,
    )
    return [batch for batch, _ in zip(rows, range(2 * STEPS), strict=False)]


@functools.cache
def train_step(config):
    tx = optimizer.adamw(Optimizer(learning_rate=3e-3), STEPS)
    rate = 1e-3 if config.router == "sigmoid_topk" else 0.0
    settings = Run(model=config, balance=Balance(bias_update_rate=rate))
    return tx, jax.jit(step.make_train_step(settings, tx))


def train(params, config, batches):
    tx, one_step = train_step(config)
    state = TrainState.create(params, tx)
    losses, loads = [], []
    for batch in batches:
        state, metrics = one_step(state, batch)
        losses.append(float(metrics.loss))
        loads.append(metrics.tokens_per_expert_LE)
    return state.params, losses, loads


@functools.cache
def parent():
    params, _, _ = train(model.init(DENSE, jax.random.key(0)), DENSE, batches()[:STEPS])
    return params


def learns(config, recipe):
    """Losses stay finite and fall; in every layer experts learn, and at the end 2 or more of them
    have a hundredth of the tokens each: none has collapsed onto one. Every token uses all experts
    where they are merged, in shares that no loss balances (Lory has none)."""
    several = recipes.RECIPES[recipe].several
    params = upcycle.upcycle(
        [parent(), jax.tree.map(lambda w: 0.9 * w, parent())] if several else parent(),
        DENSE,
        config,
        recipe=recipe,
        key=jax.random.key(1),
    )
    after, losses, loads = train(params, config, batches()[STEPS:])
    assert np.isfinite(losses).all(), recipe
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.02, (recipe, losses)
    last_LE = np.sum(loads[-5:], axis=0)
    in_use_L = (last_LE > 0.01 * last_LE.sum(axis=1, keepdims=True)).sum(axis=1)
    assert config.dispatch == "merge" or (in_use_L >= 2).all(), (recipe, last_LE)
    for name in ("up", "down"):
        before_LEX, after_LEX = (
            np.asarray(p["blocks"]["0"]["moe"]["experts"][name]) for p in (params, after)
        )
        moved_LE = np.abs(after_LEX - before_LEX).max(axis=(2, 3))
        assert (moved_LE.max(axis=1) > 1e-3).all(), (recipe, name)


@pytest.mark.parametrize("name", [name for name, (*_, some) in MODELS.items() if some])
def test_some_recipes_learn_with_this_router(name):
    config, _, some = MODELS[name]
    for recipe in some:
        learns(config, recipe)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_all_recipes_learn_with_this_router(name):
    config, possible, _ = MODELS[name]
    for recipe in possible:
        learns(config, recipe)


def test_every_router_and_every_recipe_for_dense_parents_is_tried():
    tried = {config.router for config, *_ in MODELS.values()}
    assert tried == {name for name, row in ROUTERS.items() if row.learned}
    made = {recipe for _, possible, _ in MODELS.values() for recipe in possible}
    assert made == {name for name, r in recipes.RECIPES.items() if r.takes == "dense"}


def test_a_wider_mixture_learns_on():
    config = MODELS["softmax_topk renormalised"][0]
    params = upcycle.upcycle(parent(), DENSE, config, recipe="drop", key=jax.random.key(1))
    wider = dataclasses.replace(config, num_experts=6)
    made = upcycle.upcycle(params, config, wider, recipe="expert_upcycling", key=jax.random.key(2))
    _, losses, _ = train(made, wider, batches()[STEPS:])
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
