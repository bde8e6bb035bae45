"""A router, a measure, an evaluator and an objective come from outside, by one registration each.

Recipes and sources are added so in tests/upcycle and tests/data.
"""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import model, stores, train
from moe_jax.analysis import measures
from moe_jax.evaluation import evaluators
from moe_jax.model import router, transformer
from moe_jax.ops import cross_entropy
from moe_jax.parallel import mesh as meshes
from moe_jax.report import figures, page
from moe_jax.sweep import plan, results
from moe_jax.training import metrics, objective
from moe_jax.training.state import Measures
from tests import tiny_runs


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    tiny = model.ModelConfig(
        vocab_size=259,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        remat="none",
    )
    config = tiny_runs.config(tmp_path_factory.mktemp("errands"), tiny)
    config.evaluation.every_steps = 1
    return config


def heated_topk(logits_ME, inputs, *, num_experts_per_tok, heat):
    """A softmax whose temperature each expert learns, beginning at `heat`."""
    heat_E = heat * jnp.exp(inputs.leaves["log_heat"])
    return router.softmax_topk(
        logits_ME / heat_E, num_experts_per_tok=num_experts_per_tok, norm_topk_prob=True
    )


def test_a_router_from_outside_is_upcycled_and_trained_on_eight_devices(
    config, tmp_path, monkeypatch
):
    """Its leaf is made, sharded and trained; its parameter comes from the config."""
    toy = router.Router(
        heated_topk,
        parameters={"heat": 1.0},
        leaves={"kernel": router.KERNEL, "log_heat": router.Leaf(lambda D, E: (E,))},
    )
    monkeypatch.setitem(router.ROUTERS, "heated_topk", toy)
    dense = config.copy_and_resolve_references()
    dense.model.num_experts = 0
    train.run(configs.resolve(dense), tmp_path / "dense")

    config = config.copy_and_resolve_references()
    config.training.num_steps = 5
    config.model.router = "heated_topk"
    config.model.router_parameters = (("heat", "warm"),)
    with pytest.raises(configs.ConfigError, match="heat='warm' must be of the type float"):
        configs.resolve(config)
    config.model.router_parameters = (("heat", 2),)
    config.init.source = str(tmp_path / "dense")
    config.init.upcycle.recipe = "naive"
    assert jax.device_count() == 8
    result = train.run(configs.resolve(config), tmp_path / "moe")
    assert result["router"] == "heated_topk"
    model_config, params = stores.load(tmp_path / "moe", meshes.make({"fsdp": 8}))
    assert model_config.router_parameters == (("heat", 2.0),)
    leaves = params["blocks"]["0"]["moe"]["router"]
    assert leaves["log_heat"].shape == (2, 4)
    assert np.all(np.asarray(leaves["log_heat"]) != 0)  # zeros at first, and trained since


def test_a_measure_from_outside_is_in_the_metrics_the_results_and_the_report(
    config, tmp_path, monkeypatch
):
    def router_entropy(sums):
        return (sums.router["entropy_sum"] / sums.router["num_tokens"]).round(4).tolist()

    toy = measures.Measure(
        "nats",
        router_entropy,
        needs=("entropy_sum", "num_tokens"),
        column=np.mean,
        panel=measures.Panel("Entropy of the routers", "nats", np.mean),
    )
    monkeypatch.setitem(measures.MEASURES, "router_entropy", toy)
    health = figures.FIGURES["router_health"]
    monkeypatch.setattr(figures, "FIGURES", {"router_health": health})  # the others take seconds
    workdir = tmp_path / "run"
    result = train.run(configs.resolve(config), workdir)
    rows = metrics.read(workdir / "metrics.jsonl")
    found = [row["router"]["router_entropy"] for row in rows]
    assert len(found) == 5  # two training rows and three evaluations
    # Probabilities of a router with small weights are nearly even.
    np.testing.assert_allclose(found, np.log(4), atol=0.05)
    assert result["router_entropy"] == found[-1]

    results.write(tmp_path, [plan.Run("run", "0", workdir, ())], {"run": results.DONE}, {})
    with open(tmp_path / "results.csv") as file:
        [line] = csv.DictReader(file)
    assert float(line["router_entropy"]) == pytest.approx(np.mean(found[-1]))
    written = page.write(tmp_path / "out", {"run": workdir}, []).read_text()
    assert "<th>router entropy</th>" in written
    record = page.read_record("run", 0, workdir)
    titles = [axes.get_title() for axes in figures.FIGURES["router_health"].draw([record]).axes]
    assert "Entropy of the routers" in titles


def test_an_evaluator_from_outside_runs_at_its_own_interval_and_at_the_end(
    config, tmp_path, monkeypatch
):
    def embedding_norm(context):
        assert context.run.model.vocab_size == 259

        def evaluate(params):
            norm = float(jnp.linalg.norm(params["embed"]["tokens"]))
            return evaluators.Evaluation({"embedding_norm": norm}, {"embedding_norm": norm})

        return evaluate

    toy = evaluators.Evaluator(embedding_norm)
    monkeypatch.setitem(evaluators.EVALUATORS, "embedding_norm", toy)
    config = config.copy_and_resolve_references()
    config.evaluation.intervals = (("embedding_norm", 2),)
    result = train.run(configs.resolve(config), tmp_path / "run")
    rows = [r for r in metrics.read(tmp_path / "run" / "metrics.jsonl") if "embedding_norm" in r]
    assert [row["step"] for row in rows] == [0, 2]
    assert rows[1]["embedding_norm"] == result["embedding_norm"] != rows[0]["embedding_norm"]


def test_an_evaluator_that_is_not_in_the_table_is_refused_before_the_run(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.evaluation.intervals = (("norms", 2),)
    with pytest.raises(configs.ConfigError, match="names 'norms'; the evaluators are held"):
        train.run(configs.resolve(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_objective_from_outside_trains_a_run_and_its_terms_are_logged(
    config, tmp_path, monkeypatch
):
    """The last token of each row alone, with the squared weights of the head as a term."""

    def last_token(context):
        rows = context.batch.tokens_BT.shape[0]

        def loss(params, batch, key):
            del key
            shared = transformer.Shared(batch.positions_BT, batch.segment_ids_BT)
            x_BTD, _ = transformer.hidden_states(params, batch.tokens_BT, shared, context.run.model)
            head_DV = transformer.unembedding(params)
            nats_BT = cross_entropy.token_losses(x_BTD, head_DV, batch.targets_BT)
            nats, squares = jnp.sum(nats_BT[:, -1]) / rows, jnp.sum(head_DV**2)
            return nats + squares, Measures(loss=nats, terms={"head_squares": squares})

        return loss

    monkeypatch.setitem(objective.OBJECTIVES, "last_token", objective.Objective(last_token))
    config = config.copy_and_resolve_references()
    config.objective.name = "last_token"
    config.optimizer.learning_rate = 1e-3
    train.run(configs.resolve(config), tmp_path / "run")
    rows = [row for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert rows[1]["head_squares"] < rows[0]["head_squares"]
    assert "router" not in rows[0]
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["objective"]["name"] == "last_token"


def test_a_misspelt_objective_is_refused_with_the_known_ones(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.objective.name = "next_tokens"
    with pytest.raises(configs.ConfigError, match="objective.name='next_tokens'.*next_token"):
        train.run(configs.resolve(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()
