"""Every array has one rule, every rule has an array, and the mesh is what the config says."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from moe_jax import model, tree
from moe_jax.config.sections import Lora, Optimizer
from moe_jax.model.config import DENSE, MOE
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding
from moe_jax.training import lora, optimizer
from moe_jax.training.state import TrainState

DENSE_CONFIG = model.ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MOE_CONFIG = DENSE_CONFIG.to_moe(num_experts=4, num_experts_per_tok=2)
CONFIGS = {
    "dense": DENSE_CONFIG,
    "moe": MOE_CONFIG,
    "mixed": dataclasses.replace(MOE_CONFIG, layers=(DENSE, MOE, MOE)),
    "attention experts": dataclasses.replace(
        MOE_CONFIG, num_attention_experts=2, attention_bias="all", qk_norm="full"
    ),
    "tied": dataclasses.replace(DENSE_CONFIG, tie_word_embeddings=True),
    **model.PRESETS,
}


@functools.cache
def leaves_of(config, rank=0):
    """Path to shape of everything in a train state, with LoRA's pairs; nothing is computed."""
    adamw = optimizer.adamw(Optimizer(), 10)

    def state():
        params = model.init(config, jax.random.key(0))
        return TrainState.create(lora.added(params, Lora(rank=rank), jax.random.key(0)), adamw)

    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(state))
    return {tree.path_name(path): leaf for path, leaf in leaves}


def mesh_of(**sizes):
    return meshes.make(sizes)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_leaf_has_a_rule_of_its_rank_and_moments_lie_as_their_parameter(config):
    leaves = leaves_of(config)
    for name, leaf in leaves.items():
        assert len(sharding.spec_of(name)) <= leaf.ndim, name
    for name in leaves:
        if name.startswith("params/"):
            moments = [n for n in leaves if n.endswith(name.removeprefix("params")) and n != name]
            assert len(moments) == 2, name
            assert {sharding.spec_of(n) for n in moments} == {sharding.spec_of(name)}


def test_every_rule_is_the_first_to_match_some_leaf_of_a_preset():
    patterns = [pattern for pattern, _ in sharding.RULES]
    alive = {
        next(pattern for pattern in patterns if re.search(pattern, name))
        for config in model.PRESETS.values()
        for name in leaves_of(config, rank=2)
    }
    assert set(patterns) - alive == set()


def test_the_first_rule_that_matches_decides(monkeypatch):
    rules = ((r"up$", sharding.P("fsdp")), (r"experts/up$", sharding.P("expert")))
    monkeypatch.setattr(sharding, "RULES", rules)
    assert sharding.spec_of("experts/up") == sharding.P("fsdp")


def test_a_leaf_without_a_rule_is_refused_by_name():
    tree = {"blocks": {"0": {"attention": {"wz": np.zeros(3)}}}}
    for function in (sharding.specs, lambda tree: sharding.shardings(tree, mesh_of(fsdp=8))):
        with pytest.raises(ValueError, match="no sharding rule matches blocks/0/attention/wz"):
            function(tree)


def test_an_indivisible_axis_is_refused_with_its_leaf_and_the_fix():
    tree = {"blocks": {"0": {"mlp": {"up": np.zeros((1, 12, 16))}}}}
    assert sharding.shardings(tree, mesh_of(fsdp=4, tensor=2))
    with pytest.raises(ValueError) as error:
        sharding.shardings(tree, mesh_of(fsdp=8))
    assert str(error.value) == (
        "blocks/0/mlp/up: its axis of size 12 is not divisible by the mesh's fsdp axis (8); "
        "set config.mesh.fsdp to a divisor of 12"
    )


@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        ({"fsdp": 8}, 1 / 8),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, 1 / 8),
        ({"data": 2, "expert": 4}, 1 / 4),
        ({"data": 8}, 1),
    ],
    ids=str,
)
def test_a_device_holds_its_share_of_the_experts_bytes(sizes, share):
    mesh = mesh_of(**sizes)
    shapes = {n: s for n, s in leaves_of(MOE_CONFIG).items() if "experts/" in n}
    assert len(shapes) == 9  # three matrices and their two moments
    arrays = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    placed = jax.device_put(arrays, sharding.shardings(arrays, mesh))
    total = sum(array.nbytes for array in arrays.values())
    for device in jax.devices():
        held = sum(
            shard.data.nbytes
            for array in placed.values()
            for shard in array.addressable_shards
            if shard.device == device
        )
        assert held == share * total


def test_own_part_is_the_shard_that_the_rule_gives_and_all_gather_undoes_it():
    mesh, spec = mesh_of(fsdp=2, expert=2, tensor=2), sharding.spec_of("experts/up")
    whole = np.arange(3 * 4 * 8 * 6).reshape(3, 4, 8, 6)

    @jax.jit
    def cut_and_gather(whole):
        def on_device(whole):
            part = sharding.own_part(whole, spec)
            return part, sharding.all_gather(part, spec)

        return jax.shard_map(
            on_device, in_specs=sharding.P(), out_specs=(spec, sharding.P()), check_vma=False
        )(whole)

    with jax.set_mesh(mesh):
        cut, gathered = cut_and_gather(whole)
    np.testing.assert_array_equal(cut, whole)
    np.testing.assert_array_equal(gathered, whole)


@pytest.mark.parametrize(
    ("sizes", "devices", "filled"),
    [
        ((1, -1, 1, 1), 8, (1, 8, 1, 1)),
        ((2, 2, -1, 1), 8, (2, 2, 2, 1)),
        ((1, 2, 2, 2), 8, (1, 2, 2, 2)),
        ((-1, 1, 1, 1), 1, (1, 1, 1, 1)),
        ((-1, 1, 4, 2), 8, (1, 1, 4, 2)),
    ],
)
def test_minus_one_fills_the_mesh(sizes, devices, filled):
    sizes, filled = (dict(zip(meshes.AXES, s, strict=False)) for s in (sizes, filled))
    assert meshes.axis_sizes(sizes, devices) == {"edp": 1, **filled}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 2, 2, 1), "data=1, fsdp=2, expert=2, tensor=1, edp=1 does not fit 8 device"),
        ((1, 16, 1, 1), "does not fit 8 device.*must multiply to 8"),
        ((-1, 3, 1, 1), "does not fit 8 device.*must multiply to 8"),
        ((-1, -1, 1, 1), "only one axis may be -1"),
        ((1, 8, 0, 1), "expert=0.*an axis is at least 1, or -1 to fill"),
        ((-2, -2, 2, 1), "data=-2.*an axis is at least 1, or -1 to fill"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(sizes, message):
    with pytest.raises(ValueError, match=message) as error:
        meshes.axis_sizes(dict(zip(meshes.AXES, sizes, strict=False)), 8)
    assert "\n" not in str(error.value)


def test_a_mesh_is_set_while_the_function_runs_and_no_longer():
    mesh = mesh_of(fsdp=8)
    inside = meshes.under(mesh, jax.sharding.get_abstract_mesh)()
    assert dict(inside.shape) == {**dict.fromkeys(meshes.AXES, 1), "fsdp": 8}
    assert jax.sharding.get_abstract_mesh().empty


@dataclasses.dataclass(frozen=True)
class SlicedDevice:
    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"
    client = None


@pytest.mark.parametrize(
    ("sizes", "within"),
    [
        ({"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}, (1, 2, 2, 1)),
        ({"data": 1, "fsdp": 4, "expert": 2, "tensor": 1}, (1, 2, 2, 1)),
        ({"data": 4, "fsdp": 1, "expert": 2, "tensor": 1}, (2, 1, 2, 1)),
    ],
)
def test_slices_lie_along_data_or_else_along_fsdp(sizes, within):
    """So that only gradients, or whole weights, go over the slow network."""
    mesh = meshes.make(sizes, [SlicedDevice(i, i // 4) for i in range(8)])
    assert dict(mesh.shape) == {**sizes, "edp": 1}
    assert meshes.first_slice(mesh).shape == (*within, 1)
    assert {device.slice_index for device in meshes.first_slice(mesh).flat} == {0}


def test_an_axis_that_the_slices_do_not_divide_is_refused():
    devices = [SlicedDevice(i, i // 2) for i in range(6)]
    with pytest.raises(ValueError, match="fsdp=2 is not divisible by the 3 slices"):
        meshes.make({"data": 1, "fsdp": 2, "expert": 3, "tensor": 1}, devices)
