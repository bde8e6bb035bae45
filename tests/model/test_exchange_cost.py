"""The mode that "auto" takes: bytes worked by hand, and what a compiled layer really sends."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax import model
from moe_jax.dryrun import hlo
from moe_jax.model import exchange_cost, moe
from moe_jax.parallel import mesh as meshes

CONFIG = model.ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
)


def sent(platform="gpu", num_tokens=64, sizes=(), **fields):
    mesh = {"expert": 4, "tensor": 1, "edp": 1, **dict(sizes)}
    config = model.ModelConfig(**{**vars(CONFIG), **fields})
    return exchange_cost.bytes_sent(config, mesh, num_tokens, platform)


def test_bytes_by_hand():
    # 8 experts of three 16 x 24 matrices, of which three quarters come from others; 64 tokens of 16
    # numbers from three others, and as many sums back; 128 rows to others and back.
    assert sent() == {
        "fsdp": 8 * 3 * 16 * 24 * 4 * 3 / 4,
        "ring": 2 * 3 * 64 * 16 * 4,
        "all_to_all": 2 * 2 * 64 * 16 * 4 * 3 / 4,
    }
    # Half of it in bfloat16.
    assert sent(dtype="bfloat16") == {mode: size / 2 for mode, size in sent().items()}
    # Along tensor a device has half of the neurons, along edp half of the experts.
    assert sent(sizes={"tensor": 2})["fsdp"] == sent(sizes={"edp": 2})["fsdp"] == sent()["fsdp"] / 2
    assert sent(sizes={"edp": 2})["all_to_all"] == sent()["all_to_all"] / 2
    # A row passes 4 links of a ring of 16 on average.
    far = {"sizes": {"expert": 16}, "num_experts": 16}
    assert sent("tpu", **far)["all_to_all"] == 2 * 2 * 64 * 16 * 4 * 4


def test_rows_of_a_buffer_that_hold_something():
    """4 devices may all send everything here, and a quarter of it comes. Both devices along edp
    have the same rows, and each takes half of them."""
    mesh = {"expert": 4, "edp": 2}
    assert exchange_cost.filled("fsdp", "dropless", mesh) == 1 / 2
    assert exchange_cost.filled("ring", "dropless", mesh) == 1 / 8
    assert exchange_cost.filled("all_to_all", "capacity", mesh) == 1


def test_few_tokens_move_and_many_stay():
    def best(**how):
        bytes_of = sent(**how)
        return min(bytes_of, key=bytes_of.get)

    assert best(num_tokens=64) == "all_to_all"
    assert best(num_tokens=64, platform="cpu") == "ring"  # which emulates the exchange
    assert best(num_tokens=64_000) == "fsdp"
    assert best(platform="tpu", num_tokens=8, num_experts_per_tok=8, sizes={"expert": 8}) == "ring"


@pytest.mark.parametrize("fields", [{"dispatch": "capacity"}, {"dispatch": "merge"}], ids=str)
def test_only_modes_that_the_dispatch_has_are_weighed(fields):
    assert "ring" not in sent(**fields)
    assert set(sent(**fields)) >= {"fsdp"}


def test_a_compiled_layer_gathers_what_is_counted_and_auto_is_one_of_the_modes(capsys):
    """An all-gather over X devices receives (X-1)/X of its result from the others."""
    params = jax.tree.map(
        lambda w: w[0], model.init(CONFIG, jax.random.key(0))["blocks"]["0"]["moe"]
    )
    x_BTD, valid_BT = jnp.ones((8, 8, 16)), jnp.ones((8, 8), bool)
    mesh = meshes.make({"expert": 4, "tensor": 2})
    gathered = {}
    with jax.set_mesh(mesh):
        for mode in ("fsdp", "ring", "auto"):
            config = model.ModelConfig(**{**vars(CONFIG), "expert_parallel": mode})

            def forward(x_BTD, params, valid_BT, config=config):
                return moe.moe(x_BTD, params, valid_BT, config)[0]

            text = jax.jit(forward).lower(x_BTD, params, valid_BT).compile().as_text()
            rows = hlo.collectives(text, mesh.shape)
            gathered[mode] = sum(
                c.bytes for c in rows if c.axes == ("expert",) and c.operation == "all-gather"
            )
    by_hand = exchange_cost.bytes_sent(CONFIG, mesh.shape, 16, "cpu")
    assert gathered["fsdp"] * 3 / 4 == by_hand["fsdp"]
    choices = 4 * 16 * 2 * 2 * 4  # the chosen experts and their weights come too
    assert (gathered["ring"] - choices) * 3 / 4 == by_hand["ring"] / 2
    assert gathered["auto"] == gathered["ring"]
    assert "expert_parallel: ring over expert=4 on cpu" in capsys.readouterr().err
