"""Grouped-query causal self-attention over packed rows, which never looks across a border.

Query head n reads kv head n // (N/K) (Ainslie et al., arXiv 2305.13245). G = N/K is the number of
query heads of a kv head.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention

from moe_jax.ops.implementations import Implementation, choose
from moe_jax.parallel import sharding

NEGATIVE = -1e30  # finite, so that a row with nothing to see gives no NaN

# Under which a remat policy may keep y and the logsumexp: with both, no product is made again.
SAVED_NAME = "attention"

# The largest block of "splash", and the most key blocks for which its backward pass is one kernel.
SPLASH_BLOCK = 1024
SPLASH_FUSED = 4


@dataclasses.dataclass(frozen=True)
class Executed:
    """(query, key) positions times products, of one head and row: times 2 H they are FLOPs."""

    forward: int  # and once more where remat runs the forward pass again
    backward: int
    from_saved: int = 0  # what of it runs again where remat keeps all that has a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Implementation):
    """`function` takes q_BTNH, k_BSKH, v_BSKH, segment_ids_BT of one device and returns y_BTNH."""

    executed: Callable[[int], Executed]  # for rows of T positions
    refuses: Callable[[int, int, jnp.dtype], str] = lambda T, H, dtype: ""  # the reason, or ""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q · k / sqrt(H)) · v over the earlier positions of a query's own segment.

    Args:
      q_BTNH: N is a multiple of K.
      segment_ids_BT: which document a position belongs to. Padding is a segment like any other (0
        by custom): finite values that mean nothing.
      implementation: a key of IMPLEMENTATIONS, or "auto", the first of them that can run.

    The softmax is computed in float32, or in the inputs' type where that is wider. With a mesh set
    each device works on its own rows and heads: a Pallas kernel cannot be cut by the partitioner.

    Raises: ValueError if `implementation` cannot run here or not with these shapes, or if the
      mesh's tensor axis does not divide the kv heads.
    """
    _, T, _, H = q_BTNH.shape
    attend = choose("attention", implementation, _table(T, H, q_BTNH.dtype))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    K, parts = k_BSKH.shape[2], mesh.shape["tensor"]
    if K % parts:
        raise ValueError(
            f"num_key_value_heads={K} is not divisible by the mesh's tensor axis ({parts}); "
            f"set config.mesh.tensor to a divisor of {K}"
        )
    heads = jax.P(sharding.BATCH_AXES, None, "tensor")
    return jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, sharding.BATCH),
        out_specs=heads,
        check_vma=False,  # a Pallas kernel does not say along which axes its results vary
    )(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)


def executed_pairs(T: int, implementation: str = "auto", *, H: int, dtype: str) -> Executed:
    """What `attention` executes for rows of T positions on the platform of the mesh set.

    Raises: ValueError where `attention` would.
    """
    table = _table(T, H, jnp.dtype(dtype))
    counts = {
        name: dataclasses.replace(entry, function=entry.executed) for name, entry in table.items()
    }
    return choose("attention", implementation, counts)(T)


def _table(T: int, H: int, dtype) -> dict[str, Attention]:
    """IMPLEMENTATIONS, of which those that refuse such arrays are unavailable."""

    def for_arrays(entry: Attention) -> Attention:
        refusal = entry.refuses(T, H, dtype)
        return dataclasses.replace(
            entry, unavailable=lambda platform: entry.unavailable(platform) or refusal
        )

    return {name: for_arrays(entry) for name, entry in IMPLEMENTATIONS.items()}


def reference(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT):
    """All pairs of a row at once, [B, K, G, T, T] logits."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    logits_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH)
    logits_BKGTS = logits_BKGTS.astype(_wide(q_BTNH.dtype))
    seen_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    seen_BTS &= jnp.tril(jnp.ones((T, T), bool))
    logits_BKGTS = jnp.where(seen_BTS[:, None, None], logits_BKGTS, NEGATIVE)
    weight_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(q_BTNH.dtype)
    y_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weight_BKGTS, v_BSKH)
    return y_BTKGH.reshape(B, T, N, H)


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


# "chunked": a row is cut into J blocks of C positions, and the pairs of a query block and a key
# block that have anything to see are visited one after the other. A block of queries has the
# R = G·C rows of all query heads that read the same kv head.


def block_size(T: int) -> int:
    """C: equal blocks, so that fewer positions than there are blocks are padding.

    XLA:CPU, value and gradients, ms with blocks of 64 / 128 / 256: T=256 40 / 41 / 83, T=512
    71 / 64, T=1024 173 / 152 / 185, T=4096 (other sizes) - / 815 / 722.
    """
    largest = 64 if T < 512 else 128 if T < 4096 else 256
    return -(-T // -(-T // largest))


def visited_pairs(T: int) -> int:
    """(query, key) positions that each product of "chunked" multiplies, of one head and row."""
    return _causal(T, block_size(T))


def _one_block(T: int) -> bool:
    return block_size(T) == T


def _causal(T: int, block: int) -> int:
    blocks = -(-T // block)
    return blocks * (blocks + 1) // 2 * block**2


def chunked(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT):
    """Memory linear in T: flash attention in plain XLA (Dao et al., arXiv 2205.14135).

    Two products for each visited pair of blocks, five in the backward pass, which saves y and the
    logsumexp of the logits and computes the logits again. Rows of one block are the reference's:
    it needs one product less, and there is little to save.
    """
    attend = reference if _one_block(q_BTNH.shape[1]) else _chunked
    return attend(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)


@jax.custom_vjp
def _chunked(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT):
    return _chunked_forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)[0]


def _chunked_forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT):
    B, T, N, H = q_BTNH.shape
    K, wide = k_BSKH.shape[2], _wide(q_BTNH.dtype)
    q_JBKRH, k_JBKCH, v_JBKCH = (_blocks(x, K) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))
    segment_JBC = _segment_blocks(segment_ids_BT)
    J, R = len(segment_JBC), q_JBKRH.shape[3]

    def visit(carry, pair):
        y_JBKRH, max_JBKR, sum_JBKR = carry
        i, j = pair
        logits_BKRC = _logits(q_JBKRH[i], k_JBKCH[j], segment_JBC, i, j)
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
    (y_JBKRH, max_JBKR, sum_JBKR), _ = jax.lax.scan(visit, start, _pairs(J))
    y_BTNH = _unblock((y_JBKRH / sum_JBKR[..., None]).astype(q_BTNH.dtype), T, N)
    log_z_JBKR = max_JBKR + jnp.log(sum_JBKR)
    y_BTNH, log_z_JBKR = (checkpoint_name(x, SAVED_NAME) for x in (y_BTNH, log_z_JBKR))
    return y_BTNH, (q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, y_BTNH, log_z_JBKR)


def _chunked_backward(residuals, grad_BTNH):
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, y_BTNH, log_z_JBKR = residuals
    B, T, N, H = q_BTNH.shape
    K, wide = k_BSKH.shape[2], _wide(q_BTNH.dtype)
    q_JBKRH, k_JBKCH, v_JBKCH = (_blocks(x, K) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))
    grad_JBKRH = _blocks(grad_BTNH, K)
    # What the softmax's gradient subtracts, sum_s p_ts dp_ts, is grad_t · y_t.
    inner_BTN = jnp.sum(grad_BTNH.astype(wide) * y_BTNH.astype(wide), axis=-1)
    inner_JBKR = _blocks(inner_BTN[..., None], K)[..., 0]
    segment_JBC = _segment_blocks(segment_ids_BT)
    J, C = len(segment_JBC), segment_JBC.shape[2]

    def visit(carry, pair):
        dq_JBKRH, dk_JBKHC, dv_JBKHC = carry
        i, j = pair
        q_BKRH, k_BKCH, grad_BKRH = q_JBKRH[i], k_JBKCH[j], grad_JBKRH[i]
        logits_BKRC = _logits(q_BKRH, k_BKCH, segment_JBC, i, j)
        p_BKRC = jnp.exp(logits_BKRC - log_z_JBKR[i][..., None])
        dp_BKRC = _product("bkrh,bkch->bkrc", grad_BKRH, v_JBKCH[j])
        dlogits_BKRC = (p_BKRC * (dp_BKRC - inner_JBKR[i][..., None])).astype(q_BTNH.dtype)
        p_BKRC = p_BKRC.astype(q_BTNH.dtype)
        # [H, C] and not [C, H]: XLA:CPU multiplies 128 x 128 blocks so in half the time.
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
    (dq_JBKRH, *d_JBKHC), _ = jax.lax.scan(visit, start, _pairs(J))
    dq_BTNH = _unblock(dq_JBKRH * H**-0.5, T, N).astype(q_BTNH.dtype)
    dk_BSKH, dv_BSKH = (_unblock(d.swapaxes(3, 4), T, K).astype(k_BSKH.dtype) for d in d_JBKHC)
    return dq_BTNH, dk_BSKH, dv_BSKH, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _pairs(J: int) -> tuple[np.ndarray, np.ndarray]:
    """(query block, key block) of each step, a query's own block first: there it sees itself."""
    i, j = zip(*((i, j) for i in range(J) for j in range(i, -1, -1)), strict=True)
    return np.array(i, np.int32), np.array(j, np.int32)


def _logits(q_BKRH, k_BKCH, segment_JBC, i, j):
    B, K, R, _ = q_BKRH.shape
    C = k_BKCH.shape[2]
    position_C = jnp.arange(C)
    # Positions of padding beyond the row come last, so no position of the row sees them.
    seen_BCC = segment_JBC[i][:, :, None] == segment_JBC[j][:, None, :]
    seen_BCC &= (i * C + position_C)[:, None] >= j * C + position_C
    logits_BKGCC = _product("bkrh,bkch->bkrc", q_BKRH, k_BKCH).reshape(B, K, R // C, C, C)
    return jnp.where(seen_BCC[:, None, None], logits_BKGCC, NEGATIVE).reshape(B, K, R, C)


def _product(equation: str, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=_wide(a.dtype))


def _set(stack_J, i, block):
    return jax.lax.dynamic_update_index_in_dim(stack_J, block, i, 0)


def _blocks(x_BTNH, K: int):
    """[B, T, N, H] to [J, B, K, G·C, H], zeros beyond the row."""
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


def splash(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, interpret: bool = False):
    """The Pallas TPU kernel that comes with jax, forward and backward.

    Compiled ahead of time for v5e, v5p and v6e, never timed on one: head sizes 8 to 256 need no
    padding, and of the block sizes 1024 is the largest that fits all three.
    """
    T, N, H = q_BTNH.shape[1:]
    block = _splash_block(T)
    compute = 512 if block % 512 == 0 else block
    apart = {} if _splash_fused(T) else {"block_q_dq": block, "block_kv_dq": block}
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T))] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=compute,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=compute,
            use_fused_bwd_kernel=not apart,
            **apart,
        ),
        residual_checkpoint_name=SAVED_NAME,
        interpret=interpret,
    )

    def of_row(q_NTH, k_KSH, v_KSH, segment_ids_T):
        segments = splash_attention.SegmentIds(segment_ids_T, segment_ids_T)
        return kernel(q_NTH, k_KSH, v_KSH, segment_ids=segments)

    heads_first = (x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))
    return jax.vmap(of_row)(*heads_first, segment_ids_BT).swapaxes(1, 2)


def _splash_block(T: int) -> int:
    return max(size for size in range(128, SPLASH_BLOCK + 1, 128) if T % size == 0)


def _splash_fused(T: int) -> bool:
    """One backward kernel makes 5 products where two make 7, but writes dq for each key block.

    That traffic is less than the two products at any T, yet it is that many times q's memory.
    """
    return T // _splash_block(T) <= SPLASH_FUSED


def splash_kernels(T: int) -> dict[str, int]:
    """Positions times products of one head and row, by what the name of a kernel contains."""
    pairs = _causal(T, _splash_block(T))
    backward = {"_dkv_": 5} if _splash_fused(T) else {"_dkv_": 4, "_dq_": 3}
    return {name: number * pairs for name, number in {"_fwd_": 2, **backward}.items()}


def _splash_executed(T: int) -> Executed:
    kernels = splash_kernels(T)
    forward = kernels.pop("_fwd_")
    return Executed(forward, sum(kernels.values()))


def _splash_refuses(T: int, H: int, dtype) -> str:
    if T % 128:
        return f"needs rows of a multiple of 128 positions, not {T}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"needs bfloat16 or float32, not {dtype}"
    return ""


def cudnn(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, library: str = "cudnn"):
    """cuDNN's flash attention. Not measured, nor even run, on a GPU.

    It skips what lies after the diagonal but knows no segments: those are a mask [B, 1, T, T],
    which it adds to the logits.
    """
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=same_BTS[:, None], is_causal=True, implementation=library
    )


def _cudnn_executed(T: int) -> Executed:
    """Its tiles are not documented: of 128, as in the paper's implementation."""
    pairs = _causal(T, 128)
    return Executed(2 * pairs, 5 * pairs)


def _cudnn_refuses(T: int, H: int, dtype) -> str:
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    if H % 8 or H > 128:
        return f"needs a head_dim that is a multiple of 8 and at most 128, not {H}"
    if T % 2:
        return f"needs rows of an even number of positions, not {T}"
    return ""


def _chunked_executed(T: int) -> Executed:
    if _one_block(T):
        return _reference_executed(T)
    return Executed(2 * visited_pairs(T), 5 * visited_pairs(T))


def _reference_executed(T: int) -> Executed:
    return Executed(2 * T**2, 4 * T**2, from_saved=T**2)  # the logits have no name


# In the order in which "auto" tries them.
IMPLEMENTATIONS = {
    "splash": Attention(splash, ("tpu",), executed=_splash_executed, refuses=_splash_refuses),
    "cudnn": Attention(cudnn, ("gpu",), executed=_cudnn_executed, refuses=_cudnn_refuses),
    "chunked": Attention(chunked, executed=_chunked_executed),
    "reference": Attention(reference, executed=_reference_executed),
}
