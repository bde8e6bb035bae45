"""Which upcycling recipe is best, and does any of them beat training on?

    python scripts/sweep.py --config=configs/experiments/bench/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/bench/cpu.py

Every recipe that starts from dense parents, with three seeds, each of which has a parent of its
own (0.71 M parameters, 1.0 M tokens). Controls: an MoE from scratch and the parent trained further,
each for as many tokens as an arm, and each for as many FLOPs (those of the parents counted for the
MoE from scratch). All arms train on 1.0 M tokens. Where a recipe allows it, they have as many
parameters and active parameters as the naive one (3.8 M, 1.15 M); the table shows the FLOPs of
each. The losses are those of the test split of the embedded text, which nothing was chosen by.
Hardware and time: 2 CPU cores, about 1.5 hours. Results: docs/results.md.

A new recipe of `upcycle/recipes.py` is an arm of its own; `NEEDS` has what one needs besides.
"""

import dataclasses

from moe_jax import config as configs
from moe_jax.experiments import study
from moe_jax.model.presets import PRESETS
from moe_jax.sweep import arms
from moe_jax.training import flops
from moe_jax.upcycle.recipes import DENSE, RECIPES

STEPS, LENGTH, WIDTH = 1000, 128, 288
PARENT, ARMS, BRANCHES = 0, 10, (20, 30)  # seeds: arms read the text in another order
MOE = {
    "model.num_experts": 8,
    "model.num_experts_per_tok": 2,
    "balance.load_balancing_coefficient": 0.04,  # Drop-Upcycling's 0.02, which is not divided by k
}
# Shards of a quarter of the parent's width: as many parameters and active parameters as MOE.
SHARDS = {
    "model.num_experts": 32,
    "model.num_experts_per_tok": 8,
    "model.moe_intermediate_size": WIDTH // 4,
}
NO_SOFTMAX_LOSS = {"balance.load_balancing_coefficient": 0.0}
EXACT = {"init.upcycle.scaling": "exact"}  # the paper's scaling is for squared ReLU
NEEDS = {
    # Attention experts, all of which are computed.
    "bam": {"model.num_attention_experts": 2},
    # A token gets each shard at most once: the active parameters are those of the parent.
    "divmoe": {
        "model.num_experts_per_tok": 4,
        "model.router": "group_topk",
        "model.num_expert_groups": 4,
    },
    # The experts are the parent's feed-forward in four parts, of which a token gets two.
    "llama_moe": {
        "model.num_experts": 4,
        "model.num_experts_per_tok": 2,
        "model.router": "noisy_topk_mlp",
        "init.upcycle.router": "torch_linear",
        "balance.importance_coefficient": 0.01,
        "balance.over_layers": "sum",
        **NO_SOFTMAX_LOSS,
    },
    # The shared expert is the second active one, and only experts and routers are trained.
    "moe_ct": {
        "model.num_experts_per_tok": 1,
        "model.norm_topk_prob": False,
        "model.shared_expert_intermediate_size": WIDTH,
        "optimizer.frozen": r"^(?!.*moe/(experts|router))",
    },
}
EUROPEAN = ("en-us", "de", "nl", "fr", "es", "it", "pt-br", "pl", "cs", "hu")
OTHERS = ("ru", "fi", "el", "tr", "ja", "ko", "zh-cn", "vi", "id")


def get_config():
    config = configs.default()
    config.seed = PARENT
    config.model.preset = "quickstart"
    config.model.intermediate_size = WIDTH
    config.data.source = "tfds:lo_parallel19_sealed"
    config.data.sequence_length = LENGTH
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 40
    config.training.num_steps = STEPS
    config.training.batch_size = 8
    config.training.log_every = 25
    config.training.log_to = ()
    config.evaluation.every_steps = 125
    config.evaluation.batch_size = 64
    config.evaluation.max_batches = 4
    config.evaluation.final_max_batches = 4
    config.evaluation.test_split = True
    config.checkpoint.every_steps = STEPS
    config.checkpoint.keep = 1
    return config


def of_dense_parents():
    return {name: row for name, row in RECIPES.items() if row.takes == DENSE}


def get_sweep():
    arm = {"seed": ARMS, "optimizer.learning_rate": 2.7e-3}  # 2/3 of the parent's, as in the paper
    languages = {"european": EUROPEAN, "others": OTHERS}
    parents = {"dense": {}}
    for seed, (name, labels) in zip(BRANCHES, languages.items(), strict=True):
        parents[name] = {
            **arm,
            "seed": seed,
            "init.source": "@dense",
            "training.num_steps": STEPS // 2,
            "data.mixture": {"by_label": True, "shares": tuple((label, 1.0) for label in labels)},
        }
    recipes = {
        name: {
            **arm,
            **MOE,
            "init.source": "@european,@others" if row.several else "@dense",
            "init.upcycle.recipe": name,
            **(SHARDS if row.cut else {}),
            **(EXACT if "scaling" in row.defaults else {}),
            **NEEDS.get(name, {}),
        }
        for name, row in of_dense_parents().items()
    }
    dense = dataclasses.replace(PRESETS["quickstart"], intermediate_size=WIDTH)
    moe = dense.to_moe(num_experts=8, num_experts_per_tok=2)
    ratio = flops.model_flops(moe, LENGTH) / flops.model_flops(dense, LENGTH)
    controls = {
        "dense_continued": {**arm, "init.source": "@dense"},
        "dense_same_flops": {
            **arm,
            "init.source": "@dense",
            "training.num_steps": round(STEPS * ratio),
        },
        # A model from scratch has its parent's learning rate, not two thirds of it.
        "scratch": {"seed": ARMS, **MOE},
        "scratch_same_flops": {
            "seed": ARMS,
            **MOE,
            "training.num_steps": round(STEPS * (1 + 1 / ratio)),
        },
    }
    return arms.seeds(arms.named({**parents, **controls, **recipes}), 3)


def get_study():
    names = list(of_dense_parents())
    others = [name for name in names if name != "naive"]
    controls = ("dense_continued", "dense_same_flops", "scratch", "scratch_same_flops")
    return study.Study(
        questions=(
            study.Question(
                "Does a recipe end below the parent trained further, at the naive arm's FLOPs?",
                study.against(names, "dense_same_flops"),
            ),
            study.Question(
                "Does a recipe end below naive upcycling?", study.against(others, "naive")
            ),
            study.Question(
                "Does naive upcycling end below the controls?",
                tuple(study.minus("naive", control) for control in controls),
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
