"""Which upcycling recipe is best, and does any of them beat training on?

    python scripts/sweep.py --config=configs/experiments/bench/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/bench/cpu.py

Every recipe that starts from dense parents, with three seeds, each of which has a parent of its own
(0.71 M parameters, 1.0 M tokens). Controls: an MoE from scratch and the parent trained further,
each for as many tokens as an arm, and each for as many FLOPs (those of the parents counted for the
MoE from scratch). All arms train on 1.0 M tokens. Where a recipe allows it, they have as many
parameters and active parameters as the naive one (3.8 M, 1.15 M); the table shows the FLOPs of
each. The losses are those of the test split of the embedded text, which nothing was chosen by.
Hardware: 2 CPU cores. The hours that it took, and its results, are in docs/results.md.

A new recipe of `upcycle/recipes.py` is an arm of its own; moe_jax/experiments/bench.py has what the
recipes need besides.
"""

import dataclasses

from moe_jax import config as configs
from moe_jax.experiments import bench
from moe_jax.model.presets import PRESETS
from moe_jax.sweep import arms

STEPS, LENGTH, WIDTH = 1000, 128, 288
PARENT, ARMS = 0, 10  # seeds: arms read the text in another order
# Parents for the recipes that take several: the dense one, trained further on some languages.
BRANCHES = {
    "european": (20, ("en-us", "de", "nl", "fr", "es", "it", "pt-br", "pl", "cs", "hu")),
    "others": (30, ("ru", "fi", "el", "tr", "ja", "ko", "zh-cn", "vi", "id")),
}


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


def get_sweep():
    arm = {"seed": ARMS, "optimizer.learning_rate": 2.7e-3}  # 2/3 of the parent's, as in the paper
    scratch = {"seed": ARMS}  # the parent's learning rate
    dense = dataclasses.replace(PRESETS["quickstart"], intermediate_size=WIDTH)
    branches = {
        name: {
            **arm,
            "seed": seed,
            "init.source": "@dense",
            "training.num_steps": STEPS // 2,
            "data.mixture": {"by_label": True, "shares": tuple((label, 1.0) for label in labels)},
        }
        for name, (seed, labels) in BRANCHES.items()
    }
    controls = bench.controls(arm, scratch, dense, one="@dense", steps=STEPS, length=LENGTH)
    recipes = bench.recipes(arm, WIDTH, one="@dense", several="@european,@others")
    return arms.seeds(arms.named({"dense": {}, **branches, **controls, **recipes}), 3)


def get_study():
    return bench.questions()
