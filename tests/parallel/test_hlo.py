"""The count of executed products: on functions counted by hand, then on the train step."""

import functools

import jax
import jax.numpy as jnp
import pytest

from moe_jax import config as configs
from moe_jax import model
from moe_jax.parallel import hlo
from moe_jax.training import flops, optimizer
from moe_jax.training.state import TrainState
from moe_jax.training.step import make_train_step

M, K, N = 16, 24, 24  # K = N, so that a product can be fed to the next
ONE = 2 * M * K * N


def times(x, w, number):
    """`number` products one after the other, nonlinear in between so that none can be merged."""
    for _ in range(number):
        x = jnp.sin(x) @ w
    return x


def scanned(x, w, trips, inner=1):
    return jax.lax.scan(lambda x, _: (times(x, w, inner), None), x, length=trips)[0]


def nested(x, w):
    return jax.lax.scan(lambda x, _: (scanned(times(x, w, 1), w, 5), None), x, length=3)[0]


def one_of_two(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: times(x, w, 2), lambda: times(x, w, 3))


def one_of_four_in_a_loop(x, w):
    branches = [functools.partial(times, w=w, number=n) for n in (1, 4, 2, 0)]

    def step(x, i):
        return jax.lax.switch(i + (x[0, 0] > 0), branches, x), None

    return jax.lax.scan(step, x, jnp.arange(6) % 3)[0]


def batched(x, w):
    return jnp.einsum("bmk,bkn->bmn", jnp.stack([x, x + 1, x + 2]), jnp.stack([w, w + 1, w + 2]))


def over_two_axes(x, w):
    return jnp.einsum("mhk,hkn->mn", x.reshape(M, 4, 6), w.reshape(4, 6, N))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: x + 1, 0),
        (lambda x, w: x @ w, ONE),
        (lambda x, w: x @ w.T + times(x, w, 2), 3 * ONE),
        (over_two_axes, ONE),
        (batched, 3 * ONE),
        (functools.partial(scanned, trips=7), 7 * ONE),
        (functools.partial(scanned, trips=7, inner=2), 14 * ONE),
        (nested, 3 * (1 + 5) * ONE),
        (jax.grad(lambda x, w: scanned(x, w, 7).sum()), 2 * 7 * ONE),
        (one_of_two, 3 * ONE),
        (one_of_four_in_a_loop, 6 * 4 * ONE),
    ],
    ids=(
        "none plain three contracted-pair batched scan scan-of-two nested gradient "
        "conditional conditional-in-a-loop"
    ).split(),
)
def test_products_are_counted_as_by_hand(function, expected):
    """Of a conditional, the branch that costs most."""
    compiled = jax.jit(function).lower(jnp.ones((M, K)), jnp.ones((K, N))).compile()
    assert hlo.product_flops(compiled.as_text()) == expected


def test_a_loop_of_unknown_length_around_products_is_refused():
    def until_small(x, body):
        return jax.lax.while_loop(lambda x: x[0, 0] > 1, body, x)

    def text(body):
        return jax.jit(functools.partial(until_small, body=body)).lower(x).compile().as_text()

    x = jnp.ones((M, M))
    with pytest.raises(ValueError, match=r"the trip count of loop [\w.\-]+ is not known"):
        hlo.product_flops(text(lambda x: x @ x))
    assert hlo.product_flops(text(jnp.sin)) == 0  # without products its length does not matter


B, T = 8, 256
TOKENS = B * T


def compiled_step(config):
    """The text of the whole train step, compiled from shapes alone."""
    settings = configs.default()
    adamw = optimizer.adamw(settings.optimizer, settings.training.num_steps)
    state = jax.eval_shape(lambda: TrainState.create(model.init(config, jax.random.key(0)), adamw))
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in names}
    step = make_train_step(config, settings.training, adamw)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile().as_text()


def step_config(E, A, **changes):
    return model.ModelConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=256,  # most of the work, as in a large model
        num_hidden_layers=2,  # a loop of one is unrolled, and its recomputation merged away
        num_attention_heads=2,
        num_experts=E,
        num_experts_per_tok=A,
        **changes,
    )


def ratio_to_analytic(text, config):
    return hlo.product_flops(text) / (flops.analytic_flops(config, T) * TOKENS)


def buffers_of_every_expert_on_every_token(text, config):
    E, rows = config.num_experts, (TOKENS, TOKENS * config.num_experts_per_tok)
    return {s for s in hlo.buffer_shapes(text) if len(s) >= 3 and s[0] == E and s[1] in rows}


@pytest.mark.parametrize(
    ("E", "A", "remat"),
    [
        pytest.param(8, 2, "full", id="8e-top2"),
        pytest.param(8, 2, "none", id="8e-top2-no remat", marks=pytest.mark.long),
        pytest.param(64, 8, "full", id="64e-top8", marks=pytest.mark.long),
        pytest.param(64, 8, "none", id="64e-top8-no remat", marks=pytest.mark.long),
    ],
)
def test_the_step_executes_the_due_products_and_at_most_a_quarter_more(E, A, remat):
    config = step_config(E, A, remat=remat)
    text = compiled_step(config)
    # Less would be an under-count; more is the padding of the experts' blocks.
    ratio = ratio_to_analytic(text, config)
    assert 0.98 <= ratio <= 1.25, ratio
    assert not buffers_of_every_expert_on_every_token(text, config)


def test_an_implementation_with_every_expert_on_every_token_is_caught():
    config = step_config(8, 2, grouped_matmul="reference")
    text = compiled_step(config)
    assert ratio_to_analytic(text, config) > 1.25
    assert buffers_of_every_expert_on_every_token(text, config)
