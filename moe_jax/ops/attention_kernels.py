"""Attention by third-party kernels: splash attention on TPU, cuDNN on GPU."""

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

    It was compiled ahead of time for v5e, v5p and v6e, but never timed on a TPU. Head sizes from 8
    to 256 need no padding, and 1024 is the largest block size that fits all three.
    """
    T, N, H = q_BTNH.shape[1:]
    kernel = make_splash(T, N, window, interpret=interpret)

    def of_row(q_NTH, k_KSH, v_KSH, segment_ids_T):
        segments = splash_attention.SegmentIds(segment_ids_T, segment_ids_T)
        return kernel(q_NTH, k_KSH, v_KSH, segment_ids=segments)

    q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))
    return jax.vmap(of_row)(q_BNTH, k_BKSH, v_BKSH, segment_ids_BT).swapaxes(1, 2)


def make_splash(T: int, N: int, window: int | None, *, interpret: bool = False):
    """The kernel for one row; it skips blocks in which no query attends to a key."""
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
    """True if the backward pass is one kernel with 5 products instead of two kernels with 7.

    The single kernel writes a dq for each key block. At any T this traffic costs less than the two
    products, but it takes as many times q's memory as there are key blocks.
    """
    return T // _splash_block(T) <= SPLASH_FUSED


def splash_kernels(T: int, window: int | None = None) -> dict[str, int]:
    """Part of a kernel's name -> position pairs times products, for one head and row."""
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


# The most documents per row for cuDNN's packed layout. Each one that it is compiled for costs a
# little, even if a row has fewer.
CUDNN_DOCUMENTS = 16


def cudnn(
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window: int | None = None, *, library: str = "cudnn"
):
    """cuDNN's flash attention, which skips blocks after the diagonal or before the window.

    It gets the documents by their offsets ("packed"), or else as a mask [B, 1, T, T] that is added
    to the logits, which takes twice the time (H100). The packed layout needs Hopper, no window, and
    rows of at most CUDNN_DOCUMENTS contiguous documents, which is checked at run time. A window
    together with a mask needs cuDNN 9.10.2: cudnn-frontend refuses it with older versions.
    """
    masked = functools.partial(_cudnn_masked, window=window, library=library)
    B, T, N, H = q_BTNH.shape
    if not _packs(window) or B * T * N * H >= 2**31:  # the packed layout's offsets are int32
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
    """(first positions [B, limit], lengths [B, limit], True if no row has more documents).

    Unused entries hold -1. A row whose ids do not increase, apart from zeros at its end, counts as
    having too many documents, because one of them might be in two pieces.
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
    """Uses the packed layout if the documents, described by `where`, allow it, otherwise the mask.

    The backward pass recomputes the forward pass, which costs less than keeping the residuals that
    `lax.cond` would allocate for the branch not taken.
    """
    return _either_forward(masked, qkv, segment_ids_BT, where)[0]


def _either_forward(masked, qkv, segment_ids_BT, where):
    start_BS, length_BS, fits = where

    # The vjp's forward: the plain one was wrong in cuDNN 9 with 30 documents (H100).
    def packed(*qkv):
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
    """Assumes tiles of 128, as in the paper's implementation: cuDNN does not document its own."""
    pairs = len(block_pairs(T, 128, window)) * 128**2
    if _packs(window):  # the backward pass recomputes the forward pass's products
        return Executed(2 * pairs, 7 * pairs)
    return Executed(2 * pairs, 5 * pairs, from_saved=2 * pairs)  # its residuals have no name


def cudnn_refuses(T: int, H: int, dtype) -> str:
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    if H % 8 or H > 128:
        return f"needs a head_dim that is a multiple of 8 and at most 128, not {H}"
    if T % 2:
        return f"needs rows of an even number of positions, not {T}"
    return ""
