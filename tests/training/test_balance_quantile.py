"""Quantile balancing and sequence-wise losses: against numpy and loops by hand, on planted loads,
and on how a batch is spread, on which nothing may depend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import model, tree
from moe_jax.data.batches import Batch
from moe_jax.model import router, routing
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding
from moe_jax.training import balance, objective, optimizer, step
from moe_jax.training.state import Measures, RouterState, TrainState

E, A = 4, 2
CONFIG = model.ModelConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=E,
    router="sigmoid_topk",
    remat="none",
    initializer_range=0.3,
)
RUN = configs.Run(
    model=CONFIG,
    balance=configs.Balance(
        bias_update="quantile",
        load_balancing_over="sequence",
        load_balancing_coefficient=0.5,
        orthogonality_coefficient=0.1,
    ),
    optimizer=configs.Optimizer(gradient_clip_norm=1e9),
)
TX = optimizer.adamw(RUN.optimizer, 10)


@functools.partial(jax.jit, static_argnames="k")
def histogram(logits_ME, bias_E, valid_M, k=A):
    shortfall_ME = router.shortfall(logits_ME, bias_E, num_experts_per_tok=k)
    return routing.shortfall_histogram(shortfall_ME, bias_E, valid_M)


def updated(logits_ME, bias_E, k=A):
    """The biases after one update, through the rule itself."""
    config = dataclasses.replace(
        CONFIG,
        num_hidden_layers=1,
        num_experts=logits_ME.shape[1],
        num_experts_per_tok=k,
        norm_topk_prob=False,
    )
    counts_EH = histogram(logits_ME, bias_E, jnp.ones(len(logits_ME), bool), k)
    measures = Measures(loss=jnp.zeros(()), shortfall_LEH=counts_EH[None])
    params = {"blocks": {"0": {"moe": {"router": {"bias": bias_E[None]}}}}}
    run = dataclasses.replace(RUN, model=config)
    new, _ = balance.with_quantile_biases(params, RouterState(), run, measures)
    return new["blocks"]["0"]["moe"]["router"]["bias"][0]


def max_violation(logits_ME, bias_E, k=A):
    chosen = router.sigmoid_topk(
        logits_ME, bias_E, num_experts_per_tok=k, norm_topk_prob=True
    ).expert_index_MA
    load_E = np.bincount(np.ravel(chosen), minlength=logits_ME.shape[1])
    return load_E.max() / load_E.mean() - 1


def test_a_histogram_counts_each_valid_token_once_per_expert_in_the_bin_of_its_shortfall():
    # Scores of 1/2, and almost 0 and 1 by the logits' signs; the threshold is the third largest.
    logits_ME = jnp.array([[30.0, 0.0, -30.0, 30.0], [0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
    bias_E = jnp.array([0.013, 0.0, 0.0, 0.0])
    counts_EH = histogram(logits_ME, bias_E, jnp.array([True, True, False]))
    # The shortfalls are -0.513, 0, 0.5, -0.5 and -0.013, 0, 0, 0; bins are 1/512 wide.
    for expert, bins in enumerate([[761, 1017], [1024, 1024], [1280, 1024], [768, 1024]]):
        by_hand = np.bincount(bins, minlength=routing.NUM_BINS)
        np.testing.assert_array_equal(counts_EH[expert], by_hand)


def test_the_quantile_is_numpys_to_a_bin():
    rng = np.random.default_rng(0)
    logits_ME, bias_E = rng.normal(size=(4096, E)).astype(np.float32), np.float32([0.1, 0, 0, -0.1])
    counts_EH = histogram(logits_ME, bias_E, jnp.ones(4096, bool))
    shortfall_ME = router.shortfall(logits_ME, bias_E, num_experts_per_tok=A)
    for tenths in (2, 5, 7):
        by_hand = np.quantile(shortfall_ME, tenths / 10, axis=0)
        ticks_E = balance.quantile(counts_EH[None], tenths, 10)[0]
        np.testing.assert_allclose(ticks_E / balance.TICKS / 512, by_hand, atol=1 / 512)
    np.testing.assert_array_equal(balance.quantile(0 * counts_EH[None], 5, 10)[0], 0)


def pairs(num_pairs, shift, M=8192):
    """Logits of tokens each of which is between two experts, the second favoured by `shift`."""
    rng = np.random.default_rng(0)
    logits_ME = rng.normal(-9, 0.1, size=(M, 2 * num_pairs)).astype(np.float32)
    first_M = 2 * rng.permutation(np.arange(M) % num_pairs)
    logits_ME[np.arange(M), first_M] = rng.normal(size=M)
    logits_ME[np.arange(M), first_M + 1] = rng.normal(size=M) + shift
    return jnp.asarray(logits_ME)


@pytest.mark.parametrize(("num_pairs", "shift"), [(1, 0.5), (4, 1.0), (4, 3.0)])
def test_one_update_balances_planted_pairs_of_rivals(num_pairs, shift):
    """Thresholds stay as they are here, so that one update is exact up to its histogram."""
    logits_ME, zero_E = pairs(num_pairs, shift), jnp.zeros(2 * num_pairs)
    assert max_violation(logits_ME, zero_E, k=1) > 0.25
    assert max_violation(logits_ME, updated(logits_ME, zero_E, k=1), k=1) < 0.02


def test_further_updates_balance_any_stationary_logits():
    """One update moves the thresholds too; each further one leaves about half of the violation."""
    rng = np.random.default_rng(0)
    logits_ME = jnp.asarray(rng.normal(size=(8192, 8)) + rng.normal(size=8), jnp.float32)
    bias_E, violations = jnp.zeros(8), []
    for _ in range(8):
        violations.append(max_violation(logits_ME, bias_E))
        bias_E = updated(logits_ME, bias_E)
        assert abs(bias_E.mean()) < 1 / 512 / balance.TICKS
    assert violations[0] > 1 and violations[1] < 0.4 and violations[-1] < 0.02


def batch():
    lengths_B = np.random.default_rng(0).integers(4, 9, size=32)
    tokens_BT = jax.random.randint(jax.random.key(0), (32, 9), 0, CONFIG.vocab_size)
    return Batch.of_rows(tokens_BT, (jnp.arange(8) < lengths_B[:, None]).astype(jnp.int32))


@functools.cache
def jitted_step(accumulation_steps):
    training = configs.Training(accumulation_steps=accumulation_steps, batch_size=32)
    one_step = step.make_train_step(dataclasses.replace(RUN, training=training), TX)
    return jax.jit(one_step)


def initial_params():
    return jax.jit(lambda key: model.init(CONFIG, key))(jax.random.key(1))


def step_of(params, accumulation_steps=1, mesh=None):
    """The biases after a step, and its measures."""
    state = TrainState.create(params, TX)
    if mesh is not None:
        state = jax.device_put(state, sharding.shardings(state, mesh))
    after, measures = jitted_step(accumulation_steps)(state, batch())
    return np.asarray(tree.flatten(after.params)["blocks/0/moe/router/bias"]), measures


@pytest.mark.long
def test_a_step_has_bitwise_equal_biases_on_8_devices_and_in_4_microbatches():
    """The loss of each sequence and its gradient are equal too, up to rounding."""
    params = initial_params()
    biases, measures = step_of(params)
    assert (np.ptp(biases, axis=1) > 0.01).all()
    mesh = meshes.make({"data": 2, "fsdp": 2, "expert": 2, "tensor": 1})
    others = [step_of(params, 4)]
    with jax.set_mesh(mesh):
        others.append(step_of(params, 4, mesh))
    for other_biases, other in others:
        np.testing.assert_array_equal(other_biases, biases)
        for name, term in measures.terms.items():
            np.testing.assert_allclose(other.terms[name], term, rtol=1e-5)
        np.testing.assert_allclose(other.gradient_norm, measures.gradient_norm, rtol=1e-5)
    assert measures.shortfall_LEH is None  # nothing to send to the host


def test_evaluation_and_a_skipped_step_leave_the_biases_alone():
    params = initial_params()
    params["unembed"] = params["unembed"].at[0, 0].set(jnp.nan)
    biases, measures = step_of(params)
    assert measures.skipped
    np.testing.assert_array_equal(biases, 0)
    assert model.apply(params, batch().tokens_BT, CONFIG).router.shortfall_EH is None


def test_a_loss_over_sequences_is_the_mean_of_each_rows_own_loss():
    """DeepSeek-V3 (arXiv 2412.19437, eq. 17-20), by a loop over rows; an empty row has no loss."""
    params, rows = initial_params(), batch()
    segment_ids_BT = rows.segment_ids_BT.at[3].set(0)
    rows = dataclasses.replace(rows, segment_ids_BT=segment_ids_BT)
    output = model.apply(
        params, rows.tokens_BT, CONFIG, segment_ids_BT=segment_ids_BT, return_routing=True
    )
    by_row = routing.Counted(by_row=True)
    _, stats = objective.hidden_states(params, rows, jax.random.key(0), CONFIG, by_row)
    _, terms = balance.router_losses(
        stats, RUN.balance, num_experts_per_tok=A, num_tokens=jnp.sum(segment_ids_BT)
    )
    losses = []
    for layer in range(2):
        for row in set(range(32)) - {3}:
            valid_T = np.asarray(segment_ids_BT[row] > 0)
            index_TA = np.asarray(output.router.routing.expert_index_MA[layer, row])[valid_T]
            score_TE = np.asarray(jax.nn.sigmoid(output.router.routing.logits_ME[layer, row]))
            P_E = (score_TE / score_TE.sum(axis=1, keepdims=True))[valid_T].mean(axis=0)
            f_E = np.bincount(index_TA.ravel(), minlength=E) * E / (A * valid_T.sum())
            losses.append(np.sum(f_E * P_E))
    np.testing.assert_allclose(terms["load_balancing_loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_array_equal(
        stats.tokens_per_expert_E.sum(axis=1), output.router.tokens_per_expert_E.sum(axis=1)
    )


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"router": "softmax_topk"}, "bias_update='quantile' needs a router with a bias"),
        ({"num_expert_groups": 2, "num_groups_per_tok": 2}, "set model.num_expert_groups=2 to 1"),
        ({"num_experts_per_tok": E}, "model.num_experts_per_tok=4 below num_experts=4"),
    ],
)
def test_routers_without_a_score_at_the_threshold_are_refused(fields, complaint):
    with pytest.raises(configs.ConfigError) as error:
        dataclasses.replace(RUN, model=dataclasses.replace(CONFIG, **fields))
    assert complaint in str(error.value)
