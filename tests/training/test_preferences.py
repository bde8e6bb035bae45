"""Losses on pairs of answers: against TRL, against numpy, on any mesh, in any packing."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import model
from moe_jax.analysis import answers
from moe_jax.config.objectives import Preference
from moe_jax.data.batches import Batch
from moe_jax.parallel import mesh as meshes
from moe_jax.training import objective, optimizer, step
from moe_jax.training.preferences import LOSSES
from moe_jax.training.state import RouterState, TrainState

TRL = json.loads((pathlib.Path(__file__).parents[1] / "golden/trl/preferences.json").read_text())
V, T = 32, 12
MOE = model.ModelConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    remat="none",
)
BALANCE = configs.Balance(load_balancing_coefficient=0.3, load_balancing_over="window")
TX = optimizer.adamw(configs.Optimizer(learning_rate=1e-2), 10)


def row_of(pairs, length):
    """A row with these pairs, each (prompt, chosen, rejected) in ids."""
    row = jax.tree.map(lambda x: x[0], Batch.of_shape((1, length)))
    at = 0
    sequences = [(p, answer) for p, *both in pairs for answer in both]
    for segment, (prompt, answer) in enumerate(sequences, start=1):
        ids = [*prompt, *answer]
        there = slice(at, at + len(ids) - 1)
        row.tokens_BT[there], row.targets_BT[there] = ids[:-1], ids[1:]
        row.segment_ids_BT[there] = segment
        row.positions_BT[there] = np.arange(len(ids) - 1)
        row.weights_BT[at + len(prompt) - 1 : there.stop] = 1
        at = there.stop
    return row


def batch_of(rows, length=T):
    return jax.tree.map(lambda *x: jnp.stack(x), *(row_of(pairs, length) for pairs in rows))


def random_pairs(number, seed=0):
    draw = np.random.default_rng(seed)
    return [
        [draw.integers(0, V, n).tolist() for n in (1 + i % 3, 2 + i % 2, 1 + i % 4)]
        for i in range(number)
    ]


@functools.cache
def parameters(seed):
    return jax.jit(lambda key: model.init(MOE, key))(jax.random.key(seed))


def settings_of(name, **training):
    preference = Preference(label_smoothing=0.1 if name == "cdpo" else 0.0)
    return configs.Run(
        model=MOE,
        optimizer=configs.Optimizer(learning_rate=1e-2),
        training=configs.Training(num_steps=10, **training),
        balance=BALANCE,
        objective=configs.Objective(name=name, preference=preference),
    )


def step_of(name, batch, reference=None, mesh=None, **training):
    """The parameters after a step, and its measures."""
    frozen = {} if reference is None else {"reference": MOE}
    run = settings_of(name, **training)
    state = jax.jit(lambda params: TrainState.create(params, TX))(parameters(0))
    one_step = jax.jit(step.make_train_step(run, TX, frozen))
    if mesh:
        one_step = meshes.under(mesh, one_step)
    more = () if reference is None else ({"reference": reference},)
    state, found = one_step(state, batch, *more)
    return state.params, found


def assert_equal_steps(one, other, rtol=1e-6):
    (params, a), (twin, b) = one, other
    assert a.terms.keys() == b.terms.keys()
    for x, y in ((a.loss, b.loss), (a.gradient_norm, b.gradient_norm), (a.terms, b.terms)):
        for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            np.testing.assert_allclose(u, v, rtol=rtol, atol=rtol)
    # Adam divides by the gradient's size: where that is 0, rounding decides the direction.
    for u, v in zip(jax.tree.leaves(params), jax.tree.leaves(twin), strict=True):
        np.testing.assert_allclose(u, v, atol=2e-4)


@pytest.mark.parametrize("name", TRL["losses"])
def test_loss_gradient_and_measures_are_those_of_trl(name, monkeypatch):
    """The model's logits are given: its final norm's outputs, with the identity as unembedding."""
    pairs, golden = TRL["pairs"], TRL["losses"][name]
    N, length, width = len(pairs), 6, 7
    i = np.arange(2 * N * length * width, dtype=np.float64)

    def rows_of(shift):
        """TRL's rows are single answers, ours have both."""
        logits = (2 * np.sin(1.7 * i + shift)).astype(np.float32).reshape(2 * N, length, width)
        x = np.zeros((N, 2 * length, width), np.float32)
        for pair, (prompt, chosen, rejected) in enumerate(pairs):
            first, second = len(prompt) + len(chosen) - 1, len(prompt) + len(rejected) - 1
            x[pair, :first] = logits[pair, :first]
            x[pair, first : first + second] = logits[N + pair, :second]
        return jnp.asarray(x)

    batch = batch_of([[pair] for pair in pairs], 2 * length)
    monkeypatch.setattr(objective, "hidden_states", lambda params, *_: (params["x"], None))
    params, frozen = ({"x": rows_of(shift), "unembed": jnp.eye(width)} for shift in (0.0, 0.4))
    dense = dataclasses.replace(MOE, num_experts=0)
    run = dataclasses.replace(settings_of(name), model=dense, balance=configs.Balance())
    preference = dataclasses.replace(run.objective.preference, beta=TRL["beta"])
    run = dataclasses.replace(run, objective=configs.Objective(name=name, preference=preference))
    over = functools.partial(step.over_microbatches, batch=batch, key=jax.random.key(0), number=1)
    context = objective.Context(
        run, params, batch, RouterState(), {"reference": (dense, frozen)}, over
    )
    loss = objective.choose(name).make(context)
    (value, found), slope = jax.value_and_grad(loss, has_aux=True)(params, batch, None)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
    np.testing.assert_allclose(found.loss, golden["loss"], rtol=1e-5)
    theirs = np.array(golden["gradient"]).reshape(2 * N, length, width)
    for pair, (prompt, chosen, rejected) in enumerate(pairs):
        first, second = len(prompt) + len(chosen) - 1, len(prompt) + len(rejected) - 1
        ours = slope["x"][pair]
        np.testing.assert_allclose(ours[:first], theirs[pair, :first], atol=1e-5)
        other = ours[first : first + second]
        np.testing.assert_allclose(other, theirs[N + pair, :second], atol=1e-5)
    assert np.abs(theirs).max() > 0.01
    for key, name_of_trl in {
        "reward_margin": "rewards/margins",
        "preference_accuracy": "rewards/accuracies",
        "chosen_log_prob": "logps/chosen",
        "rejected_log_prob": "logps/rejected",
    }.items():
        if name_of_trl in golden["metrics"]:
            expected = golden["metrics"][name_of_trl]
            np.testing.assert_allclose(found.terms[key], expected, rtol=1e-5)


@pytest.mark.long
def test_a_step_of_dpo_is_that_of_numpy():
    pairs = random_pairs(8)
    batch = batch_of([[pair] for pair in pairs])
    run = dataclasses.replace(
        settings_of("dpo"), balance=configs.Balance(load_balancing_coefficient=0.0)
    )
    state = TrainState.create(parameters(0), TX)
    one_step = jax.jit(step.make_train_step(run, TX, {"reference": MOE}))
    after, found = one_step(state, batch, {"reference": parameters(1)})

    def logits(params):
        x_BTD, _ = objective.hidden_states(params, batch, None, MOE)
        return x_BTD @ objective.transformer.unembedding(params)

    ours_BTV, back = jax.vjp(jax.jit(logits), parameters(0))
    theirs_BTV = jax.jit(logits)(parameters(1))
    log_p, log_q = (
        np.asarray(x, np.float64) - np.log(np.exp(np.float64(x)).sum(-1, keepdims=True))
        for x in (ours_BTV, theirs_BTV)
    )
    slope_BTV, losses, kl = np.zeros_like(log_p), [], []
    for b, (prompt, chosen, rejected) in enumerate(pairs):
        ratio, spans = [], []
        at = 0
        for answer in (chosen, rejected):
            first = at + len(prompt) - 1
            where = (b, np.arange(first, first + len(answer)), np.array(answer))
            ratio.append((log_p[where] - log_q[where]).sum())
            kl += list((log_p[where] - log_q[where]) ** 2 / 2)
            spans.append(where)
            at = first + len(answer)
        logit = 0.1 * (ratio[0] - ratio[1])
        losses.append(np.log1p(np.exp(-logit)))
        # d/d log-ratio of the chosen answer: -beta · sigmoid(-logit).
        weight = -0.1 / (1 + np.exp(logit)) / len(pairs)
        for sign, where in zip((1, -1), spans, strict=True):
            slope_BTV[where[0], where[1]] -= sign * weight * np.exp(log_p[where[0], where[1]])
            slope_BTV[where] += sign * weight
    np.testing.assert_allclose(found.loss, np.mean(losses), rtol=1e-6)
    np.testing.assert_allclose(found.terms["reference_kl"], np.mean(kl), rtol=1e-5)
    [grads] = back(jnp.asarray(slope_BTV, jnp.float32))
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(found.gradient_norm, norm, rtol=1e-5)
    updates, _ = TX.update(grads, state.opt_state, state.params)
    leaves = map(jax.tree.leaves, (state.params, updates, after.params))
    for x, update, y in zip(*leaves, strict=True):
        np.testing.assert_allclose(x + update, y, atol=2e-4)


@pytest.mark.long
def test_a_step_is_the_same_accumulated_with_a_mean_over_the_whole_batch():
    """KTO's baseline and the balance loss are both of the whole batch."""
    batch, reference = batch_of([[pair] for pair in random_pairs(16)]), parameters(1)
    whole = step_of("kto", batch, reference)
    assert_equal_steps(step_of("kto", batch, reference, accumulation_steps=4), whole)


def test_a_step_is_the_same_on_eight_devices_and_with_a_cached_reference():
    batch, reference = batch_of([[pair] for pair in random_pairs(16)]), parameters(1)
    whole = step_of("dpo", batch, reference)

    @jax.jit
    def log_probs(reference):
        x_BTD, _ = objective.hidden_states(reference, batch, None, MOE)
        return -objective.token_losses(reference, x_BTD, batch)

    cached = batch.replace(reference_BT=log_probs(reference))
    mesh = meshes.make({"data": 2, "fsdp": 2, "expert": 2})
    spread = step_of("dpo", cached, mesh=mesh, accumulation_steps=2)
    assert_equal_steps(spread, whole, rtol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_two_pairs_in_a_row_count_as_in_two_rows(name):
    """Nothing of a pair depends on its row, and a row without pairs adds nothing."""
    pairs = random_pairs(2)
    found = []
    for rows in ([[pairs[0]], [pairs[1]]], [pairs, []]):
        batch = batch_of(rows, 2 * T)
        ratio_BT = jnp.sin(1.0 * batch.targets_BT + batch.positions_BT)
        sums = answers.sums(ratio_BT, jnp.cos(ratio_BT), batch)
        number = answers.counts(sums.tokens_BPK)
        row, settings = LOSSES[name], settings_of(name).objective.preference
        loss = row.summed(sums, jnp.float32(0.1), settings) / number[row.over]
        found.append((loss, answers.measured(sums, number, 0.1)))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_losses_at_the_reference_are_those_of_their_papers():
    """Log-ratios of 0: log 2 whatever the smoothing, IPO's 1 / (4 beta^2), KTO's 1/2."""
    zero_BPK, beta = jnp.zeros((1, 1, 2)), 0.25
    settings = Preference(beta=beta, label_smoothing=0.2)
    at_zero = {n: np.ravel(row.of(zero_BPK, jnp.zeros(()), settings)) for n, row in LOSSES.items()}
    log_2 = np.log(2)
    expected = {"dpo": log_2, "dpo_norm": log_2, "cdpo": log_2, "ipo": 4.0, "kto": 0.5}
    for name, value in expected.items():
        np.testing.assert_allclose(at_zero[name], value, rtol=1e-6)
    # By hand: a margin of 4 nats, of which a fifth of the pairs want the opposite.
    ratio_BPK = jnp.array([[[3.0, -1.0]]])
    smoothed = LOSSES["cdpo"].of(ratio_BPK, jnp.zeros(()), settings)
    np.testing.assert_allclose(smoothed, 0.8 * np.log1p(np.exp(-1)) + 0.2 * np.log1p(np.e), 1e-6)
    # KTO counts from the batch's mean log-ratio, but not from a negative one.
    for baseline, z in ((1.0, 1.0), (-1.0, 0.0)):
        losses = LOSSES["kto"].of(ratio_BPK, jnp.float32(baseline), settings)
        by_hand = [1 / (1 + np.exp(beta * (3 - z))), 1 / (1 + np.exp(beta * (z + 1)))]
        np.testing.assert_allclose(np.ravel(losses), by_hand, rtol=1e-6)


def test_a_prompt_target_carries_no_loss_and_an_answer_target_its_own():
    pairs = [[[1, 2, 3], [4, 5], [6]]]
    batch = batch_of([pairs])
    log_prob_BT = jnp.sin(jnp.arange(T, dtype=jnp.float32))[None]
    before = answers.sums(log_prob_BT, jnp.zeros((1, T)), batch).log_ratio_BPK[0, 0]
    for t, of_answer in enumerate([None, None, 0, 0, None, None, 1, *[None] * 5]):
        after = answers.sums(log_prob_BT.at[0, t].add(1), jnp.zeros((1, T)), batch)
        changed = np.asarray(after.log_ratio_BPK[0, 0] - before)
        expected = np.zeros(2) if of_answer is None else np.eye(2)[of_answer]
        np.testing.assert_allclose(changed, expected, atol=1e-6)
