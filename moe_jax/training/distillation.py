"""Distillation from a teacher's logits."""

import functools

import jax
import jax.numpy as jnp

from moe_jax.ops import cross_entropy, implementations
from moe_jax.parallel import sharding


def distillation_loss(
    x_BTD: jax.Array,
    unembed_DV: jax.Array,
    teacher_x_BTC: jax.Array,
    teacher_unembed_CV: jax.Array,
    weight_BT: jax.Array,
    *,
    temperature: float,
) -> jax.Array:
    """T^2 · KL(teacher || student) with logits divided by T, as a weighted sum over tokens.

    Hinton et al., arXiv 1503.02531. The inputs are the outputs of the final norms: logits are
    computed for some tokens at a time, and recomputed for the gradient. As in `cross_entropy`, each
    device has its own rows.
    """
    local = functools.partial(_divergence, temperature=temperature)
    arrays = (x_BTD, unembed_DV, teacher_x_BTC, teacher_unembed_CV, weight_BT)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arrays)
    spec = sharding.spec_of("unembed")

    def on_device(x_BTD, unembed_DV, teacher_x_BTC, teacher_unembed_CV, weight_BT):
        unembed_DV, teacher_unembed_CV = (
            sharding.all_gather(w, spec) for w in (unembed_DV, teacher_unembed_CV)
        )
        return local(x_BTD, unembed_DV, teacher_x_BTC, teacher_unembed_CV, weight_BT)[None]

    return jax.shard_map(
        on_device,
        in_specs=(sharding.BATCH, spec, sharding.BATCH, spec, sharding.BATCH),
        out_specs=sharding.BATCH,
        check_vma=False,  # all devices along the tensor axis compute the same
    )(*arrays).sum()


def _divergence(x_BTD, unembed_DV, teacher_x_BTC, teacher_unembed_CV, weight_BT, temperature):
    @jax.checkpoint
    def divergence(x_D, teacher_x_C):
        log_p_V, log_q_V = (
            jax.nn.log_softmax(
                jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32) / temperature
            )
            for x, w in ((x_D, unembed_DV), (teacher_x_C, teacher_unembed_CV))
        )
        return temperature**2 * jnp.sum(jnp.exp(log_q_V) * (log_q_V - log_p_V))

    tokens = tuple(x.reshape(-1, x.shape[-1]) for x in (x_BTD, teacher_x_BTC))
    logits = cross_entropy.CHUNK_LOGITS[implementations.platform()]
    chunk = max(1, logits // unembed_DV.shape[1] // 2)
    kl_M = jax.lax.map(lambda token: divergence(*token), tokens, batch_size=chunk)
    return jnp.sum(kl_M * weight_BT.ravel())
