"""Attention's implementations against each other, numbers by finite differences, and counts."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moe_jax.dryrun import hlo
from moe_jax.ops import (
    attention,
    attention_chunked,
    attention_kernels,
    attention_reference,
    implementations,
)
from moe_jax.parallel import jax_private, sharding
from moe_jax.parallel import mesh as meshes

B, T, N, K, H = 2, 130, 4, 2, 8  # 130 positions are three blocks of 44, two of them padding


def arrays(T=T, N=N, K=K, B=B, dtype="float32"):
    """q, k, v, segments (several to a row, and padding at the end), the gradient of y."""
    random = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    *qkv, grad_BTNH = (jnp.asarray(random.normal(size=s), dtype) for s in shapes)
    start_B1 = T * np.arange(1, B + 1)[:, None] // (B + 1)  # where the second document begins
    segments_BT = 1 + (np.arange(T) >= start_B1) + (np.arange(T) >= 3 * T // 4)
    segments_BT = np.where(np.arange(T) < T - T // 10, segments_BT, 0).astype(np.int32)
    return *qkv, jnp.asarray(segments_BT), grad_BTNH


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, q, k, v, segments_BT, grad_BTNH):
    y, transpose = jax.vjp(lambda q, k, v: attend(q, k, v, segments_BT), q, k, v)
    return y, *transpose(grad_BTNH)


def assert_equals_reference(attend, *inputs, window=None):
    found = value_and_gradients(functools.partial(attend, window=window), *inputs)
    reference = functools.partial(attention.reference, window=window)
    expected = value_and_gradients(reference, *inputs)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 5])
def test_the_reference_equals_a_loop_over_what_a_query_sees(window):
    q, k, v, segments_BT, _ = map(np.asarray, arrays(T=12))
    found = jax.jit(attention.reference, static_argnums=4)(q, k, v, segments_BT, window)
    for b, t, n in np.ndindex(B, 12, N):
        first = 0 if window is None else max(0, t - window + 1)
        seen = [s for s in range(first, t + 1) if segments_BT[b, s] == segments_BT[b, t]]
        weight = np.exp([q[b, t, n] @ k[b, s, n // 2] / math.sqrt(H) for s in seen])
        expected = weight @ v[b, seen, n // 2] / weight.sum()
        np.testing.assert_allclose(found[b, t, n], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"K": 1}, {"T": 65, "K": N}, {"T": 17}, {"T": 1}],
    ids="grouped one-kv-head as-many-kv-heads one-block one-token".split(),
)
def test_chunked_equals_the_reference(sizes):
    assert_equals_reference(attention.chunked, *arrays(**sizes))


@pytest.mark.parametrize(
    ("sizes", "window"),
    [({}, 1), ({}, 45), ({}, 60), ({}, T), ({"T": 17}, 5)],
    ids="own-block one-block-back longer-than-a-block whole-row one-block".split(),
)
def test_chunked_equals_the_reference_with_a_window(sizes, window):
    assert_equals_reference(attention.chunked, *arrays(**sizes), window=window)


def test_a_row_of_padding_gives_finite_numbers():
    q, k, v, segments_BT, grad_BTNH = arrays()
    found = value_and_gradients(attention.chunked, q, k, v, 0 * segments_BT, grad_BTNH)
    assert all(jnp.isfinite(x).all() for x in found)


def test_gradients_of_chunked_are_those_of_finite_differences():
    with jax.enable_x64(True):
        q, k, v, segments_BT, _ = arrays(T=70, B=1, dtype="float64")
        attend = jax.jit(lambda *qkv: attention.chunked(*qkv, segments_BT))
        check_grads(attend, (q, k, v), order=1, modes=["rev"], rtol=1e-7)


# The wrapper around cuDNN's attention, with XLA's in its place.
with_cudnn = functools.partial(attention_kernels.cudnn, library="xla")


@pytest.mark.parametrize("window", [None, 45])
def test_the_masks_and_the_heads_given_to_cudnn_are_right(window):
    assert_equals_reference(with_cudnn, *arrays(), window=window)


def test_documents_are_where_the_numbers_change():
    """Padding is one; a row whose numbers fall may hold one in two pieces, so it does not fit."""
    segments_BT = jnp.array([[1, 1, 2, 2, 2, 0, 0], [5] * 7, [1, 2, 3, 4, 0, 0, 0]])
    start_BS, length_BS, fits = attention_kernels.documents(segments_BT, 5)
    assert start_BS.tolist() == [[0, 2, 5, -1, -1], [0, -1, -1, -1, -1], [0, 1, 2, 3, 4]]
    assert length_BS.tolist() == [[2, 3, 2, -1, -1], [7, -1, -1, -1, -1], [1, 1, 1, 1, 3]]
    assert fits
    assert not attention_kernels.documents(segments_BT, 4)[2]
    assert not attention_kernels.documents(jnp.array([[1, 0, 1, 1]]), 4)[2]


@jax.custom_vjp
def packed_attention(q_BTNH, k_BSKH, v_BSKH, start_BS, length_BS):
    """The meaning of cuDNN's packed layout; like cuDNN's, it cannot be differentiated twice."""
    t_T = jnp.arange(q_BTNH.shape[1])
    inside_BST = (t_T >= start_BS[..., None]) & (t_T < (start_BS + length_BS)[..., None])
    number_S1 = 1 + jnp.arange(start_BS.shape[1])[:, None]
    segments_BT = jnp.sum(inside_BST * (start_BS >= 0)[..., None] * number_S1, axis=1)
    return attention.reference(q_BTNH, k_BSKH, v_BSKH, segments_BT)


def packed_backward(arrays, grad_BTNH):
    return (
        *jax.vjp(lambda *qkv: packed_attention.fun(*qkv, *arrays[3:]), *arrays[:3])[1](grad_BTNH),
        None,
        None,
    )


packed_attention.defvjp(
    lambda *arrays: (
        jax.lax.while_loop(lambda y: False, lambda y: y, packed_attention(*arrays)),
        arrays,
    ),
    packed_backward,
)


@pytest.mark.parametrize("limit", [8, 1], ids=["packed", "masked"])
def test_cudnn_is_told_of_documents_or_given_a_mask(monkeypatch, limit):
    """On Hopper, cuDNN's own packed attention replaced by what it means."""
    calls = []

    def packed(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert mask_type.name == "PADDING_CAUSAL"
        assert scale == q.shape[-1] ** -0.5
        assert (q_seqlen is kv_seqlen) and (q_offsets is kv_offsets)
        assert q_offsets.shape[1] == q_seqlen.shape[1] + 1 == limit + 1
        calls.append(1)
        return packed_attention(q, k, v, q_offsets[:, :-1], q_seqlen)

    monkeypatch.setattr(implementations, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(attention_kernels, "CUDNN_DOCUMENTS", limit)
    private = jax_private.TABLE["cudnn_attention"]
    monkeypatch.setattr(f"{private.module}.{private.attribute}", packed)
    q, k, v, segments_BT, grad = arrays()
    assert attention_kernels.documents(segments_BT, limit)[2] == (limit == 8)
    assert_equals_reference(functools.partial(attention_kernels.cudnn, library="xla"), *arrays())
    assert calls


@pytest.mark.parametrize("window", [None, 45])
@pytest.mark.parametrize("attend", [attention.chunked, attention.reference, with_cudnn])
def test_a_token_sees_neither_another_document_nor_the_future(attend, window):
    """Nor what lies before the window. Exactly: another key and value changes no bit of the outputs
    that must not know of it."""
    q, k, v, segments_BT, _ = arrays()
    attend = jax.jit(functools.partial(attend, window=window))
    before = np.asarray(attend(q, k, v, segments_BT))
    for s in (0, 43, 44, 64, 97, T - 1):
        after = attend(q, k.at[:, s].add(3), v.at[:, s].add(3), segments_BT)
        changed_BT = (np.asarray(after) != before).any(axis=(2, 3))
        sees_BT = (segments_BT == segments_BT[:, s : s + 1]) & (jnp.arange(T) >= s)
        sees_BT &= jnp.arange(T) < s + (window or T)
        np.testing.assert_array_equal(changed_BT, sees_BT)


def test_bfloat16_is_no_further_from_float32_than_the_reference():
    """Chunked rounds what it multiplies, but sums in float32 what the reference rounds: logits,
    and the gradients of a row."""
    inputs = arrays(dtype="bfloat16")
    wide = [x.astype("float32") if x.dtype == jnp.bfloat16 else x for x in inputs]
    exact = value_and_gradients(attention.reference, *wide)

    def errors(attend):
        found = value_and_gradients(attend, *inputs)
        assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
        return [float(jnp.linalg.norm(a - b)) for a, b in zip(found, exact, strict=True)]

    for ours, reference in zip(errors(attention.chunked), errors(attention.reference), strict=True):
        assert 0 < ours <= reference


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    ("name", "positions", "window"),
    [("chunked", 64, None), ("chunked", 130, None), ("chunked", 130, 45), ("reference", 130, None)],
)
def test_two_layers_execute_the_products_that_are_counted(name, positions, window, remat):
    """Scanned, as the model has them, with something after them that needs their outputs."""
    q, k, v, segments_BT, _ = arrays(T=positions)
    attend = attention.IMPLEMENTATIONS[name].function

    def loss(q, k, v):
        def layer(x, _):
            return jnp.sin(attend(x, k, v, segments_BT, window)), None

        step = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        return jnp.sum(jax.lax.scan(step, q, length=2)[0])

    def executed(function):
        return hlo.product_flops(jax.jit(function).lower(q, k, v).compile().as_text())

    count = attention.executed_pairs(positions, name, H=H, dtype="float32", window=window)
    one = 2 * H * B * N
    gradient = (2 if remat else 1) * count.forward + count.backward
    assert executed(jax.grad(loss, argnums=(0, 1, 2))) == 2 * gradient * one
    if not remat:
        assert executed(loss) == 2 * count.forward * one


def test_visited_pairs_by_hand():
    assert attention_chunked.visited_pairs(1) == 1
    assert attention_chunked.visited_pairs(64) == 64**2
    assert attention_chunked.visited_pairs(130) == 6 * 44**2  # three blocks: six pairs of them
    assert attention_chunked.visited_pairs(256) == 10 * 64**2
    assert attention_chunked.visited_pairs(1024) == 36 * 128**2
    assert attention_chunked.visited_pairs(130, 45) == 5 * 44**2  # the first is out of the third's
    assert attention_chunked.visited_pairs(130, 46) == 6 * 44**2  # position 88 sees position 43
    for positions in range(1, 5000, 37):
        blocks = math.ceil(positions / attention_chunked.block_size(positions))
        assert 0 <= blocks * attention_chunked.block_size(positions) - positions < blocks


@pytest.mark.parametrize("window", [None, 1, 2, 128, 129, 130, 257, 258, 600, 10_000])
def test_blocks_that_are_visited_are_those_with_something_to_see(monkeypatch, window):
    """Both the mask of a row of five blocks and the tables that splash's kernels read show it."""
    monkeypatch.setattr(attention_kernels, "SPLASH_BLOCK", 128)
    distance = np.arange(640)[:, None] - np.arange(640)
    seen = (distance >= 0) & (distance < (window or 640))
    expected = np.argwhere(seen.reshape(5, 128, 5, 128).any(axis=(1, 3)))
    pairs = attention_reference.block_pairs(640, 128, window)
    np.testing.assert_array_equal(sorted(pairs), expected)
    kernel = attention_kernels.make_splash(640, N, window)
    for table in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        assert np.count_nonzero(table.block_mask) == len(pairs)


@pytest.mark.parametrize("window", [T, T + 1])
def test_a_window_of_a_whole_row_is_no_window(window):
    *inputs, _ = arrays()

    def traced(window):
        return str(jax.make_jaxpr(functools.partial(attention.attention, window=window))(*inputs))

    assert traced(window) == traced(None) != traced(T - 1)
    for name in ("chunked", "reference"):
        count = functools.partial(attention.executed_pairs, T, name, H=H, dtype="float32")
        assert count(window=window) == count()


def test_a_window_of_nothing_is_refused():
    *inputs, _ = arrays()
    with pytest.raises(ValueError, match="window=0 hides a query's own key too; use at least 1"):
        attention.attention(*inputs, window=0)
    with pytest.raises(ValueError, match="window=-1"):
        attention.executed_pairs(T, H=H, dtype="float32", window=-1)


def test_no_buffer_of_chunked_has_as_many_elements_as_a_row_has_pairs():
    inputs = arrays(T=512, N=1, K=1, B=1)
    text = jax.jit(functools.partial(value_and_gradients, attention.chunked)).lower(*inputs)
    largest = max(map(math.prod, hlo.buffer_shapes(text.compile().as_text())))
    assert attention_chunked.block_size(512) ** 2 <= largest < 512**2 / 8


def test_a_mesh_gives_what_one_device_gives_and_sends_nothing():
    inputs = arrays(B=4)
    mesh = meshes.make({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    heads = jax.NamedSharding(mesh, jax.P(sharding.BATCH_AXES, None, "tensor"))
    rows = jax.NamedSharding(mesh, sharding.BATCH)
    placed = jax.device_put(inputs, (heads, heads, heads, rows, heads))
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(value_and_gradients.__wrapped__, attention.attention))
        compiled = step.lower(*placed).compile()
    expected = value_and_gradients(attention.attention, *inputs)
    for a, b in zip(compiled(*placed), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert not re.search("all-|reduce-scatter|collective-permute", compiled.as_text())


def test_kv_heads_that_the_tensor_axis_does_not_divide_are_refused():
    *inputs, _ = arrays(B=4, K=1)
    with jax.set_mesh(meshes.make({"data": 4, "fsdp": 1, "expert": 1, "tensor": 2})):
        with pytest.raises(ValueError, match=r"num_key_value_heads=1 is not divisible by .* \(2\)"):
            attention.attention(*inputs)


@pytest.mark.parametrize(
    ("platform", "dtype", "positions", "chosen"),
    [
        ("cpu", "float32", 256, "chunked"),
        ("tpu", "bfloat16", 256, "splash"),
        ("tpu", "float32", 8192, "splash"),
        ("tpu", "bfloat16", 100, "chunked"),
        ("gpu", "bfloat16", 256, "cudnn"),
        ("gpu", "float32", 256, "chunked"),
        ("gpu", "bfloat16", 255, "chunked"),
    ],
)
def test_auto_chooses_by_platform_and_shapes(monkeypatch, platform, dtype, positions, chosen):
    monkeypatch.setattr(implementations, "platform", lambda: platform)
    for window in (None, 100):
        count = attention.executed_pairs(positions, H=64, dtype=dtype, window=window)
        limit = window if window is not None and window < positions else None
        assert count == attention.IMPLEMENTATIONS[chosen].executed(positions, limit)


@pytest.mark.parametrize(
    ("platform", "name", "dtype", "positions", "message"),
    [
        ("cpu", "flash", "float32", 128, "implementation='flash' is unknown"),
        ("cpu", "splash", "float32", 128, "implementation='splash' runs on tpu, not on cpu"),
        ("tpu", "splash", "float32", 100, "needs rows of a multiple of 128 positions, not 100"),
        ("tpu", "splash", "float16", 128, "needs bfloat16 or float32, not float16"),
        ("gpu", "cudnn", "float32", 128, "needs bfloat16 or float16, not float32"),
    ],
)
def test_what_cannot_run_is_refused(monkeypatch, platform, name, dtype, positions, message):
    monkeypatch.setattr(implementations, "platform", lambda: platform)
    *inputs, _ = arrays(T=positions, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        attention.attention(*inputs, implementation=name)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    "fused", [True, pytest.param(False, marks=pytest.mark.long)], ids=["fused", "apart"]
)
@pytest.mark.parametrize("kv_heads", [1, pytest.param(2, marks=pytest.mark.long)])
def test_splash_equals_the_reference(monkeypatch, fused, kv_heads, window):
    """The kernels run in interpret mode, on rows of two blocks, or of three with two in sight."""
    monkeypatch.setattr(attention_kernels, "SPLASH_BLOCK", 128)
    monkeypatch.setattr(attention_kernels, "SPLASH_FUSED", 4 if fused else 1)
    attend = functools.partial(attention_kernels.splash, interpret=True)
    positions = 256 if window is None else 384
    assert_equals_reference(attend, *arrays(T=positions, N=2, K=kv_heads, B=1), window=window)


def test_products_of_splash_by_hand():
    """Blocks of 1024 and, of 1152 positions, of 384; two backward kernels beyond four blocks."""
    block = 1024**2
    assert attention_kernels.splash_kernels(1024) == {"_fwd_": 2 * block, "_dkv_": 5 * block}
    assert attention_kernels.splash_kernels(1152) == {"_fwd_": 12 * 384**2, "_dkv_": 30 * 384**2}
    pairs = 36 * block
    of_8192 = {"_fwd_": 2 * pairs, "_dkv_": 4 * pairs, "_dq_": 3 * pairs}
    assert attention_kernels.splash_kernels(8192) == of_8192
    of_window = {"_fwd_": 2 * 30 * block, "_dkv_": 4 * 30 * block, "_dq_": 3 * 30 * block}
    assert (
        attention_kernels.splash_kernels(8192, 4096) == of_window
    )  # of 8 blocks a query sees at most 5
