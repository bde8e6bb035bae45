"""Every family against its reference implementation, on tiny random checkpoints.

The checkpoints and what the reference computes of them: tests/golden/README.md.
"""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import hf, model
from moe_jax.hf import safetensors
from moe_jax.model import router
from moe_jax.training import balance as rules

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
NAMES = sorted(p.name for p in GOLDEN.iterdir() if (p / "config.json").exists())
READ_ONLY = ("gpt2_hub", "mixtral_stacked", "qwen3_moe_stacked", "skywork_remote_names")
V4 = [name for name in NAMES if (GOLDEN / name / "config.v4.json").exists()]

apply = jax.jit(model.apply, static_argnames=("config", "return_routing"))


@functools.cache
def loaded(name):
    return hf.load(GOLDEN / name)


@functools.cache
def expected(name):
    return dict(np.load(GOLDEN / name / "golden.npz"))


@functools.cache
def output(name):
    config, params = loaded(name)
    tokens_BT = jnp.asarray(expected(name)["input_ids"])
    return apply(params, tokens_BT, config, return_routing=bool(config.num_experts))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_references(name):
    want = expected(name)["logits"]
    np.testing.assert_allclose(output(name).logits_BTV, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", [n for n in NAMES if loaded(n)[0].num_experts])
def test_routing_is_the_references(name):
    config, _ = loaded(name)
    want, routing = expected(name), output(name).router.routing
    layers = [i for i, kind in enumerate(config.layer_kinds) if kind == "moe"]
    np.testing.assert_array_equal(layers, want["moe_layers"])
    n, k = len(layers), config.num_experts_per_tok
    logits, index, weight = (
        np.asarray(x).reshape(n, -1, x.shape[-1])
        for x in (routing.logits_ME, routing.expert_index_MA, routing.weight_MA)
    )
    np.testing.assert_allclose(logits, want["router_logits"], atol=1e-4)
    np.testing.assert_array_equal(index, want["topk_idx"])
    np.testing.assert_allclose(weight, want["topk_weights"], atol=1e-5)
    if "aux_loss" not in want:
        return
    # LOLA adds its layers up; the others pool the tokens of all layers.
    ours = rules.load_balancing(
        rules.pooled(output(name).router),
        num_experts_per_tok=k,
        scope="layer" if config.model_type == "lola_v1" else "all_layers",
        divide_by_k=False,
        form="switch",
    ).sum()
    np.testing.assert_allclose(ours, want["aux_loss"], atol=1e-5)


@pytest.mark.parametrize("name", V4)
def test_both_spellings_of_a_config_are_the_same_model(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    (folder / "config.v4.json").replace(folder / "config.json")
    config, _ = hf.load(folder)
    assert config == loaded(name)[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_loads_as_the_same_and_has_the_same_tensors(name, tmp_path):
    config, params = loaded(name)
    hf.save(tmp_path / "saved", config, params, source=GOLDEN / name)
    again, saved = hf.load(tmp_path / "saved")
    assert jax.tree.structure(saved) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, saved, params)
    assert jax.tree.map(lambda x: x.dtype, saved) == jax.tree.map(lambda x: x.dtype, params)
    ours, theirs = (
        {n: (t.shape, t.dtype) for n, t in safetensors.open_folder(f).items()}
        for f in (tmp_path / "saved", GOLDEN / name)
    )
    if name not in READ_ONLY:
        assert ours == theirs
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    before = json.loads((GOLDEN / name / "config.json").read_text())
    assert values["model_type"] == before["model_type"]
    assert values["bos_token_id"] == before["bos_token_id"]
    hf.save(tmp_path / "twice", again, saved, source=tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes(), file.name


def test_an_upcycled_nemotron_is_refused_at_export(tmp_path):
    config, params = loaded("nemotron")
    moe = config.to_moe(num_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="no Hugging Face model class holds this model") as error:
        hf.save(tmp_path / "out", moe, params)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("j", range(3))
def test_sigmoid_routing_is_deepseeks(j):
    folder = GOLDEN / "deepseek_v3_routing"
    settings = json.loads((folder / "meta.json").read_text())["variants"][j]
    want = {
        k.removeprefix(f"v{j}_"): v
        for k, v in np.load(folder / "golden.npz").items()
        if k.startswith(f"v{j}_")
    }
    x_MD = want["x"].reshape(-1, want["x"].shape[-1])
    routing = router.sigmoid_topk(
        jnp.asarray(x_MD @ want["weight"].T),
        jnp.asarray(want["bias"]),
        num_experts_per_tok=settings["num_experts_per_tok"],
        norm_topk_prob=settings["norm_topk_prob"],
        num_expert_groups=settings["n_group"],
        num_groups_per_tok=settings["topk_group"],
        routed_scaling_factor=settings["routed_scaling_factor"],
    )
    order = np.argsort(-np.asarray(routing.weight_MA), axis=-1, kind="stable")
    index, weight = (
        np.take_along_axis(np.asarray(x), order, axis=-1)
        for x in (routing.expert_index_MA, routing.weight_MA)
    )
    np.testing.assert_array_equal(index, want["topk_idx"])
    np.testing.assert_allclose(weight, want["topk_weights"], atol=1e-5)
