"""The arms and the questions of the bench of upcycling methods, for a config of any size.

A recipe of `upcycle/recipes.py` that starts from dense parents is an arm of its own. `NEEDS` has
what one needs besides; a new recipe that needs nothing else takes no line here.
"""

from typing import Any

from moe_jax.experiments import study
from moe_jax.model.config import ModelConfig
from moe_jax.training import flops
from moe_jax.upcycle.recipes import DENSE, RECIPES, Recipe

Overrides = dict[str, Any]
MOE = {
    "model.num_experts": 8,
    "model.num_experts_per_tok": 2,
    "balance.load_balancing_coefficient": 0.04,  # Drop-Upcycling's 0.02, which is not divided by k
}
GRANULARITY = 4
# Shards of the parent's feed-forward: as many parameters and active parameters as MOE.
SHARDS = {"model.num_experts": 8 * GRANULARITY, "model.num_experts_per_tok": 2 * GRANULARITY}
EXACT = {"init.upcycle.scaling": "exact"}  # the paper's scaling is for squared ReLU
NEEDS: dict[str, Overrides] = {
    # Attention experts, all of which are computed.
    "bam": {"model.num_attention_experts": 2},
    # A token gets each shard at most once: the active parameters are those of the parent.
    "divmoe": {
        "model.num_experts_per_tok": GRANULARITY,
        "model.router": "group_topk",
        "model.num_expert_groups": GRANULARITY,
    },
    # The experts are the parent's feed-forward in parts, half of which a token gets.
    "llama_moe": {
        "model.num_experts": GRANULARITY,
        "model.num_experts_per_tok": GRANULARITY // 2,
        "model.router": "noisy_topk_mlp",
        "init.upcycle.router": "torch_linear",
        "balance.load_balancing_coefficient": 0.0,
        "balance.importance_coefficient": 0.01,
        "balance.over_layers": "sum",
    },
    # The shared expert is the second active one, and only experts and routers are trained.
    "moe_ct": {
        "model.num_experts_per_tok": 1,
        "model.norm_topk_prob": False,
        "optimizer.frozen": r"^(?!.*moe/(experts|router))",
    },
}


def of_dense_parents() -> dict[str, Recipe]:
    """The recipes of the bench."""
    return {name: row for name, row in RECIPES.items() if row.takes == DENSE}


def recipes(arm: Overrides, width: int, *, one: str, several: str) -> dict[str, Overrides]:
    """An arm for each recipe.

    Args: arm: overrides of all of them. width: of the parent's feed-forward. one, several: the
      values of `init.source` for recipes that take one parent, or several.
    """
    return {
        name: {
            **arm,
            **MOE,
            "init.source": several if row.several else one,
            "init.upcycle.recipe": name,
            **({**SHARDS, "model.moe_intermediate_size": width // GRANULARITY} if row.cut else {}),
            **(EXACT if "scaling" in row.defaults else {}),
            **({"model.shared_expert_intermediate_size": width} if row.shared else {}),
            **NEEDS.get(name, {}),
        }
        for name, row in of_dense_parents().items()
    }


def flops_ratio(dense: ModelConfig, length: int) -> float:
    """The model FLOPs of a step of the naive arm, relative to one of its dense parent."""
    sparse = dense.to_moe(num_experts=8, num_experts_per_tok=2)
    return flops.model_flops(sparse, length) / flops.model_flops(dense, length)


def controls(
    arm: Overrides,
    scratch: Overrides,
    dense: ModelConfig,
    *,
    one: str,
    steps: int,
    branches: int,
    length: int,
) -> dict[str, Overrides]:
    """The dense parent trained further, and an MoE from scratch: each for as many tokens as an arm,
    and for as many FLOPs as the naive one, those of its parent counted for the MoE from scratch. A
    third dense run has the FLOPs of an arm with several parents, those of its branches counted.

    Args: arm, scratch: overrides of runs from a parent and from scratch. dense: the parent's model.
      steps: of an arm and of the parent. branches: the steps of all branches together. length: of a
      row, in tokens.
    """
    ratio = flops_ratio(dense, length)
    continued, scratch = {**arm, "init.source": one}, {**scratch, **MOE}
    further = round(steps * ratio)
    return {
        "dense_continued": continued,
        "dense_same_flops": {**continued, "training.num_steps": further},
        "dense_branch_flops": {**continued, "training.num_steps": further + branches},
        "scratch": scratch,
        "scratch_same_flops": {**scratch, "training.num_steps": round(steps * (1 + 1 / ratio))},
    }


def questions() -> study.Study:
    """The bench's questions about these arms."""
    names = list(of_dense_parents())
    others = [name for name in names if name != "naive"]
    several = [name for name, row in of_dense_parents().items() if row.several]
    against = ("dense_continued", "dense_same_flops", "scratch", "scratch_same_flops")
    return study.Study(
        questions=(
            study.Question(
                "Does a recipe end below the parent trained further, for as many tokens?",
                study.against(names, "dense_continued"),
            ),
            study.Question(
                "Does a recipe end below the parent trained further, at the naive arm's FLOPs?",
                study.against(names, "dense_same_flops"),
            ),
            study.Question(
                "Does a recipe with several parents end below the parent trained further, at these "
                "FLOPs and those of the branches?",
                study.against(several, "dense_branch_flops"),
            ),
            study.Question(
                "Does a recipe end below naive upcycling?", study.against(others, "naive")
            ),
            study.Question(
                "Does naive upcycling end below the controls?",
                tuple(study.minus("naive", control) for control in against),
            ),
        ),
        control="dense_same_flops",
        crossings=(
            ("naive", "dense_same_flops"),
            ("naive", "scratch_same_flops"),
            ("drop", "scratch_same_flops"),
            ("drop", "naive"),
        ),
    )
