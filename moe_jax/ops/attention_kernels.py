"""Attention by the kernels of others: splash attention on TPU, cuDNN on GPU."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from moe_jax.ops import implementations
from moe_jax.ops.attention_reference import SAVED_NAME, Executed, block_pairs
from moe_jax.parallel import jax_private

# The largest block of "splash", and the most key blocks for which its backward pass is one kernel.
SPLASH_BLOCK = 1024
SPLASH_FUSED = 4


def splash(
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window: int | None = None, *, interpret: bool = False
):
    """The Pallas TPU kernel that comes with jax, forward and backward.

    It was compiled ahead of time for v5e, v5p and v6e, never timed on one: head sizes 8 to 256 need
    no padding, and of the block sizes 1024 is the largest that fits all three.
    """
    T, N, H = q_BTNH.shape[1:]
    kernel = make_splash(T, N, window, interpret=interpret)

    def of_row(q_NTH, k_KSH, v_KSH, segment_ids_T):
        segments = splash_attention.SegmentIds(segment_ids_T, segment_ids_T)
        return kernel(q_NTH, k_KSH, v_KSH, segment_ids=segments)

    q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))
    return jax.vmap(of_row)(q_BNTH, k_BKSH, v_BKSH, segment_ids_BT).swapaxes(1, 2)


def make_splash(T: int, N: int, window: int | None, *, interpret: bool = False):
    """The kernel of one row; it skips blocks in which no query sees a key."""
    mask: splash_attention.CausalMask | splash_attention.LocalMask
    mask = splash_attention.CausalMask((T, T))
    if window is not None:
        mask = splash_attention.LocalMask((T, T), (window - 1, 0), offset=0)
    block, fused = _splash_block(T), _splash_fused(T)
    compute = 512 if block % 512 == 0 else block
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=compute,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=compute,
            block_q_dq=None if fused else block,
            block_kv_dq=None if fused else block,
            use_fused_bwd_kernel=fused,
        ),
        residual_checkpoint_name=SAVED_NAME,
        interpret=interpret,
    )


def _splash_block(T: int) -> int:
    return max(size for size in range(128, SPLASH_BLOCK + 1, 128) if T % size == 0)


def _splash_fused(T: int) -> bool:
    """True if the backward pass is one kernel, of 5 products, instead of two, of 7.

    The one writes dq for each key block. That traffic is less than the two products at any T, yet
    it takes that many times q's memory.
    """
    return T // _splash_block(T) <= SPLASH_FUSED


def splash_kernels(T: int, window: int | None = None) -> dict[str, int]:
    """Positions times products of one head and row, by a part of the kernel's name."""
    pairs = len(block_pairs(T, _splash_block(T), window)) * _splash_block(T) ** 2
    backward = {"_dkv_": 5} if _splash_fused(T) else {"_dkv_": 4, "_dq_": 3}
    return {name: number * pairs for name, number in {"_fwd_": 2, **backward}.items()}


def splash_executed(T: int, window: int | None) -> Executed:
    kernels = splash_kernels(T, window)
    forward = kernels.pop("_fwd_")
    return Executed(forward, sum(kernels.values()))


def splash_refuses(T: int, H: int, dtype) -> str:
    if T % 128:
        return f"needs rows of a multiple of 128 positions, not {T}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"needs bfloat16 or float32, not {dtype}"
    return ""


# The most documents of a row for cuDNN's packed layout. Each document that it is compiled for costs
# a little even where a row has fewer.
CUDNN_DOCUMENTS = 16


def cudnn(
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window: int | None = None, *, library: str = "cudnn"
):
    """cuDNN's flash attention, which skips what lies after the diagonal or before the window.

    It gets documents by where they begin ("packed"), or else a mask [B, 1, T, T] that it adds to
    the logits, in twice the time (H100). Packed needs Hopper, no window, and rows of at most
    CUDNN_DOCUMENTS documents, each in one piece, which is checked at run time. A window beside a
    mask needs cuDNN 9.10.2: cudnn-frontend refuses it with older ones.
    """
    masked = functools.partial(_cudnn_masked, window=window, library=library)
    B, T, N, H = q_BTNH.shape
    if not _packs(window) or B * T * N * H >= 2**31:  # its offsets are int32
        return masked(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    where = documents(segment_ids_BT, CUDNN_DOCUMENTS)
    return _either(masked, (q_BTNH, k_BSKH, v_BSKH), segment_ids_BT, where)


def _packs(window: int | None) -> bool:
    return window is None and (implementations.compute_capability() or (0, 0)) >= (9, 0)


def _cudnn_masked(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window, library):
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return jax.nn.dot_product_attention(
        *(q_BTNH, k_BSKH, v_BSKH),
        mask=same_BTS[:, None],
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=library,
    )


def _cudnn_packed(q_BTNH, k_BSKH, v_BSKH, start_BS, length_BS):
    start_BS = jnp.pad(start_BS, ((0, 0), (0, 1)), constant_values=-1)  # where the rows end
    return jax_private.load("cudnn_attention")(
        *(q_BTNH, k_BSKH, v_BSKH),
        q_seqlen=length_BS,
        kv_seqlen=length_BS,
        q_offsets=start_BS,
        kv_offsets=start_BS,
        scale=q_BTNH.shape[-1] ** -0.5,
        mask_type=jax_private.load("cudnn_mask").PADDING_CAUSAL,
    )


def documents(segment_ids_BT, limit: int):
    """(first positions [B, limit], lengths [B, limit], whether no row has more documents).

    Unused entries hold -1. A row whose ids do not rise, zeros at its end aside, counts as one of
    too many documents: one of them might be in two pieces.
    """
    T = segment_ids_BT.shape[1]
    id_BT = jnp.where(segment_ids_BT == 0, jnp.iinfo(jnp.int32).max, segment_ids_BT)
    begins_BT = jnp.diff(id_BT, axis=1, prepend=-1) != 0
    start_BS = jax.vmap(lambda begins_T: jnp.nonzero(begins_T, size=limit, fill_value=T)[0])(
        begins_BT
    )
    arrays = start_BS, jnp.diff(start_BS, axis=1, append=T)
    fits = jnp.all(id_BT[:, 1:] >= id_BT[:, :-1]) & jnp.all(jnp.sum(begins_BT, axis=1) <= limit)
    return *(jnp.where(start_BS < T, x, -1).astype(jnp.int32) for x in arrays), fits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _either(masked, qkv, segment_ids_BT, where):
    """Packed if the documents, which `where` describes, allow it, else masked.

    The backward pass runs the forward one again, which costs less than what `lax.cond` would keep
    for the branch that was not taken.
    """
    return _either_forward(masked, qkv, segment_ids_BT, where)[0]


def _either_forward(masked, qkv, segment_ids_BT, where):
    start_BS, length_BS, fits = where

    def packed(*qkv):  # as if for gradients: without, cuDNN 9 was wrong with 30 documents (H100)
        return jax.vjp(lambda *qkv: _cudnn_packed(*qkv, start_BS, length_BS), *qkv)[0]

    y_BTNH = jax.lax.cond(fits, packed, lambda *qkv: masked(*qkv, segment_ids_BT), *qkv)
    return y_BTNH, (qkv, segment_ids_BT, where)


def _either_backward(masked, residuals, grad_BTNH):
    qkv, segment_ids_BT, (start_BS, length_BS, fits) = residuals

    def gradients(attend, *documents):
        return lambda *qkv: jax.vjp(lambda *qkv: attend(*qkv, *documents), *qkv)[1](grad_BTNH)

    packed = gradients(_cudnn_packed, start_BS, length_BS)
    return jax.lax.cond(fits, packed, gradients(masked, segment_ids_BT), *qkv), None, None


_either.defvjp(_either_forward, _either_backward)


def cudnn_executed(T: int, window: int | None) -> Executed:
    """The tiles are not documented; 128 is assumed, as in the paper's implementation."""
    pairs = len(block_pairs(T, 128, window)) * 128**2
    if _packs(window):  # its backward pass makes the products of the forward one again
        return Executed(2 * pairs, 7 * pairs)
    return Executed(2 * pairs, 5 * pairs, from_saved=2 * pairs)  # what it keeps has no name


def cudnn_refuses(T: int, H: int, dtype) -> str:
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    if H % 8 or H > 128:
        return f"needs a head_dim that is a multiple of 8 and at most 128, not {H}"
    if T % 2:
        return f"needs rows of an even number of positions, not {T}"
    return ""
