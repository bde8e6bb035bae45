"""A config becomes one Run: nothing is lost, the parts fit each other, the model is made here."""

import ast
import dataclasses
import pathlib

import pytest

from moe_jax import config as configs
from moe_jax import hf
from moe_jax.config import monitoring, sections
from moe_jax.config.section import Section
from moe_jax.model.presets import PRESETS

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
DENSE = PRESETS["quickstart"]
MOE = dataclasses.replace(DENSE, num_experts=4)


def config_of(**keys):
    config = configs.default()
    config.model.preset = "quickstart"
    config.update_from_flattened_dict({key.replace("__", "."): v for key, v in keys.items()})
    return config


def test_the_defaults_survive_being_resolved():
    config, run = config_of(), configs.resolve(config_of())
    config.data.tokenizer = "bytes"  # which an empty one is without init.source
    assert run == configs.Run(model=DENSE, data=configs.Data(tokenizer="bytes"))
    for name, section in config.to_dict().items():
        if name == "model":
            continue
        value = getattr(run, name)
        left = dataclasses.asdict(value) if isinstance(value, Section) else value
        if name == "init":
            assert left["upcycle"].pop("parameters") == {}
            section["upcycle"] = {k: v for k, v in section["upcycle"].items() if v is not None}
        assert left == section


def test_every_key_that_is_set_arrives():
    run = configs.resolve(
        config_of(
            seed=3,
            init__source="runs/dense",
            init__upcycle__recipe="drop",
            init__upcycle__ratio=0.25,
            model__num_experts=4,
            balance__load_balancing_schedule="adaptive",
            balance__adaptive__rate=0.5,
            objective__distillation__source="runs/teacher",
            objective__distillation__coefficient=0.1,
            evaluation__intervals=(("routing", 5),),
        )
    )
    assert (run.seed, run.model, run.balance.adaptive.rate) == (3, MOE, 0.5)
    assert run.init.upcycle == sections.Upcycle(recipe="drop", parameters={"ratio": 0.25})
    assert run.objective.distillation.source == "runs/teacher"
    assert run.evaluation.intervals == (("routing", 5),)


def test_a_stored_config_gives_the_run_that_it_was_stored_of(tmp_path):
    rules, prompts = (("moe/experts", 0.5), ("embed", 2)), ("one", "two")
    config = config_of(optimizer__gradient_factors=rules, evaluation__prompts=prompts)
    configs.save_json(config, tmp_path)
    run = configs.resolve(configs.load_json(tmp_path))
    assert run == configs.resolve(config)
    assert (run.optimizer.gradient_factors, run.evaluation.prompts) == (rules, prompts)
    hash((run.optimizer, run.evaluation, run.model))  # lists of JSON have become tuples


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (
            {"optimizer": sections.Optimizer(warmup_steps=6, decay_steps=5)},
            "warmup_steps=6 and decay_steps=5 exceed training.num_steps=10",
        ),
        (
            {"model": MOE, "balance": sections.Balance(bias_update_rate=0.1)},
            "needs a router with a bias, not model.router='softmax_topk'",
        ),
        (
            {
                "model": MOE,
                "balance": sections.Balance(bias_update="quantile", bias_update_rate=0.1),
            },
            "needs a router with a bias, not model.router='softmax_topk'",
        ),
        (
            {"model": MOE, "evaluation": monitoring.Evaluation(num_experts_per_tok=5)},
            "num_experts_per_tok=5 is more than the 4 experts of the model",
        ),
        (
            {"model": dataclasses.replace(MOE, num_experts_per_tok=1)},
            "gives the router no gradient of the text; "
            "use router='softmax_topk' with norm_topk_prob=False",
        ),
        (
            {"model": dataclasses.replace(MOE, dispatch="merge", merge_segment_length=256)},
            "merge_segment_length=256 does not cut rows of 256 tokens into two",
        ),
        (
            {"init": sections.Init(source="a", upcycle=sections.Upcycle(recipe="drop"))},
            "recipe='drop' makes a sparse model; set config.model.num_experts",
        ),
    ],
)
def test_sections_that_do_not_go_together_are_refused(values, complaint):
    training = sections.Training(num_steps=10)
    with pytest.raises(configs.ConfigError) as error:
        configs.Run(**{"model": DENSE, "training": training, **values})
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_rows_beyond_learned_positions_are_refused_by_everything_that_reads_a_config():
    keys = {"model__position_embedding": "learned", "model__max_position_embeddings": 32}
    configs.resolve(config_of(data__sequence_length=32, **keys))
    with pytest.raises(configs.ConfigError, match="config.data.sequence_length: rows of 33 .* 32 "):
        configs.resolve(config_of(data__sequence_length=33, **keys))


TOP_1 = {"num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("fields", "frozen"),
    [
        ({**TOP_1, "norm_topk_prob": False}, ""),
        (TOP_1, "moe/router"),
        ({**TOP_1, "num_experts": 1}, ""),
        ({**TOP_1, "dispatch": "merge", "merge_segment_length": 64}, ""),
        ({**TOP_1, "router": "forced_balance"}, ""),
    ],
    ids=str,
)
def test_top_1_is_trained_where_its_router_learns_or_is_not_to_learn(fields, frozen):
    optimizer = sections.Optimizer(frozen=frozen)
    run = configs.Run(model=dataclasses.replace(MOE, **fields), optimizer=optimizer)
    dataclasses.replace(run, evaluation=monitoring.Evaluation(num_experts_per_tok=1))


def test_a_model_of_two_experts_a_token_may_be_evaluated_with_one():
    configs.Run(model=MOE, evaluation=monitoring.Evaluation(num_experts_per_tok=1))


def test_a_recipe_that_gives_a_dense_model_needs_no_experts():
    upcycle = sections.Upcycle(recipe="merge_back")
    configs.Run(model=DENSE, init=sections.Init(source="a", upcycle=upcycle))


def test_a_changed_copy_is_checked_too():
    run = configs.Run(model=DENSE)
    with pytest.raises(configs.ConfigError, match="exceed training.num_steps=1000"):
        dataclasses.replace(run, optimizer=sections.Optimizer(warmup_steps=1001))


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (
            {"model__preset": "llama"},
            "preset='llama' is unknown: did you mean 'llama-2-7b'. Use one of",
        ),
        ({"model__preset": ""}, "config.model lacks .*vocab_size.*; set them, or config.model.pre"),
        ({"model__num_experts": 1}, "config.model.num_experts_per_tok=2 is more than num_experts"),
        ({"model__router": "no-such"}, "config.model.router='no-such' is unknown"),
    ],
)
def test_a_model_that_cannot_be_is_refused(keys, complaint):
    with pytest.raises(configs.ConfigError, match=complaint):
        configs.resolve(config_of(**keys))


def test_without_a_preset_and_sizes_the_model_is_that_of_the_folder():
    folder = GOLDEN / "llama"
    parent, _ = hf.load(folder)
    config = configs.default()
    config.init.source = str(folder)
    config.data.tokenizer = "bytes"
    assert configs.resolve(config).model == parent
    config.model.num_experts = 4
    config.init.upcycle.recipe = "drop"
    sparse = dataclasses.replace(parent, num_experts=4, model_type=None)
    assert configs.resolve(config).model == sparse


def test_no_other_room_makes_a_model_of_a_config():
    """Only `resolve`, and what reads a Hugging Face folder's config.json, call ModelConfig(**…)."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "moe_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] == "ModelConfig"
        and any(keyword.arg is None for keyword in node.keywords)
    }
    assert found == {"moe_jax/config/resolved.py", "moe_jax/hf/configs.py"}
