"""The language-model loss from hidden states, without the logits of the whole batch at once."""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.ops.implementations import Implementation, choose, platform
from moe_jax.parallel import sharding

# Logits per chunk and device, by platform. In float32, 16 MiB stay in a CPU's cache. Elsewhere they
# take 256 MiB, because each chunk reads and writes the unembedding and its gradient once.
CHUNK_LOGITS = {"cpu": 2**22, "gpu": 2**26, "tpu": 2**26}


@struct.dataclass
class LossSums:
    """Weighted sums over tokens. Only `total` has a gradient."""

    total: jax.Array  # nats + z_coefficient * z
    nats: jax.Array  # cross-entropy
    z: jax.Array  # logsumexp(logits)^2 (de Brébisson & Vincent, arXiv 1604.08859)


def cross_entropy(
    x_BTD: jax.Array,
    unembed_DV: jax.Array,
    targets_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    z_coefficient: float = 0.0,
    implementation: str = "auto",
) -> LossSums:
    """Cross-entropy of x · unembed against the targets, summed over all tokens.

    Args:
      x_BTD: the final norm's output.
      weight_BT: 1 counts a token, 0 leaves it out.
      z_coefficient: the weight of the z-loss, which penalises large logits (PaLM uses 1e-4).
      implementation: "reference" (all logits at once), "chunked" (some positions at a time, with
        the gradient computed in the same pass: three products like the reference, but no [B, T, V]
        buffer), or "auto", which is "chunked".

    With a mesh set each device works on its own rows of the batch.

    Raises: ValueError for an unknown `implementation`.
    """
    local = choose("cross_entropy", implementation, IMPLEMENTATIONS).function
    arrays = (x_BTD, unembed_DV, targets_BT, weight_BT)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arrays, z_coefficient)
    spec = sharding.spec_of("unembed")

    def on_device(x_BTD, unembed_DV, targets_BT, weight_BT):
        whole_DV = sharding.all_gather(unembed_DV, spec)
        sums = local(x_BTD, whole_DV, targets_BT, weight_BT, z_coefficient)
        return jax.tree.map(lambda x: x[None], sums)

    of_shards = jax.shard_map(
        on_device,
        in_specs=(sharding.BATCH, spec, sharding.BATCH, sharding.BATCH),
        out_specs=sharding.BATCH,
        check_vma=False,  # all devices along the tensor axis compute the same
    )(*arrays)
    return jax.tree.map(jnp.sum, of_shards)


def reference(x_BTD, unembed_DV, targets_BT, weight_BT, z_coefficient) -> LossSums:
    log_z_BT, target_BT, _ = _log_z_and_target(x_BTD, unembed_DV, targets_BT)
    return _sums(log_z_BT, target_BT, weight_BT, z_coefficient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked(x_BTD, unembed_DV, targets_BT, weight_BT, z_coefficient) -> LossSums:
    def add(total, chunk):
        log_z_BC, target_BC, _ = _log_z_and_target(chunk[0], unembed_DV, chunk[1])
        sums = _sums(log_z_BC, target_BC, chunk[2], z_coefficient)
        return jax.tree.map(jnp.add, total, sums), None

    chunks = _chunks(x_BTD, unembed_DV.shape[1], targets_BT, weight_BT)
    return jax.lax.scan(add, LossSums(*[jnp.zeros(())] * 3), chunks)[0]


def token_losses(x_BTD: jax.Array, unembed_DV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Cross-entropy of each token in nats, [B, T], some positions at a time; without a gradient."""
    return _of_chunks(lambda log_z, target, logits: log_z - target, x_BTD, unembed_DV, targets_BT)


def token_predictions(
    x_BTD: jax.Array, unembed_DV: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`token_losses`, and the id of the most probable token at each position, [B, T]."""

    def both(log_z_BC, target_BC, logits_BCV):
        return log_z_BC - target_BC, jnp.argmax(logits_BCV, axis=-1)

    return _of_chunks(both, x_BTD, unembed_DV, targets_BT)


def _of_chunks(function, x_BTD, unembed_DV, targets_BT):
    """`function` of `_log_z_and_target`, some positions at a time."""

    def of_chunk(chunk):
        return function(*_log_z_and_target(chunk[0], unembed_DV, chunk[1]))

    chunked = jax.lax.map(of_chunk, _chunks(x_BTD, unembed_DV.shape[1], targets_BT))
    return jax.tree.map(lambda x_NBC: jnp.moveaxis(x_NBC, 0, 1).reshape(targets_BT.shape), chunked)


def _log_z_and_target(x_BTD, unembed_DV, targets_BT):
    """(logsumexp of the logits, the target's logit, the logits), all in float32."""
    logits_BTV = jnp.einsum(
        "btd,dv->btv", x_BTD, unembed_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32
    )
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1), target_BT, logits_BTV


def _sums(log_z_BT, target_BT, weight_BT, z_coefficient) -> LossSums:
    nats = jnp.sum((log_z_BT - target_BT) * weight_BT)
    z = jnp.sum(log_z_BT**2 * weight_BT)
    return LossSums(nats + z_coefficient * z, nats, z)


def _chunks(x_BTD, V: int, *arrays_BT):
    """[B, T, ...] to [T / C, B, C, ...]: split along time, so that the batch may be sharded."""
    B, T = x_BTD.shape[:2]
    C = max(1, min(T, CHUNK_LOGITS[platform()] // (B * V)))
    while T % C:
        C -= 1
    return tuple(
        jnp.moveaxis(x.reshape(B, T // C, C, *x.shape[2:]), 1, 0) for x in (x_BTD, *arrays_BT)
    )


def _chunked_forward(x_BTD, unembed_DV, targets_BT, weight_BT, z_coefficient):
    """Computes the gradient too, so that each chunk's logits are computed only once."""
    weight_DV = unembed_DV.astype(x_BTD.dtype)

    def add(carry, chunk):
        total, grad_DV = carry
        x_BCD, targets_BC, weight_BC = chunk
        log_z_BC, target_BC, logits_BCV = _log_z_and_target(x_BCD, weight_DV, targets_BC)
        sums = _sums(log_z_BC, target_BC, weight_BC, z_coefficient)
        p_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
        hit_BCV = jnp.arange(p_BCV.shape[-1]) == targets_BC[..., None]
        slope_BC = 1 + 2 * z_coefficient * log_z_BC
        grad_BCV = weight_BC[..., None] * (p_BCV * slope_BC[..., None] - hit_BCV)
        grad_BCV = grad_BCV.astype(x_BCD.dtype)
        grad_BCD = jnp.einsum("bcv,dv->bcd", grad_BCV, weight_DV)
        # Flattened to one axis of rows, because XLA:CPU takes twice as long with two.
        x_MD, grad_MV = (x.reshape(-1, x.shape[-1]) for x in (x_BCD, grad_BCV))
        grad_DV += jnp.einsum("md,mv->dv", x_MD, grad_MV, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, total, sums), grad_DV), grad_BCD

    chunks = _chunks(x_BTD, unembed_DV.shape[1], targets_BT, weight_BT)
    start = (LossSums(*[jnp.zeros(())] * 3), jnp.zeros(unembed_DV.shape, jnp.float32))
    (total, grad_DV), grad_NBCD = jax.lax.scan(add, start, chunks)
    grad_BTD = jnp.moveaxis(grad_NBCD, 0, 1).reshape(x_BTD.shape)
    return total, (grad_BTD, grad_DV.astype(unembed_DV.dtype))


def _chunked_backward(z_coefficient, gradients, cotangents):
    grad_BTD, grad_DV = (g * cotangents.total.astype(g.dtype) for g in gradients)
    return grad_BTD, grad_DV, None, None


chunked.defvjp(_chunked_forward, _chunked_backward)

# "auto" tries them in this order.
IMPLEMENTATIONS = {"chunked": Implementation(chunked), "reference": Implementation(reference)}
