"""The published configs: each can be traced on 8 devices, and its model has the published size."""

import dataclasses
import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import model
from moe_jax.model.routing import RouterStats
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding
from moe_jax.training import balance, objective, optimizer, step
from moe_jax.training.state import TrainState

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def module_of(path):
    spec = importlib.util.spec_from_file_location("config_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = {
    p.relative_to(ROOT).as_posix(): p
    for p in sorted((ROOT / "configs").glob("*/*.py"))
    if p.parent.name != "sweeps"
}


def arguments_of(path):
    module = module_of(path)
    return tuple(getattr(module, "SIZES", None) or getattr(module, "LAYOUTS", ()))


SIZES = {name: arguments_of(path) for name, path in FILES.items()}
CASES = [f"{name}:{size}" if size else name for name in FILES for size in SIZES[name] or ("",)]
FIRST_OF_EACH_FILE = {f"{name}:{SIZES[name][0]}" if SIZES[name] else name for name in FILES}
TRACED = [
    case if case in FIRST_OF_EACH_FILE else pytest.param(case, marks=pytest.mark.long)
    for case in CASES
]
# The files at the quickstart's size override its arms; Llama 2 is a parent only; the recipes of
# LLM-jp v1 and v2 are not known here.
WITHOUT_CONFIG = {
    *("quickstart", "quickstart-8e", "quickstart-bam-4e", "llama-2-7b"),
    *("llm-jp-1-1.3b", "llm-jp-1-13b", "llm-jp-2-13b"),
}

# The weight of one layer's loss in the loss, as published, and over how many layers it is repeated.
# A balance loss is divided by k (1 at uniform routing) unless k is a factor here.
ALL_TOGETHER = "all layers together"
WEIGHT_OF_A_LAYER = {
    # arXiv 2502.19261 and its code, Transformers' loss: one term of all layers, not divided by k.
    "configs/drop_upcycling/moe.py": {"load_balancing_loss": (0.02 * 2, ALL_TOGETHER)},
    "configs/mixtral/8x7b.py": {"load_balancing_loss": (0.02 * 2, ALL_TOGETHER)},
    # arXiv 2406.16554: the code adds each layer's CV^2 of importance and load, 0.01 each.
    "configs/llama_moe/3_5b.py": {"importance_loss": (0.01, 32)},
    # LLM-jp's Megatron scripts; Megatron adds each router's losses to the loss.
    "configs/llm_jp/moe.py:8x1.8b": {"load_balancing_loss": (0.01, 24)},
    "configs/llm_jp/moe.py:8x13b": {"load_balancing_loss": (0.01, 40)},
    # arXiv 2409.11272, DeepSpeed: added over the sparse layers.
    "configs/lola/lola.py": {"load_balancing_loss": (0.01, 12)},
    # arXiv 2410.07524, Megatron.
    "configs/nvidia/upcycled.py": {"load_balancing_loss": (0.01, 32)},
    # arXiv 2409.02060 and megablocks: divided by the number of layers.
    "configs/olmoe/1b_7b.py": {
        "load_balancing_loss": (0.01 / 16, 16),
        "router_z_loss": (0.001 / 16, 16),
    },
    # arXiv 2406.06563, §4.2: the sum over layers of alpha times the loss; alpha is 0.01 at most.
    "configs/skywork/moe.py": {"load_balancing_loss": (0.01, 52)},
}
# LLM-jp-4's scripts by router (softmax; sigmoid with biases): Megatron's aux and z.
WEIGHT_OF_LLM_JP_4 = {"softmax_topk": 1e-2, "sigmoid_topk": 1e-4}


def weights_of(case):
    """The sizes of a file share their entry, unless each has its own."""
    if case.startswith("configs/llm_jp/v4_moe.py"):
        router = configs.resolve(configs.load(str(ROOT / case))).model.router
        aux = WEIGHT_OF_LLM_JP_4[router]
        return {"load_balancing_loss": (aux, 32), "router_z_loss": (1e-3, 32)}
    return WEIGHT_OF_A_LAYER.get(case) or WEIGHT_OF_A_LAYER.get(case.split(":")[0])


def uneven(L, E, A, layers):
    """One batch shard of 6 tokens, of which these layers send all to the first A experts."""
    even_LE, first_E = np.full((L, E), 1 / E), np.where(np.arange(E) < A, 1 / A, 0)
    share_LE = np.where(np.isin(np.arange(L), layers)[:, None], first_E, even_LE)
    load_L1E, p_L1E = 6 * A * share_LE[:, None], 6 * share_LE[:, None]
    z_L1 = np.where(np.isin(np.arange(L), layers), 6 * 5.0, 0)[:, None]
    zeros_L1 = np.zeros((L, 1))
    return RouterStats(load_L1E, p_L1E, p_L1E, load_L1E, z_L1, zeros_L1, zeros_L1 + 6, zeros_L1)


def by_hand(name, form, E, A):
    """The loss of a layer of `uneven`, less that of an even layer."""
    if name == "router_z_loss":
        return 5.0
    if name == "importance_loss":  # the squared coefficient of variation, of importance and load
        return 2 * (E / A - 1) * E / (E - 1)
    if form == "squared":
        return A * (1 / A - 1 / E) ** 2 + (E - A) / E**2
    return E / A - 1


@pytest.mark.parametrize("case", [case for case in CASES if weights_of(case)])
def test_the_loss_of_one_layer_has_its_published_weight(case):
    settings = configs.resolve(configs.load(str(ROOT / case)))
    L, E = settings.model.layer_kinds.count("moe"), settings.model.num_experts
    A = settings.model.num_experts_per_tok
    coefficients_L = balance.initial(settings.model, settings.balance).coefficients_L

    def total(layers, **others):
        return balance.router_losses(
            uneven(L, E, A, layers),
            dataclasses.replace(settings.balance, **others),
            num_experts_per_tok=A,
            num_tokens=6,
            coefficients_L=coefficients_L,
        )[0]

    losses = {name: rule for name, rule in balance.RULES.items() if rule.loss}
    for name, (weight, layers) in weights_of(case).items():
        other_terms = {rule.coefficient: 0.0 for n, rule in losses.items() if n != name}
        together = layers == ALL_TOGETHER
        assert together or layers == L
        of_one = total(range(L) if together else [1], **other_terms) - total([], **other_terms)
        loss = by_hand(name, settings.balance.load_balancing_form, E, A)
        np.testing.assert_allclose(of_one, weight * loss, rtol=1e-4)
    active = {n for n, rule in losses.items() if getattr(settings.balance, rule.coefficient)}
    assert active == set(weights_of(case))


@pytest.mark.parametrize("case", TRACED)
def test_a_config_is_valid_and_its_train_step_fits_a_mesh(case):
    settings = configs.resolve(configs.load(str(ROOT / case)))
    mesh = meshes.make(vars(settings.mesh))
    tx = optimizer.adamw(settings.optimizer, settings.training.num_steps)
    shapes = jax.eval_shape(
        lambda: TrainState.create(
            model.init(settings.model, jax.random.key(0)),
            tx,
            balance.initial(settings.model, settings.balance),
        )
    )
    state = sharding.abstract(shapes, mesh)
    on_batch = jax.NamedSharding(mesh, sharding.BATCH)
    leaf = functools.partial(jax.ShapeDtypeStruct, sharding=on_batch)
    batch = objective.batch_shapes(settings, leaf)
    with jax.set_mesh(mesh):
        train_step = step.make_train_step(settings, tx)
        new, metrics = jax.eval_shape(train_step, state, batch)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert (metrics.tokens_per_expert_LE is not None) == (settings.model.num_experts > 0)


def test_every_published_preset_has_a_valid_config_and_every_parent_one_too():
    loaded = [configs.load(str(ROOT / case)) for case in CASES]
    for config in loaded:
        configs.resolve(config)
    assert sorted({c.model.preset for c in loaded}) == sorted(set(model.PRESETS) - WITHOUT_CONFIG)
    workdirs = {f"runs/{config.model.preset}" for config in loaded}
    workdirs |= {"", "path/to/llama-2-7b", "runs/olmoe-1b-7b-sft", "runs/olmoe-1b-7b"}
    assert {config.init.source for config in loaded} <= workdirs


def test_an_upcycled_model_sees_the_text_in_another_order_than_its_parent():
    """Batch N depends on the seed: with the parent's a child would see its rows as they came."""
    loaded = [configs.load(str(ROOT / case)) for case in CASES]
    parents = [config for config in loaded if not config.init.source]
    seeds = {f"runs/{config.model.preset}": config.seed for config in parents}
    children = [config for config in loaded if config.init.source in seeds]
    assert len(children) > 5
    assert all(config.seed != seeds[config.init.source] for config in children)
    commands = re.findall(r"^python scripts/train\.py(?:\\\n|.)*", README, re.MULTILINE)
    [own] = [command for command in commands if "init.source=runs/" in command]
    assert "--config.seed=" in own


def test_drop_upcycling_decays_all_and_warms_up_from_its_least_rate():
    """The authors' moe-recipes has one group of parameters, and a warmup from min_lr = 2e-5."""
    run = configs.resolve(configs.load(f"{ROOT}/configs/drop_upcycling/moe.py"))
    schedule = optimizer.schedule(run.optimizer, run.training.num_steps)
    assert [float(schedule(s)) for s in (0, 1999)] == pytest.approx([2e-5, 2e-4])
    params = {"norm": {"scale": jnp.ones(2)}}
    tx = optimizer.adamw(run.optimizer, run.training.num_steps)
    updates, _ = tx.update({"norm": {"scale": jnp.zeros(2)}}, tx.init(params), params)
    assert (updates["norm"]["scale"] < 0).all()


@pytest.mark.parametrize("name", [name for name in FILES if SIZES[name]])
def test_an_unknown_size_is_refused_with_the_sizes(name):
    with pytest.raises(configs.ConfigError, match=re.escape(", ".join(SIZES[name]))):
        configs.load(f"{ROOT / name}:no-such")


@pytest.mark.parametrize("chips", ["0", "-8", "many"])
def test_mixtral_refuses_what_is_no_number_of_chips(chips):
    with pytest.raises(configs.ConfigError, match=f"{chips!r} is not a number of chips"):
        configs.load(f"{ROOT}/configs/mixtral/8x7b.py:{chips}")


def test_mixtral_gives_each_chip_two_sequences():
    config = configs.load(f"{ROOT}/configs/mixtral/8x7b.py:64")
    assert config.training.batch_size == 128
