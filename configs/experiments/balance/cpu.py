"""Is Drop-Upcycling's gain over naive upcycling a gain in balance?

    python scripts/sweep.py --config=configs/experiments/balance/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/balance/cpu.py

The authors of Drop-Upcycling (Nakamura et al., arXiv 2502.19261) trained all arms with a balance
loss pooled over all layers. The routing that they released has 2.5 effective experts of 8 in a
layer for naive upcycling, and 6.3 for theirs. This study trains {naive, drop} with that loss, with
a loss for each layer, with selection biases that are moved by a sign or solved from quantiles, and
with no balancing at all. All losses have the paper's coefficient (0.02, not divided by k = 2). A
selection bias needs the sigmoid router, so those two arms differ in their gates too. The arms, the
parents and the three seeds are those of configs/experiments/bench/cpu.py: in the same workdir, the
runs that both files have are executed once. Hardware: 2 CPU cores.

The hours that it took, and its results, are in docs/results.md.
"""

from moe_jax.experiments import cpu, study
from moe_jax.sweep import arms

COEFFICIENT = "balance.load_balancing_coefficient"
SIGMOID = {COEFFICIENT: 0.0, "model.router": "sigmoid_topk"}
RULES = {
    "layer": {COEFFICIENT: 0.04},
    "all_layers": {COEFFICIENT: 0.04, "balance.load_balancing_scope": "all_layers"},
    "bias": {**SIGMOID, "balance.bias_update_rate": 1e-3},
    "quantile": {**SIGMOID, "balance.bias_update": "quantile"},
    "none": {COEFFICIENT: 0.0},
}


get_config = cpu.config


def get_sweep():
    arm = {
        "seed": cpu.ARMS,
        "init.source": "@dense",
        "optimizer.learning_rate": 2.7e-3,
        "model.num_experts": 8,
        "model.num_experts_per_tok": 2,
    }
    recipes = arms.over("init.upcycle.recipe", ["naive", "drop"])
    runs = arms.product(arm, recipes, arms.named(RULES))
    return arms.seeds(arms.chain(arms.named({"dense": {}}), runs), 3)


def get_study():
    gains = {rule: study.minus(f"drop-{rule}", f"naive-{rule}") for rule in RULES}
    others = [rule for rule in RULES if rule != "layer"]
    gain = tuple(gains.values())
    more = tuple(study.difference(gains[rule], gains["layer"]) for rule in others)
    of_rules = tuple(
        study.minus(f"{recipe}-{rule}", f"{recipe}-layer")
        for recipe in ("naive", "drop")
        for rule in others
    )
    violation = tuple(study.minus(f"{r}-quantile", f"{r}-bias") for r in ("naive", "drop"))
    experts, similarity = "effective_experts", "expert_similarity"
    return study.Study(
        questions=(
            study.Question("Does drop end below naive, under each rule?", gain),
            study.Question("Is its gain another one than under the loss of each layer?", more),
            study.Question("Does a rule use other numbers of experts?", of_rules, experts),
            study.Question("Does drop keep its experts less alike?", gain, similarity),
            study.Question("Is quantile as balanced as bias?", violation, "max_violation_mean"),
        ),
    )
