"""How much should Drop-Upcycling redraw, and do its released code and its router matter?

    python scripts/sweep.py --config=configs/experiments/drop/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/drop/cpu.py

Drop-Upcycling (Nakamura et al., arXiv 2502.19261) with r = 0 (naive), 0.1, 0.25, 0.5, 0.75 and 1;
with r = 0.5 also as in its released code, which draws other neurons for each matrix and permutes
them, as in that code without the permutation, and with other initial routers. The arms, the parents
and the three seeds are those of configs/experiments/bench/cpu.py: in the same workdir, the runs
that both files have are executed once. Hardware: 2 CPU cores.

The hours that it took, and its results, are in docs/results.md.
"""

from moe_jax.experiments import cpu, study
from moe_jax.sweep import arms

RECIPE, RATIO, SHARING = (f"init.upcycle.{name}" for name in ("recipe", "ratio", "index_sharing"))
DROP = {RECIPE: "drop"}
NAMED = {
    "naive": {RECIPE: "naive"},  # r = 0
    **{f"drop_{r}": {**DROP, RATIO: r} for r in (0.1, 0.25)},
    "drop": DROP,  # r = 0.5
    **{f"drop_{r}": {**DROP, RATIO: r} for r in (0.75, 1.0)},
    "drop_per_matrix": {**DROP, SHARING: "per_matrix"},
    "drop_released": {**DROP, SHARING: "per_matrix", "init.upcycle.permute_neurons": True},
    **{
        f"drop_router_{name}": {**DROP, "init.upcycle.router": name}
        for name in ("centred_uniform", "torch_linear")
    },
}
CONCLUSION = """
Three seeds do not show that redrawing any share of the neurons ends below naive upcycling. With
r = 0.5 and 0.75 the loss is lower in each seed, by 0.011 and 0.014 on average, and with r = 1 it is
higher by 0.021, but no p is below 0.05 when it is corrected for the five tests. That the means are
in the paper's order (r = 0.5 below naive, r = 1 worst) is no proof of it.

What the share does change is how alike the experts are. It also costs something at the start: with
r = 0.1 to 0.75, each seed begins above naive and is below it from 0.31 to 0.86 M tokens on; with
r = 1 it never is.

The released code, with or without its permutation of neurons, cannot be told from the paper's text
(differences of at most 0.004), and the other initial routers cannot be told from the default one
(at most 0.012).
"""


get_config = cpu.config


def get_sweep():
    arm = {
        "seed": cpu.ARMS,
        "init.source": "@dense",
        "optimizer.learning_rate": 2.7e-3,
        "model.num_experts": 8,
        "model.num_experts_per_tok": 2,
        "balance.load_balancing_coefficient": 0.04,
    }
    runs = arms.chain(arms.named({"dense": {}}), arms.product(arm, arms.named(NAMED)))
    return arms.seeds(runs, 3)


def get_study():
    ratios = ["drop_0.1", "drop_0.25", "drop", "drop_0.75", "drop_1.0"]
    code = ["drop_per_matrix", "drop_released"]
    routers = ["drop_router_centred_uniform", "drop_router_torch_linear"]
    return study.Study(
        questions=(
            study.Question(
                "Which share of the neurons should be redrawn? (r of drop is 0.5, of naive 0)",
                study.against(ratios, "naive"),
            ),
            study.Question(
                "Does the released code end elsewhere than the paper's text?",
                study.against(code, "drop"),
            ),
            study.Question("Does the initial router matter?", study.against(routers, "drop")),
            study.Question(
                "How alike do the experts stay?",
                study.against(ratios, "naive"),
                "expert_similarity",
            ),
        ),
        crossings=tuple((name, "naive") for name in ratios),
        conclusion=CONCLUSION,
    )
