"""Held-out losses and continuations against what a plain loop over the logits gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import model
from moe_jax.data.batches import Batch
from moe_jax.evaluation import generate, perplexity
from tests import drawn

CONFIG = model.ModelConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=2,
    num_experts_per_tok=1,
)
B, T = 4, 12


@pytest.fixture(scope="module")
def params():
    return drawn.parameters(CONFIG)


def batch_of(seed):
    tokens_BT = jax.random.randint(jax.random.key(seed), (B, T + 1), 0, 16)
    valid_BT = jnp.arange(T) < jnp.array([[12], [7], [0], [12]])
    return Batch.of_rows(tokens_BT, valid_BT.astype(jnp.int32)).replace(
        labels_BT=jnp.tile(jnp.array([[0], [1], [1], [2]]), (1, T))
    )


def test_losses_by_language_are_means_over_their_tokens_and_bits_are_per_byte(params):
    batches = [batch_of(0), batch_of(1)]
    bytes_per_token = {"en": 1.0, "ja": 3.0, "ru": 2.0, "unseen": 1.0}
    eval_step = jax.jit(perplexity.make_eval_step(CONFIG, len(bytes_per_token)))
    found = perplexity.evaluate(eval_step, params, batches, bytes_per_token).loss()

    nats = {label: [] for label in bytes_per_token}
    apply = jax.jit(model.apply, static_argnums=2)
    for batch in batches:
        logits_BTV = apply(params, batch.tokens_BT, CONFIG).logits_BTV
        log_p_BTV = np.asarray(jax.nn.log_softmax(logits_BTV), np.float64)
        for row, column in zip(*np.nonzero(batch.segment_ids_BT), strict=True):
            label = list(bytes_per_token)[batch.labels_BT[row, column]]
            nats[label].append(-log_p_BTV[row, column, batch.targets_BT[row, column]])
    assert set(found.per_language) == {"en", "ja", "ru"}
    for label in found.per_language:
        mean = np.mean(nats[label])
        expected = {"loss": mean, "bits_per_byte": mean / np.log(2) / bytes_per_token[label]}
        assert found.per_language[label] == pytest.approx(expected, rel=1e-5)
    everything = [value for values in nats.values() for value in values]
    num_bytes = sum(len(values) * bytes_per_token[label] for label, values in nats.items())
    assert found.loss == pytest.approx(np.mean(everything), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(sum(everything) / np.log(2) / num_bytes, rel=1e-5)
    assert found.router["tokens_per_expert_E"].sum() == len(everything)


CAPACITY = {"dispatch": "capacity", "capacity_factor": 0.75, "min_capacity": 1}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
RANDOM = {**FOUR, **CAPACITY, "token_priority": "random"}
# All that drops tokens, or lets experts choose, or merges them.
OF_A_ROW = {
    "group-limited": {**FOUR, **CAPACITY, "router": "sigmoid_topk", "num_expert_groups": 2},
    "noisy, random": {**RANDOM, "router": "noisy_topk"},
    "expert choice": {**FOUR, **CAPACITY, "router": "expert_choice"},
    "in turn": {**FOUR, "num_experts": 5, "router": "forced_balance"},
    "merged": {**FOUR, "dispatch": "merge", "merge_segment_length": 4},
}
ROWS = 65


def padded_batches(batch_size, rows_BX, valid_BT):
    rows = -(-ROWS // batch_size) * batch_size
    padded = (np.pad(x, ((0, rows - ROWS), (0, 0))) for x in (rows_BX, valid_BT))
    parts = zip(*(np.split(x, rows // batch_size) for x in padded), strict=True)
    return [Batch.of_rows(x, jnp.asarray(valid, jnp.int32)) for x, valid in parts]


LONG = ("in turn", "merged")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.long) if k in LONG else k for k in OF_A_ROW]
)
def test_the_loss_depends_neither_on_the_batch_size_nor_on_rows_of_padding(kind):
    """Rows of different lengths, by 1, 7 and 64 at a time: the last batch is padded."""
    config = dataclasses.replace(CONFIG, **OF_A_ROW[kind])
    params = drawn.parameters(config)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 16, (ROWS, T + 1)), np.arange(T) < rng.integers(1, T + 1, (ROWS, 1))
    eval_step = jax.jit(perplexity.make_eval_step(config, 1))
    found = [
        perplexity.evaluate(eval_step, params, padded_batches(size, *rows), {"en": 1.0}).loss()
        for size in (1, 7, 64)
    ]
    assert found[0].router["num_dropped"].any() == (kind in ("group-limited", "noisy, random"))
    for other in found[1:]:
        assert other.loss == pytest.approx(found[0].loss, rel=1e-6)
        jax.tree.map(np.testing.assert_array_equal, other.router, found[0].router)


def test_no_counted_nats_of_merged_experts_depend_on_later_tokens():
    """Nats by position where one token changes; segments are of 4, and the first is left out."""
    config = dataclasses.replace(CONFIG, **OF_A_ROW["merged"])
    params = drawn.parameters(config)
    eval_step = jax.jit(perplexity.make_eval_step(config, T))
    batch = batch_of(0).replace(
        segment_ids_BT=jnp.ones((B, T), jnp.int32),
        weights_BT=jnp.ones((B, T)),
        labels_BT=jnp.tile(jnp.arange(T), (B, 1)),
    )
    nats_BN, tokens_BN, _ = eval_step(params, batch)
    np.testing.assert_array_equal(tokens_BN, np.tile(np.arange(T) >= 4, (B, 1)))
    for at in range(T):
        changed = batch.replace(tokens_BT=batch.tokens_BT.at[:, at].add(1) % 16)
        moved_N = (eval_step(params, changed)[0] != nats_BN).any(axis=0)
        assert not moved_N[:at].any() and moved_N[max(at, 4) :].any()


def test_nats_are_added_row_by_row_and_tokens_counted_as_integers(params):
    batch = batch_of(0)
    nats_BN, tokens_BN, _ = jax.jit(perplexity.make_eval_step(CONFIG, 3))(params, batch)
    assert nats_BN.shape == tokens_BN.shape == (B, 3)
    np.testing.assert_array_equal(tokens_BN, [[12, 0, 0], [0, 7, 0], [0, 0, 0], [0, 0, 12]])


def test_a_thousand_batches_of_four_million_tokens_lose_nothing():
    """What a step returns for them is added in float64 and int64."""
    sums = np.full((1024, 1), 4096 * 2.3, np.float32), np.full((1024, 1), 4096, np.int32)
    router = {"tokens_per_expert_E": np.array([[2**22]], np.int32)}
    found = perplexity.evaluate(lambda *_: (*sums, router), {}, range(1000), {"en": 1.0}).loss()
    assert found.loss == pytest.approx(2.3, rel=1e-7)
    assert found.router["tokens_per_expert_E"] == 1000 * 2**22


def test_an_interval_is_that_of_the_mean_of_rows_and_rows_of_padding_do_not_count():
    """For many rows of equal length it is the mean and 1.96 standard errors to each side."""
    rng = np.random.default_rng(0)
    nats_RN, tokens_RN = rng.normal(32, 8, (400, 2)), np.full((400, 2), 16)
    padding = np.zeros((100, 2))
    rows = np.vstack([nats_RN, padding]), np.vstack([tokens_RN, padding.astype(int)])
    step = iter([(*rows, None)])
    sums = perplexity.evaluate(lambda *_: next(step), {}, [None], {"en": 1.0, "ja": 2.0})
    assert sums.loss().held_out_tokens == 400 * 32
    assert sums.of_labels("ja").router is None
    found = sums.of_labels("ja").intervals()
    mean, error = nats_RN[:, 1].mean() / 16, nats_RN[:, 1].std() / 20 / 16
    expected = np.array([mean - 1.96 * error, mean + 1.96 * error])
    np.testing.assert_allclose(found["loss"], expected, atol=error / 4)
    np.testing.assert_allclose(found["bits_per_byte"], np.array(found["loss"]) / np.log(2) / 2)
    assert np.ptp(sums.intervals()["loss"]) < np.ptp(found["loss"])


def test_greedy_continuation_is_the_likeliest_token_again_and_again(params):
    prompts = [np.array([1, 2, 3]), np.array([4, 5, 6, 7, 8])]
    found = generate.generate(params, CONFIG, prompts, num_tokens=4, key=jax.random.key(0))
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in continuation:
            padded = np.zeros((1, 9), np.int32)  # one shape, one compilation
            padded[0, : len(ids)] = ids
            logits_BTV = jax.jit(model.apply, static_argnums=2)(params, padded, CONFIG).logits_BTV
            assert token == np.argmax(logits_BTV[0, len(ids) - 1])
            ids.append(int(token))


def test_a_label_of_empty_documents_has_a_loss_and_no_bits_per_byte():
    """Its only tokens are ends."""
    nats_RN, tokens_RN = np.array([[8.0, 3.0]]), np.array([[4, 2]])
    sums = perplexity.Sums(nats_RN, tokens_RN, {"en": 2.0, "und": 0.0}, None)
    found = sums.loss()
    assert found.bits_per_byte == pytest.approx(11 / np.log(2) / 8)
    assert found.per_language["und"]["loss"] == 1.5
    assert np.isnan(found.per_language["und"]["bits_per_byte"])
