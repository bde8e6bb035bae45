"""Pruning: the same sizes are the parent bitwise; importance equals a numpy twin; unused parts go
first."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from moe_jax import model, stores, tree
from moe_jax.analysis import importance
from moe_jax.commands import prune
from moe_jax.model import layout
from moe_jax.parallel import mesh as meshes
from moe_jax.upcycle import pruning

DENSE = model.ModelConfig(
    vocab_size=259,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    remat="none",
)
MOE = DENSE.to_moe(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    shared_expert_intermediate_size=8,
    layers=("dense", "moe", "moe"),
)
TOKENS_NBT = [np.asarray(jax.random.randint(jax.random.key(i), (3, 8), 0, 259)) for i in range(2)]


@functools.cache
def params_of(config):
    return jax.jit(functools.partial(model.init, config))(jax.random.key(0))


@functools.cache
def found_of(config):
    return importance.measure(params_of(config), config, TOKENS_NBT)


@pytest.mark.parametrize(
    "config", [pytest.param(DENSE, marks=pytest.mark.long), MOE], ids=["dense", "moe"]
)
def test_a_model_pruned_to_its_own_sizes_is_the_parent_bitwise(config):
    sizes = {name: getattr(config, name) for name in pruning.SIZES if getattr(config, name)}
    same = pruning.config_of(config, sizes)
    smaller, made = pruning.pruned(params_of(config), config, same, found_of(config))
    assert smaller.block_kinds == config.block_kinds
    assert jax.tree.structure(made) == jax.tree.structure(params_of(config))
    jax.tree.map(np.testing.assert_array_equal, made, params_of(config))


SMALLER = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (DENSE, {**SMALLER, "intermediate_size": 10}),
        (MOE, {**SMALLER, "moe_intermediate_size": 5, "num_experts": 3}),
        pytest.param(MOE, {"num_hidden_layers": 2, "num_experts": 2}, marks=pytest.mark.long),
    ],
    ids=["dense", "mixture", "layers and experts"],
)
def test_a_pruned_model_has_the_tree_of_its_config_and_computes(config, sizes):
    smaller = pruning.config_of(config, sizes)
    smaller, made = pruning.pruned(params_of(config), config, smaller, found_of(config))
    shapes = jax.eval_shape(functools.partial(model.init, smaller), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, shapes)
    assert np.isfinite(importance.loss(made, smaller, TOKENS_NBT[:1]))


def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def test_the_importance_of_neurons_channels_layers_and_experts_equals_a_numpy_twin():
    """Attention is taken from the model; all that is scored is computed again, token by token."""
    config = dataclasses.replace(MOE, num_hidden_layers=1, layers=("moe",))
    params, found = params_of(config), found_of(config)
    p = jax.tree.map(np.float64, layout.layer(params, config, 0))
    x = np.concatenate([np.asarray(params["embed"]["tokens"])[t] for t in TOKENS_NBT])
    # The block with a feed-forward of zero gives the residual stream in its middle.
    silent = jax.tree.map(lambda w: w, params)
    for part in ("experts", "shared"):
        down = silent["blocks"]["0"]["moe"][part]["down"]
        silent["blocks"]["0"]["moe"][part]["down"] = down * 0
    middle = x + attention_of(silent, config)
    y = norm(middle, p["moe"]["norm"]["scale"])
    B, T, D = y.shape
    squares, saliency, load = np.zeros((T, 4, 12)), np.zeros(4), np.zeros(4)
    out = np.zeros_like(y)
    for b, t in np.ndindex(B, T):
        logits = y[b, t] @ p["moe"]["router"]["kernel"]
        share = np.exp(logits - logits.max())
        share /= share.sum()
        chosen = np.argsort(-share)[:2]
        for e in chosen:
            expert = {n: w[e] for n, w in p["moe"]["experts"].items()}
            h = silu(y[b, t] @ expert["gate"]) * (y[b, t] @ expert["up"])
            weight = share[e] / share[chosen].sum()
            squares[t, e] += h**2
            saliency[e] += weight * np.linalg.norm(h @ expert["down"])
            load[e] += 1
            out[b, t] += weight * h @ expert["down"]
        shared = p["moe"]["shared"]
        h = silu(y[b, t] @ shared["gate"]) * (y[b, t] @ shared["up"])
        out[b, t] += h @ shared["down"]
    np.testing.assert_allclose(found.neurons[0], np.sqrt(squares).mean(axis=0), rtol=2e-4)
    np.testing.assert_allclose(found.experts[0], saliency / load, rtol=2e-4)
    counted = importance.measure(params, config, TOKENS_NBT, "frequency")
    np.testing.assert_array_equal(counted.experts[0], load)
    z = middle + out
    cosine = (x * z).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(z, axis=-1)
    np.testing.assert_allclose(found.layers_L, [(1 - cosine).mean()], rtol=1e-3)
    both = norm(x, p["attention"]["norm"]["scale"]) ** 2 + y**2
    np.testing.assert_allclose(found.channels_D, np.sqrt(both.sum(0)).mean(0), rtol=2e-4)


def attention_of(params, config):
    """What the attention of a model of one layer adds to its input, for all rows."""
    block = layout.layer(params, config, 0)
    rows = np.concatenate(TOKENS_NBT)
    shared = importance.parent_statistics.one_document(rows)
    x = params["embed"]["tokens"][rows]
    y, _ = importance.attention.attention(
        *(x, block["attention"], shared.positions_BT, shared.segment_ids_BT, config)
    )
    return np.asarray(y, np.float64)


def test_a_head_counts_by_its_output():
    """With one key head's values doubled, its score doubles and the other's stays."""
    config = dataclasses.replace(DENSE, num_hidden_layers=1)
    params = params_of(config)
    leaves = tree.flatten(params)
    doubled = leaves["blocks/0/attention/wv"].at[:, :, 1].multiply(2.0)
    changed = tree.unflatten({**leaves, "blocks/0/attention/wv": doubled})
    before, after = (
        importance.measure(p, config, TOKENS_NBT[:1]).heads[0] for p in (params, changed)
    )
    np.testing.assert_allclose(after / before, [1, 2], rtol=1e-5)


def test_the_command_removes_neurons_that_do_nothing_without_changing_the_loss(
    tmp_path, monkeypatch, capsys
):
    config = dataclasses.replace(DENSE, num_hidden_layers=2)
    leaves = tree.flatten(params_of(config))
    dead = np.array([1, 5, 6, 20])
    leaves = {n: w.at[:, :, dead].set(0) if n.endswith("mlp/up") else w for n, w in leaves.items()}
    stores.save(tmp_path / "parent", config, tree.unflatten(leaves))
    (tmp_path / "text.txt").write_text("a text of more than sixty-four tokens in bytes " * 4)
    arguments = [
        *("prune", f"--source={tmp_path / 'parent'}", f"--text={tmp_path / 'text.txt'}"),
        *("--num_batches=2", "--batch_size=2", "--sequence_length=16", "--to=orbax"),
    ]
    output = f"--output={tmp_path / 'pruned'}"
    monkeypatch.setattr("sys.argv", [*arguments, output, "--model.intermediate_size=20"])
    prune.main()
    report = json.loads((tmp_path / "pruned" / prune.REPORT).read_text())
    assert report["loss"][0] == pytest.approx(report["loss"][1], abs=1e-5)
    assert "step 0: parameters" in capsys.readouterr().out
    smaller, made = stores.load(tmp_path / "pruned", meshes.one_device())
    assert smaller.intermediate_size == 20
    left = np.delete(np.asarray(leaves["blocks/0/mlp/gate"]), dead, axis=2)
    np.testing.assert_array_equal(made["blocks"]["0"]["mlp"]["gate"], left)

    for value, message in {
        "intermediate_size=25": "must be from 1 to the parent's 24",
        "num_attention_heads=3": "multiple of 2, the query heads that share keys",
        "vocab_size=3": "--model='vocab_size' is unknown",
    }.items():
        other = f"--output={tmp_path / 'other'}"
        monkeypatch.setattr("sys.argv", [*arguments, other, f"--model.{value}"])
        with pytest.raises(SystemExit):
            prune.main()
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "other").exists()
