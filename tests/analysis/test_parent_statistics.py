"""Statistics of a parent against their definitions, and the script that collects them."""

import argparse
import dataclasses
import functools
import gzip
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import hf, model, upcycle
from moe_jax.analysis import parent_statistics
from moe_jax.commands import collect_statistics
from moe_jax.commands import upcycle as upcycle_command
from moe_jax.data import tokenizers
from moe_jax.upcycle import plan
from tests import drawn

DENSE = model.ModelConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    remat="none",
    model_type="llama",
)
MIXTURE = DENSE.to_moe(num_experts=4, num_experts_per_tok=2)
TOKENS = jax.random.randint(jax.random.key(0), (2, 2, 32), 0, 300)


params_of = functools.cache(drawn.parameters)


def test_statistics_of_a_mixture_are_those_of_their_definitions():
    params = params_of(MIXTURE)
    found = parent_statistics.of_mixture(params, MIXTURE, TOKENS)
    routers = jax.jit(lambda params, tokens: model.apply(params, tokens, MIXTURE).router)
    stats = [routers(params, tokens) for tokens in TOKENS]
    load_LE = sum(np.asarray(s.tokens_per_expert_E)[:, 0] for s in stats)
    np.testing.assert_array_equal(found["load"], load_LE)

    def loss(params, tokens_BT):
        logits = model.apply(params, tokens_BT[:, :-1], MIXTURE).logits_BTV
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens_BT[:, 1:, None], axis=-1)
        return -jnp.mean(picked)

    utility_LE, gradient = 0, jax.jit(jax.grad(loss))
    for tokens_BT in TOKENS:
        experts = gradient(params, tokens_BT)["blocks"]["0"]["moe"]["experts"]
        utility_LE += sum(jnp.sum(g**2, axis=(2, 3)) for g in experts.values())
    np.testing.assert_allclose(found["utility"], utility_LE, rtol=1e-3)
    similarity = found["similarity"]
    np.testing.assert_allclose(np.diagonal(similarity, axis1=1, axis2=2), 1, rtol=1e-5)
    assert (similarity < 0.999).sum() == 2 * 4 * 3 and (similarity > 0).all()


def test_cka_is_one_for_a_rotation_and_a_scale_and_as_defined_between_others():
    config = dataclasses.replace(MIXTURE, num_experts=3)
    ffn = {n: w[0, :3] for n, w in params_of(MIXTURE)["blocks"]["0"]["moe"]["experts"].items()}
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    ffn["down"] = jnp.stack([ffn["down"][0], 3 * ffn["down"][0] @ turned, ffn["down"][2]])
    ffn = {n: jnp.stack([w[0], w[0] if n != "down" else w[1], w[2]]) for n, w in ffn.items()}
    x_MD = jax.random.normal(jax.random.key(2), (64, 16))
    got = parent_statistics.cka_of_experts(x_MD, ffn, config)
    np.testing.assert_allclose(got[0, 1], 1, rtol=1e-4)
    y = [
        np.asarray((jax.nn.silu(x_MD @ ffn["gate"][e]) * (x_MD @ ffn["up"][e])) @ ffn["down"][e])
        for e in (0, 2)
    ]
    a, b = (v - v.mean(axis=0) for v in y)
    norm = np.linalg.norm
    want = norm(a.T @ b) ** 2 / (norm(a.T @ a) * norm(b.T @ b))
    np.testing.assert_allclose(got[0, 2], want, rtol=1e-3)


def test_balanced_clusters_are_of_equal_size_and_find_what_is_apart():
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centres[:, None] + np.random.default_rng(0).normal(size=(3, 8, 2))).reshape(24, 2)
    order = np.random.default_rng(1).permutation(24)
    groups = parent_statistics.balanced_clusters(points[order], 3, seed=0)
    found = {frozenset(order[group] // 8) for group in groups}
    assert groups.shape == (3, 8) and found == {frozenset({0}), frozenset({1}), frozenset({2})}


def test_the_importance_of_a_neuron_is_the_sum_over_tokens_of_what_silencing_it_changes():
    """By hand: relu2 makes h = (1, 4, 0) and (4, 0, 1) of two tokens; opposite terms do not cancel.

    dL/dh is the gradient of the outputs times the rows (1, 1), (0, 2), (3, 0) of `down`.
    """
    config = dataclasses.replace(DENSE, gated_mlp=False, hidden_act="relu2")
    ffn = {"up": np.array([[1.0, 2, -1], [2, -1, 1]]), "down": np.array([[1.0, 1], [0, 2], [3, 0]])}
    x_MD, gradient_MD = np.eye(2), np.array([[1.0, 2], [-3, 1]])
    # Token 0: dL/dh = (3, 4, 3); token 1: (-2, 2, -9).
    found = parent_statistics.neuron_importance(x_MD, gradient_MD, ffn, config)
    np.testing.assert_allclose(found, [1 * 3 + 4 * 2, 4 * 4 + 0, 0 + 1 * 9])


def test_importance_is_that_of_the_loss_of_the_whole_model():
    """One token to a row: |h · dL/dh| is then |sum over outputs of down · dL/ddown|."""
    params, config = params_of(DENSE), DENSE
    rows_BT = TOKENS.reshape(-1, 2)[:3]

    def loss(params, row_T):
        logits_V = model.apply(params, row_T[None, :1], config).logits_BTV[0, 0]
        return -jax.nn.log_softmax(logits_V)[row_T[1]]

    want_LF, down_LFD = 0, params["blocks"]["0"]["mlp"]["down"]
    gradient = jax.jit(jax.grad(loss))
    for row_T in rows_BT:
        gradient_LFD = gradient(params, row_T)["blocks"]["0"]["mlp"]["down"]
        want_LF += jnp.abs(jnp.sum(down_LFD * gradient_LFD, axis=-1)) / len(rows_BT)
    found_LF = parent_statistics._importance(params, rows_BT, config)
    np.testing.assert_allclose(found_LF, want_LF, rtol=1e-4, atol=1e-7)
    best = parent_statistics.of_dense(
        params, config, rows_BT[None], num_experts=1, neurons="gradient", num_neurons=5
    )["neurons"]
    np.testing.assert_array_equal(best[:, 0], np.sort(np.argsort(-want_LF)[:, :5]))


def test_sums_over_bfloat16_are_exact():
    """In bfloat16 256 + 1 is 256, so that a sum of ones would stop there."""
    ones = {"up": jnp.ones((1, 300, 2), jnp.bfloat16), "down": jnp.ones((1, 2, 300), jnp.bfloat16)}
    np.testing.assert_array_equal(parent_statistics.expert_utility(ones), [1200])


@pytest.mark.parametrize("neurons", ["weights", "activations", "gradient"])
def test_statistics_of_a_dense_model_fit_the_recipe_that_takes_them(neurons):
    tokens_NBT = TOKENS.reshape(4, 1, 32)
    found = parent_statistics.of_dense(
        params_of(DENSE), DENSE, tokens_NBT, num_experts=4, neurons=neurons
    )
    config = DENSE.to_moe(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6)
    made = plan.make(
        DENSE,
        config,
        recipe="llama_moe",
        router="centroids",
        statistics=found,
        parameters={"partition": "statistics"},
    )
    assert made.statistics["centroids"].shape == (2, 4, 16)
    for layer in range(2):
        for neurons_F in found["neurons"][layer]:
            assert len(set(neurons_F)) == 6
        if neurons != "gradient":  # which may give a neuron to several
            assert sorted(found["neurons"][layer].ravel()) == list(range(24))


LEARNED = dataclasses.replace(DENSE, position_embedding="learned", max_position_embeddings=31)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 5}, "24 neurons are not divisible by num_experts=5: 4 would be in no"),
        ({"num_neurons": 6}, "6 of the 24 neurons to each expert cannot be; give neurons='grad"),
        ({"neurons": "gradient", "num_neurons": 0}, "0 of the 24 neurons"),
        ({"neurons": "gradient"}, "a batch of text for each of 4 experts, not 2 .* use 4 batches"),
        ({"tokens_NBT": TOKENS[:, :1, :3]}, "num_experts=4 centroids cannot be of 3 tokens"),
        ({"tokens_NBT": TOKENS[..., :1]}, "rows of 1 token have no next .* length of 2 or more"),
        ({"tokens_NBT": TOKENS + 300}, "token .* is beyond the 300 of the model; is this the tok"),
        ({"config": LEARNED}, "32 tokens are beyond the model's 31 .* length of at most 31"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(changes, message):
    how = {"config": DENSE, "tokens_NBT": TOKENS, "num_experts": 4, "neurons": "weights"}
    with pytest.raises(ValueError, match=message) as error:
        parent_statistics.of_dense({}, **{**how, **changes})
    assert "\n" not in str(error.value)


def test_a_mixture_reads_no_token_beyond_its_vocabulary():
    with pytest.raises(ValueError, match="is beyond the 300 of the model"):
        parent_statistics.of_mixture({}, MIXTURE, TOKENS + 300)


def test_one_expert_of_the_most_important_neurons_merged_back_is_a_pruned_dense_model():
    """Minitron's width pruning (arXiv 2407.14679), out of the same transforms."""
    params = params_of(DENSE)
    found = parent_statistics.of_dense(
        params, DENSE, TOKENS, num_experts=1, neurons="gradient", num_neurons=18
    )
    one = DENSE.to_moe(num_experts=1, num_experts_per_tok=1, moe_intermediate_size=18)
    how = {"recipe": "llama_moe", "partition": "statistics", "statistics": found}
    single = upcycle.upcycle(params, DENSE, one, key=jax.random.key(0), **how)
    pruned = upcycle.upcycle(
        single, one, one.to_dense(), recipe="merge_back", key=jax.random.key(0)
    )
    for layer in range(2):
        kept = found["neurons"][layer, 0]
        for name, w in pruned["blocks"]["0"]["mlp"].items():
            if name != "norm":
                old = np.asarray(params["blocks"]["0"]["mlp"][name][layer])
                np.testing.assert_array_equal(
                    w[layer], np.take(old, kept, axis=int(name != "down"))
                )
    tokens_BT = TOKENS[0]
    apply = jax.jit(model.apply, static_argnums=2)
    np.testing.assert_allclose(
        apply(pruned, tokens_BT, one.to_dense()).logits_BTV,
        apply(single, tokens_BT, one).logits_BTV,
        rtol=1e-4,
        atol=1e-4,
    )


def test_what_the_script_collects_prunes_a_folder(tmp_path, monkeypatch, capsys):
    hf.save(tmp_path / "moe", MIXTURE, params_of(MIXTURE))
    text = tmp_path / "text.txt"
    text.write_text("A short text about nothing. " * 20)

    def run(command, *arguments):
        argv = [f"{command.__name__}.py", f"--source={tmp_path / 'moe'}", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        command.main()
        return capsys.readouterr().out

    size = ("--num_batches=2", "--batch_size=2", "--sequence_length=32")
    file = tmp_path / "moe.npz"
    run(
        *(collect_statistics, f"--text={text}", f"--output={file}", "--tokenizer=bytes"),
        *size,
    )
    said = run(
        *(upcycle_command, "--recipe=prune", "--num_experts=2", "--num_experts_per_tok=1"),
        *(f"--statistics={file}", f"--output={tmp_path / 'pruned'}"),
    )
    assert "weights that sum to one give the router no gradient" in said
    config, params = hf.load(tmp_path / "pruned")
    _, parent = hf.load(tmp_path / "moe")
    kept = np.sort(np.argsort(-parent_statistics.load(file)["load"][0], kind="stable")[:2])
    up = params["blocks"]["0"]["moe"]["experts"]["up"]
    np.testing.assert_array_equal(up[0], parent["blocks"]["0"]["moe"]["experts"]["up"][0, kept])
    assert config.num_experts == 2


def test_another_file_is_refused_in_one_line(tmp_path):
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    with pytest.raises(ValueError, match="holds something; known are neurons"):
        parent_statistics.load(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="no file .*none.npz; make it with scripts/collect_stat"):
        parent_statistics.load(tmp_path / "none.npz")
    for content in (b"no arrays", b"", b"PK\x03\x04cut"):
        (tmp_path / "text.npz").write_bytes(content)
        with pytest.raises(ValueError, match="is not a file of scripts/collect_statistics.py"):
            parent_statistics.load(tmp_path / "text.npz")


def test_the_text_to_collect_from_has_no_byte_order_mark_and_names_its_encoding(tmp_path):
    arguments = argparse.Namespace(
        text=str(tmp_path / "a.txt"), num_batches=1, batch_size=1, sequence_length=4, num_experts=1
    )
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    (tokens_BT,) = collect_statistics.batches_of(arguments, tokenizers.load("bytes"))
    assert tokenizers.load("bytes").decode(tokens_BT[0]) == "text"
    (tmp_path / "a.txt").write_text("text", encoding="utf-16")
    with pytest.raises(ValueError, match="a.txt is UTF-16, not UTF-8"):
        collect_statistics.batches_of(arguments, tokenizers.load("bytes"))


def test_the_text_to_collect_from_may_be_any_source(tmp_path):
    """A folder of compressed records serves as well as a file; too little text says how much."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "abc"}\n{"text": "defg"}\n')
    sizes = {"num_batches": 1, "batch_size": 1, "sequence_length": 6, "num_experts": 1}
    arguments = argparse.Namespace(text=str(tmp_path), **sizes)
    (tokens_BT,) = collect_statistics.batches_of(arguments, tokenizers.load("bytes"))
    assert tokenizers.load("bytes").decode(tokens_BT[0]) == "abcdef"
    arguments.sequence_length = 8
    with pytest.raises(ValueError, match="has 7 tokens, not the 8 of 1 batches"):
        collect_statistics.batches_of(arguments, tokenizers.load("bytes"))
