"""Soft merging of experts: causal, and one expert when all are one; experts of attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model
from moe_jax.evaluation import generate
from moe_jax.model import layers, merging, moe
from moe_jax.parallel import mesh as meshes

B, T, S, D, E = 4, 12, 4, 16, 3
CONFIG = model.ModelConfig(
    vocab_size=32,
    hidden_size=D,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=E,
    num_experts_per_tok=1,
    dispatch="merge",
    merge_segment_length=S,
)
PARAMS = jax.tree.map(lambda w: 8 * w, model.init(CONFIG, jax.random.key(0)))
LAYER = jax.tree.map(lambda w: w[0], PARAMS["blocks"]["0"]["moe"])
X_BTD = jax.random.normal(jax.random.key(1), (B, T, D))
VALID_BT = jnp.ones((B, T), bool)


@jax.jit
def layer(x_BTD, params=LAYER, valid_BT=VALID_BT):
    return moe.moe(x_BTD, params, valid_BT, CONFIG)[0]


def test_a_segment_goes_through_the_average_weights_of_the_segment_before_it():
    """Segment 2 of row 1, computed by hand from its definition."""
    normed_SD = layers.norm(X_BTD[1], LAYER["norm"], CONFIG)
    logits_E = normed_SD[S : 2 * S].mean(axis=0) @ LAYER["router"]["kernel"]
    share_E = np.exp(logits_E) / np.exp(logits_E).sum()
    merged = {n: sum(share_E[e] * w[e] for e in range(E)) for n, w in LAYER["experts"].items()}
    want_SD = layers.feed_forward(normed_SD[2 * S :], merged, CONFIG)
    np.testing.assert_allclose(layer(X_BTD)[1, 2 * S :], want_SD, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_experts_names_changes_no_bit_of_a_gradient():
    """The gradient of the shares is a sum over the matrices."""
    experts = {n: LAYER["experts"][n] for n in ("gate", "up", "down")}

    def gradients_E(experts):
        def loss(share_E, x_SD):
            return jnp.sum(jnp.sin(merging.merged_expert(x_SD, share_E, experts, CONFIG)))

        shares = jax.random.uniform(jax.random.key(2), (B, E))
        return [jax.grad(loss)(*of_row) for of_row in zip(shares, X_BTD, strict=True)]

    in_reverse = dict(reversed(experts.items()))
    np.testing.assert_array_equal(gradients_E(experts), gradients_E(in_reverse))


def test_no_token_depends_on_a_later_segment_nor_on_later_tokens_of_its_own():
    """But for the first segment, which is routed by its own mean (without gradient)."""
    for changed in range(S, T):
        moved = layer(X_BTD.at[:, changed].add(1.0)) != layer(X_BTD)
        assert not moved[:, :changed].any() and moved[:, changed].any()
    gradient_BTD = jax.grad(lambda x: jnp.sum(layer(x)[:, 0]))(X_BTD)
    assert not np.any(gradient_BTD[:, 1:])


def test_padding_does_not_vote():
    valid_BT = VALID_BT.at[:, 5 : S * 2].set(False)
    moved = layer(X_BTD.at[:, 6].add(1.0), valid_BT=valid_BT) != layer(X_BTD, valid_BT=valid_BT)
    assert not moved[:, 2 * S :].any()


def test_equal_experts_are_the_feed_forward_and_a_mesh_changes_nothing():
    one = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), LAYER["experts"])
    y_BTD = layer(X_BTD, {**LAYER, "experts": one})
    single = {n: w[0] for n, w in one.items()}
    x_BTD = layers.norm(X_BTD, LAYER["norm"], CONFIG)
    want_BTD = layers.feed_forward(x_BTD, single, CONFIG)
    np.testing.assert_allclose(y_BTD, want_BTD, rtol=1e-4, atol=1e-5)
    with jax.set_mesh(meshes.make({"data": 1, "fsdp": 4, "expert": 1, "tensor": 2})):
        on_mesh = jax.jit(lambda x: moe.moe(x, LAYER, VALID_BT, CONFIG)[0])(X_BTD)
    np.testing.assert_allclose(on_mesh, layer(X_BTD), rtol=1e-4, atol=1e-5)


def test_the_segment_means_are_over_valid_tokens():
    x_GSD = jnp.arange(8.0).reshape(2, 4, 1)
    valid_GS = jnp.array([[True, True, False, False], [False] * 4])
    np.testing.assert_array_equal(merging.segment_means(x_GSD, valid_GS), [[0.5], [0.0]])


ATTENTIONS = dataclasses.replace(
    CONFIG, dispatch="dropless", num_attention_experts=3, qk_norm="head", attention_bias="all"
)


def test_equal_attention_experts_are_the_attention_and_others_are_not():
    plain = dataclasses.replace(ATTENTIONS, num_attention_experts=0)
    params = model.init(plain, jax.random.key(0))
    attention = params["blocks"]["0"]["attention"]
    rest = {n: w for n, w in attention.items() if n != "norm"}
    copies = jax.tree.map(lambda w: jnp.repeat(w[:, None], 3, axis=1), rest)
    made = model.init(ATTENTIONS, jax.random.key(1))
    router = made["blocks"]["0"]["attention"]["router"]
    mixed = {"norm": attention["norm"], "router": router, "experts": copies}
    assert jax.tree.map(jnp.shape, mixed) == jax.tree.map(
        jnp.shape, made["blocks"]["0"]["attention"]
    )
    blocks = {"0": {**params["blocks"]["0"], "attention": mixed}}
    tokens_BT = jax.random.randint(jax.random.key(2), (2, T), 0, 32)
    apply = jax.jit(model.apply, static_argnums=2)
    want = apply(params, tokens_BT, plain).logits_BTV
    got = apply({**params, "blocks": blocks}, tokens_BT, ATTENTIONS).logits_BTV
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_attention_experts_decode_with_their_own_keys_and_values():
    params = jax.tree.map(lambda w: 4 * w, model.init(ATTENTIONS, jax.random.key(1)))
    prompt = np.arange(5)
    new = generate.generate(params, ATTENTIONS, [prompt], num_tokens=3)[0]
    tokens = np.concatenate([prompt, new])[None]
    logits_BTV = model.apply(params, jnp.asarray(tokens), ATTENTIONS).logits_BTV
    np.testing.assert_array_equal(logits_BTV[0, 4:7].argmax(axis=-1), new)
