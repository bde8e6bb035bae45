"""Attention block by block: memory linear in T, in plain XLA.

A row is split into J blocks of C positions. Pairs of a query block and a key block are visited one
after the other, except those in which no query attends to any key. A block of queries has R = G·C
rows, from all query heads that share a kv head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops import attention_reference as pairwise
from moe_jax.ops.attention_reference import NEGATIVE, SAVED_NAME, Executed, block_pairs, wide_type


def block_size(T: int) -> int:
    """C, the block size. Blocks are equal, so there are fewer padded positions than blocks.

    Times on XLA:CPU for value and gradients, in ms, with blocks of 64 / 128 / 256: T=256: 40 / 41 /
    83, T=512: 71 / 64, T=1024: 173 / 152 / 185, T=4096 (with other sizes): - / 815 / 722.
    """
    largest = 64 if T < 512 else 128 if T < 4096 else 256
    return -(-T // -(-T // largest))


def visited_pairs(T: int, window: int | None = None) -> int:
    """The number of (query, key) position pairs that each product covers, per head and row."""
    return len(block_pairs(T, block_size(T), window)) * block_size(T) ** 2


def chunked_executed(T: int, window: int | None) -> Executed:
    if block_size(T) == T:
        return pairwise.reference_executed(T, window)
    pairs = visited_pairs(T, window)
    return Executed(2 * pairs, 5 * pairs)


def chunked(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window: int | None = None):
    """Flash attention in plain XLA, with memory linear in T (Dao et al., arXiv 2205.14135).

    A visited pair of blocks takes two products, and five in the backward pass, which keeps y and
    the logsumexp of the logits and recomputes the logits. Rows that fit in one block use the
    reference, which needs one product less; there is little memory to save.
    """
    T = q_BTNH.shape[1]
    attend = pairwise.reference if block_size(T) == T else _chunked
    return attend(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window):
    return _chunked_forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window)[0]


def _chunked_forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window):
    B, T, N, H = q_BTNH.shape
    K, wide = k_BSKH.shape[2], wide_type(q_BTNH.dtype)
    q_JBKRH, k_JBKCH, v_JBKCH = (_blocks(x, K) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))
    segment_JBC = _segment_blocks(segment_ids_BT)
    J, R = len(segment_JBC), q_JBKRH.shape[3]

    def visit(carry, pair):
        y_JBKRH, max_JBKR, sum_JBKR = carry
        i, j = pair
        logits_BKRC = _logits(q_JBKRH[i], k_JBKCH[j], segment_JBC, i, j, window)
        max_BKR = jnp.maximum(max_JBKR[i], jnp.max(logits_BKRC, axis=-1))
        p_BKRC = jnp.exp(logits_BKRC - max_BKR[..., None])
        shrink_BKR = jnp.exp(max_JBKR[i] - max_BKR)
        y_BKRH = _product("bkrc,bkch->bkrh", p_BKRC.astype(q_BTNH.dtype), v_JBKCH[j])
        return (
            _set(y_JBKRH, i, y_JBKRH[i] * shrink_BKR[..., None] + y_BKRH),
            _set(max_JBKR, i, max_BKR),
            _set(sum_JBKR, i, sum_JBKR[i] * shrink_BKR + jnp.sum(p_BKRC, axis=-1)),
        ), None

    start = (
        jnp.zeros((J, B, K, R, H), wide),
        jnp.full((J, B, K, R), NEGATIVE, wide),
        jnp.zeros((J, B, K, R), wide),
    )
    (y_JBKRH, max_JBKR, sum_JBKR), _ = jax.lax.scan(visit, start, _pairs(T, window))
    y_BTNH = _unblock((y_JBKRH / sum_JBKR[..., None]).astype(q_BTNH.dtype), T, N)
    log_z_JBKR = max_JBKR + jnp.log(sum_JBKR)
    y_BTNH, log_z_JBKR = (checkpoint_name(x, SAVED_NAME) for x in (y_BTNH, log_z_JBKR))
    return y_BTNH, (q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, y_BTNH, log_z_JBKR)


def _chunked_backward(window, residuals, grad_BTNH):
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, y_BTNH, log_z_JBKR = residuals
    B, T, N, H = q_BTNH.shape
    K, wide = k_BSKH.shape[2], wide_type(q_BTNH.dtype)
    q_JBKRH, k_JBKCH, v_JBKCH = (_blocks(x, K) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))
    grad_JBKRH = _blocks(grad_BTNH, K)
    # The softmax's gradient subtracts sum_s p_ts dp_ts, which is grad_t · y_t.
    inner_BTN = jnp.sum(grad_BTNH.astype(wide) * y_BTNH.astype(wide), axis=-1)
    inner_JBKR = _blocks(inner_BTN[..., None], K)[..., 0]
    segment_JBC = _segment_blocks(segment_ids_BT)
    J, C = len(segment_JBC), segment_JBC.shape[2]

    def visit(carry, pair):
        dq_JBKRH, dk_JBKHC, dv_JBKHC = carry
        i, j = pair
        q_BKRH, k_BKCH, grad_BKRH = q_JBKRH[i], k_JBKCH[j], grad_JBKRH[i]
        logits_BKRC = _logits(q_BKRH, k_BKCH, segment_JBC, i, j, window)
        p_BKRC = jnp.exp(logits_BKRC - log_z_JBKR[i][..., None])
        dp_BKRC = _product("bkrh,bkch->bkrc", grad_BKRH, v_JBKCH[j])
        dlogits_BKRC = (p_BKRC * (dp_BKRC - inner_JBKR[i][..., None])).astype(q_BTNH.dtype)
        p_BKRC = p_BKRC.astype(q_BTNH.dtype)
        # [H, C] and not [C, H]: this halves XLA:CPU's time for products of 128 x 128 blocks.
        dv_BKHC = _product("bkrh,bkrc->bkhc", grad_BKRH, p_BKRC)
        dk_BKHC = _product("bkrh,bkrc->bkhc", q_BKRH, dlogits_BKRC)
        dq_BKRH = _product("bkrc,bkch->bkrh", dlogits_BKRC, k_BKCH)
        return (
            _set(dq_JBKRH, i, dq_JBKRH[i] + dq_BKRH),
            _set(dk_JBKHC, j, dk_JBKHC[j] + dk_BKHC),
            _set(dv_JBKHC, j, dv_JBKHC[j] + dv_BKHC),
        ), None

    start = (
        jnp.zeros(q_JBKRH.shape, wide),
        jnp.zeros((J, B, K, H, C), wide),
        jnp.zeros((J, B, K, H, C), wide),
    )
    (dq_JBKRH, *d_JBKHC), _ = jax.lax.scan(visit, start, _pairs(T, window))
    dq_BTNH = _unblock(dq_JBKRH * H**-0.5, T, N).astype(q_BTNH.dtype)
    dk_BSKH, dv_BSKH = (_unblock(d.swapaxes(3, 4), T, K).astype(k_BSKH.dtype) for d in d_JBKHC)
    return dq_BTNH, dk_BSKH, dv_BSKH, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _pairs(T: int, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The visited pairs; a query's own block comes first, because there it attends to itself."""
    i, j = np.array(block_pairs(T, block_size(T), window), np.int32).T
    return i, j


def _logits(q_BKRH, k_BKCH, segment_JBC, i, j, window):
    B, K, R, _ = q_BKRH.shape
    C = k_BKCH.shape[2]
    position_C = jnp.arange(C)
    # Padded positions come after the row, so no position of the row attends to them.
    seen_BCC = segment_JBC[i][:, :, None] == segment_JBC[j][:, None, :]
    seen_BCC &= pairwise.visible((i * C + position_C)[:, None], j * C + position_C, window)
    logits_BKGCC = _product("bkrh,bkch->bkrc", q_BKRH, k_BKCH).reshape(B, K, R // C, C, C)
    return jnp.where(seen_BCC[:, None, None], logits_BKGCC, NEGATIVE).reshape(B, K, R, C)


def _product(equation: str, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=wide_type(a.dtype))


def _set(stack_J, i, block):
    return jax.lax.dynamic_update_index_in_dim(stack_J, block, i, 0)


def _blocks(x_BTNH, K: int):
    """[B, T, N, H] to [J, B, K, G·C, H], padded with zeros after the row."""
    B, T, N, H = x_BTNH.shape
    C = block_size(T)
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, -T % C), (0, 0), (0, 0)))
    x_JBKGCH = x_BTNH.reshape(B, -1, C, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)
    return x_JBKGCH.reshape(-1, B, K, N // K * C, H)


def _unblock(x_JBKRH, T: int, N: int):
    J, B, K, _, H = x_JBKRH.shape
    x_BJCKGH = x_JBKRH.reshape(J, B, K, N // K, -1, H).transpose(1, 0, 4, 2, 3, 5)
    return x_BJCKGH.reshape(B, -1, N, H)[:, :T]


def _segment_blocks(segment_ids_BT):
    B, T = segment_ids_BT.shape
    C = block_size(T)
    return jnp.pad(segment_ids_BT, ((0, 0), (0, -T % C))).reshape(B, -1, C).swapaxes(0, 1)
