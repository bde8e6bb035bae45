"""The whole train step compiled ahead of time for TPUs: the due products, by the right kernels."""

import jax
import pytest

from moe_jax import config as configs
from moe_jax.dryrun import hlo, hlo_traffic, lowering
from moe_jax.ops import attention_kernels, grouped_tpu
from moe_jax.parallel import mesh as meshes
from moe_jax.training import flops

T, D, N, DEVICES = 1024, 512, 4, 4


def step_config(E, A, F, rows_per_expert, devices=DEVICES, remat="full", layers=2):
    """bfloat16, on each device as many rows as give its experts `rows_per_expert`."""
    config = configs.default()
    config.model.update(
        vocab_size=2048,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=layers,
        num_attention_heads=N,
        num_experts=E,
        num_experts_per_tok=A,
        dtype="bfloat16",
        remat=remat,
    )
    config.data.sequence_length = T
    config.training.batch_size = devices * rows_per_expert * E // A // T
    return configs.resolve(config)


@pytest.mark.long
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(("E", "A", "F"), [(8, 2, 1024), (64, 8, 256)])
def test_a_step_executes_the_due_products_with_megablox_and_splash(libtpu, topology, E, A, F):
    rows_per_expert = 512
    settings = step_config(E, A, F, rows_per_expert)
    mesh = meshes.make({"data": 1, "fsdp": -1, "expert": 1, "tensor": 1}, libtpu(topology))
    text = lowering.lower(settings, mesh).compile().as_text()
    B = settings.training.batch_size // DEVICES
    heads = 2 * (D // N) * N * B  # multiply-adds of one pair of positions, of all heads and rows
    executed = hlo.product_flops(
        text,
        kernels={name: heads * n for name, n in attention_kernels.splash_kernels(T).items()},
    )
    with jax.set_mesh(mesh):
        due = flops.analytic_flops(settings.model, T) * B * T
    M = rows_per_expert * E
    tm, *_ = grouped_tpu.tiling(M, D, F, E, itemsize=2)
    tiles = grouped_tpu.visited_rows(M, E, tm) / M
    print(f"{topology} {E}e: executed / due = {executed / due:.3f}, tile visits x {tiles:.3f}")
    assert 0.98 <= executed / due <= 1.10
    names = " ".join(hlo.kernel_calls(text))
    for kernel in ("gmm", "tgmm", "splash"):
        assert kernel in names, names
    dense = {s for s in hlo.buffer_shapes(text) if len(s) >= 3 and s[0] == E and s[1] in (M, B * T)}
    assert not dense


@pytest.mark.long
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_a_step_moves_less_than_three_times_the_bytes_that_are_due(libtpu, topology):
    settings = step_config(8, 2, 1024, 512, devices=1, remat="none", layers=6)
    mesh = meshes.make({}, libtpu(topology)[:1])
    text = lowering.lower(settings, mesh).compile().as_text()
    state = lowering.abstract_state(settings, mesh)
    due = lowering.bytes_due(settings, state, settings.training.batch_size * T)
    moved = hlo_traffic.traffic(text)
    print(f"{topology}: {moved / 1e9:.2f} GB moved, {due / 1e9:.2f} GB due")
    assert due <= moved < 3 * due
