"""Do virtual groups gain from granularity, and from starting at the parent's function?

    python scripts/sweep.py --config=configs/experiments/groups/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/groups/cpu.py

Virtual-group upcycling (He et al., arXiv 2410.07524) to experts of a half, a quarter and an eighth
of the parent's width, with as many parameters and active parameters as 8 experts of its width,
top-2 (naive). With a quarter, also with what keeps the parent's function at step 0 left out: the
scale of the shards, weights that sum to one, one router column for a group. The parents and the
three seeds are those of configs/experiments/bench/cpu.py: in the same workdir, the runs that both
files have are executed once. Hardware: 2 CPU cores.

The hours that it took, and its results, are in docs/results.md.
"""

from moe_jax.experiments import cpu, study
from moe_jax.sweep import arms

RECIPE, SCALING = "init.upcycle.recipe", "init.upcycle.scaling"


def shards(granularity):
    return {
        RECIPE: "virtual_group",
        SCALING: "exact",
        "model.num_experts": 8 * granularity,
        "model.num_experts_per_tok": 2 * granularity,
        "model.moe_intermediate_size": cpu.WIDTH // granularity,
    }


WHOLE = {RECIPE: "naive", "model.num_experts": 8, "model.num_experts_per_tok": 2}
NAMED = {
    "naive": WHOLE,
    "halves": shards(2),
    "quarters": shards(4),
    "eighths": shards(8),
    "quarters_unscaled": {**shards(4), SCALING: "none"},
    "quarters_plain_softmax": {**shards(4), "model.norm_topk_prob": False},
    "quarters_normal_router": {**shards(4), "init.upcycle.router": "normal"},
}
CONCLUSION = """
No finer experts are shown to end lower at this size. Those of a half and of a quarter of the
parent's width are not shown to differ from naive upcycling, and their intervals exclude a gain of
more than 0.015 bits per byte; those of an eighth end 0.027 higher, with as many parameters and
nearly as many FLOPs. The paper's best setting is experts of an eighth, so its gain is not
reproduced here.

A start at the parent's function does not decide the end. Without the scale of the shards, a model
starts 0.492 above its parent and ends 0.020 below the scaled one. With weights that do not sum to
one, it starts only 0.011 above, and ends 0.055 above. With a router column for each shard, it
starts 0.044 above, and no difference is shown at the end. So what a change does to the loss of step
0 says little about a run of a million tokens. The paper found the scale to help, and weights that
do not sum to one to be better than those that do: both come out the other way here.
"""


get_config = cpu.config


def get_sweep():
    arm = {
        "seed": cpu.ARMS,
        "init.source": "@dense",
        "optimizer.learning_rate": 2.7e-3,
        "balance.load_balancing_coefficient": 0.04,
    }
    runs = arms.chain(arms.named({"dense": {}}), arms.product(arm, arms.named(NAMED)))
    return arms.seeds(runs, 3)


def get_study():
    finer = study.against(["halves", "quarters", "eighths"], "naive")
    equal = study.against([name for name in NAMED if name.startswith("quarters_")], "quarters")
    return study.Study(
        questions=(
            study.Question("Do finer experts end lower?", finer),
            study.Question("Where does a start at another function end?", equal),
            study.Question("How far above the parent's loss was that start?", equal, "start"),
        ),
        conclusion=CONCLUSION,
    )
