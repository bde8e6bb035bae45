"""Matrices in the stack of layers: the same bits as copies of them, and no copies."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import model
from moe_jax.evaluation import generate
from moe_jax.evaluation.sampling import GREEDY
from moe_jax.ops import grouped_gpu, grouped_host, grouped_matmul, grouped_tpu, stacks
from moe_jax.parallel import mesh

E, D, F, L = 6, 16, 24, 3
KERNELS = {
    "host": grouped_host.HOST,
    "megablox": grouped_tpu.megablox(interpret=True),
    "triton": grouped_gpu.triton(interpret=True),
}
CONFIG = model.ModelConfig(
    vocab_size=64,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=2 * L,
    num_attention_heads=2,
    num_experts=E,
    num_experts_per_tok=2,
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for tiling in ("tiling", "gradient_tiling"):
        monkeypatch.setattr(grouped_tpu, tiling, lambda *sizes: (16, 8, 8))


@functools.cache
def params(config=CONFIG):
    return jax.jit(functools.partial(model.init, config))(jax.random.key(0))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("layer", [0, L - 1])
def test_a_row_of_a_stack_gives_the_bits_and_the_gradients_of_its_value(name, layer):
    keys = jax.random.split(jax.random.key(0), 4)
    x_MD, gradient_MF = (jax.random.normal(k, (20, n)) for k, n in ((keys[0], D), (keys[1], F)))
    stacks_LEDF = tuple(jax.random.normal(key, (L, E, D, F)) for key in keys[2:])
    sizes_E = jnp.array([3, 0, 9, 1, 0, 5])  # two rows are in no group

    def pulled(x_MD, stacks_LEDF, in_place):
        def products(x_MD, values):
            rows = (
                stacks.row(v, s, jnp.int32(layer)) for v, s in zip(values, stacks_LEDF, strict=True)
            )
            weights = tuple(rows) if in_place else values
            return grouped_matmul._product(KERNELS[name], x_MD, weights, sizes_E)

        ys, pull = jax.vjp(products, x_MD, tuple(s[layer] for s in stacks_LEDF))
        return ys, pull((gradient_MF, gradient_MF))

    pulled = jax.jit(pulled, static_argnames="in_place")
    jax.tree.map(
        np.testing.assert_array_equal,
        pulled(x_MD, stacks_LEDF, in_place=True),
        pulled(x_MD, stacks_LEDF, in_place=False),
    )


def copies_of_a_layer(text: str, shape: tuple[int, ...], dtype: str = "f32") -> list[str]:
    """Instructions that make an array of a layer's shape out of another array by slicing it."""
    dims = ",".join(map(str, shape))
    made = rf"{dtype}\[(1,)*{dims}\]\S* (slice|dynamic-slice|gather|copy)\("
    return [line.strip()[:150] for line in text.splitlines() if re.search(made, line)]


def forward_text(config):
    tokens_BT = jnp.zeros((2, 8), jnp.int32)
    lowered = jax.jit(model.apply, static_argnames="config").lower(params(), tokens_BT, config)
    return lowered.compile().as_text()


def training_text(config):
    tokens_BT = jnp.zeros((2, 8), jnp.int32)

    def loss(params):
        return jnp.sum(jax.nn.logsumexp(model.apply(params, tokens_BT, config).logits_BTV, axis=-1))

    with jax.set_mesh(mesh.one_device()):
        return jax.jit(jax.value_and_grad(loss)).lower(params()).compile().as_text()


def decoding_text(config):
    config = dataclasses.replace(config, dispatch="dropless")
    drawing = generate._Drawing(jax.random.key(0), GREEDY)
    arguments = params(), jnp.zeros((1, 4), jnp.int32), jnp.array([4]), drawing
    lowered = generate._continue.lower(*arguments, config=config, num_tokens=8)
    return lowered.compile().as_text()


TEXTS = {"forward": forward_text, "training": training_text, "decoding": decoding_text}


@pytest.mark.parametrize(
    ("name", "remat"),
    [("forward", "none"), ("training", "none"), ("training", "full"), ("decoding", "none")],
)
def test_no_layer_of_experts_is_copied_out_of_its_stack(name, remat):
    text = TEXTS[name](dataclasses.replace(CONFIG, remat=remat))
    for shape in ((E, D, F), (E, F, D)):
        assert not copies_of_a_layer(text, shape)


@pytest.mark.parametrize("name", TEXTS)
def test_the_copies_are_found_where_an_implementation_needs_them(name):
    text = TEXTS[name](dataclasses.replace(CONFIG, grouped_matmul="reference", remat="none"))
    assert copies_of_a_layer(text, (E, D, F)) or copies_of_a_layer(text, (D, F))


@pytest.mark.parametrize("shape", [(8, 2), (64, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_decoding_one_row_reads_the_matrices_that_it_must_and_no_others(shape, dtype, monkeypatch):
    """The bytes of the matrices in the products of a token, beside those of the chosen experts."""
    experts, chosen = shape
    config = dataclasses.replace(CONFIG, num_experts=experts, num_experts_per_tok=chosen)
    stored = jax.tree.map(lambda x: x.astype(dtype), params(config))
    read = []
    monkeypatch.setattr(grouped_host, "_wide", lambda w, wide=grouped_host._wide: count(w, wide))

    def count(w, wide):
        read.append(w.nbytes)
        return wide(w)

    prompt, tokens = [np.array([1])], 5
    generate.generate(stored, config, prompt, num_tokens=tokens)
    H = D // config.num_attention_heads
    heads = 2 * config.num_attention_heads + 2 * config.num_kv_heads
    values = config.num_hidden_layers * (heads * H * D + chosen * 3 * D * F)
    assert sum(read) == tokens * values * jnp.dtype(dtype).itemsize
