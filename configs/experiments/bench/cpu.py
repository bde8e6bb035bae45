"""Which upcycling recipe is best, and does any end below its parent trained further?

    python scripts/sweep.py --config=configs/experiments/bench/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/bench/cpu.py

Every recipe that starts from dense parents, with three seeds, each of which has a parent of its own
(0.71 M parameters, 1.0 M tokens). Controls: an MoE from scratch and the parent trained further,
each for as many tokens as an arm, and each for as many FLOPs (those of the parents counted for the
MoE from scratch; a third dense run also has those of the branches). All arms train on 1.0 M tokens.
Where a recipe allows it, they have as many parameters and active parameters as the naive one (3.8
M, 1.15 M); the table shows the FLOPs of each. The losses are those of the test split of the
embedded text, which nothing was chosen by. Hardware: 2 CPU cores.

A new recipe of `upcycle/recipes.py` is an arm of its own; moe_jax/experiments/bench.py has what the
recipes need besides.

The hours that it took, and its results, are in docs/results.md.
"""

import dataclasses

from moe_jax.experiments import bench, cpu
from moe_jax.sweep import arms

# Parents for the recipes that take several: the dense one, trained further on some languages.
BRANCHES = {
    "european": (20, ("en-us", "de", "nl", "fr", "es", "it", "pt-br", "pl", "cs", "hu")),
    "others": (30, ("ru", "fi", "el", "tr", "ja", "ko", "zh-cn", "vi", "id")),
}
BRANCH_STEPS = cpu.STEPS // 2
CONCLUSION = """
At this size no recipe beats the dense parent trained further with as many FLOPs. Those from one
parent end above it by 0.052 (drop) or more; of these, LLaMA-MoE has fewer FLOPs than the control.
Those from several parents cost more: with the FLOPs of their branches, the dense parent ends below
them by 0.081 (bam) or more. A comparison that forgets the branches says the opposite, and puts bam
0.144 below the dense parent.

At as many tokens, ten of the twelve recipes end below the parent trained further, naive upcycling
by 0.120. That also ends 0.201 below an MoE from scratch that has the FLOPs of the parent too.

None of the recipes from one parent ends below naive upcycling with a corrected p under 0.05. The
nearest are virtual_group+drop (0.009 lower, 0.053 corrected) and drop (0.011 lower). LLaMA-MoE and
MoE-CT end above naive, but are made for other purposes: LLaMA-MoE for 0.49 M active parameters of
the parent's 0.71 M, MoE-CT for a model whose parent's parameters stay as they are.

Why the dense model is ahead: with one and a half tokens per parameter these parents are far from
converged, so that another token is worth more than another parameter. Those of the papers saw
hundreds of tokens per parameter; this bench does not refute them.
"""


get_config = cpu.config


def get_sweep():
    # Runs from a parent have 2/3 of its learning rate, as in Drop-Upcycling's paper.
    arm = {"seed": cpu.ARMS, "optimizer.learning_rate": 2.7e-3}
    scratch = {"seed": cpu.ARMS}
    branches = {
        name: {
            **arm,
            "seed": seed,
            "init.source": "@dense",
            "training.num_steps": BRANCH_STEPS,
            "data.mixture": {"by_label": True, "shares": tuple((label, 1.0) for label in labels)},
        }
        for name, (seed, labels) in BRANCHES.items()
    }
    sizes = {"steps": cpu.STEPS, "branches": len(BRANCHES) * BRANCH_STEPS, "length": cpu.LENGTH}
    controls = bench.controls(arm, scratch, cpu.DENSE, one="@dense", **sizes)
    recipes = bench.recipes(arm, cpu.WIDTH, one="@dense", several="@european,@others")
    return arms.seeds(arms.named({"dense": {}, **branches, **controls, **recipes}), 3)


def get_study():
    return dataclasses.replace(bench.questions(), conclusion=CONCLUSION)
