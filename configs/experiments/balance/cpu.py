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
CONCLUSION = """
At this size it is the balance loss, and not the recipe, that leaves experts unused. With the
authors' loss, pooled over all layers, a layer uses fewer of its 8 experts than with a loss for each
layer, by 2.42 (naive) and 2.08 (drop); with no balancing, by 3.15 and 2.62. The authors' naive arm
used 2.5 experts and their drop arm 6.3: the direction is reproduced, but the collapse is smaller
here (5.55), and it befalls both recipes. That drop uses more experts than naive is not shown:
+0.35 under the pooled loss and +0.54 without balancing, neither with a corrected p below 0.05.

So Drop-Upcycling's gain is not shown to be a gain in balance. It is 0.011 to 0.021 bits per byte,
whatever the rule, also where both recipes use nearly all experts; only under quantile balancing
(0.017) does it pass its test. No difference between the gain under a rule and that under the loss
of each layer passes either, but their intervals are wide enough to hide one as large as the gain.

Both recipes end lowest with the loss of each layer, by 0.019 to 0.035 on average: no rule passes
the correction for eight tests, and each interval by itself excludes zero. We would balance each
layer before choosing a recipe for its balance.

Quantile balancing stays closer to balance over training than the sign rule on average, by 0.28
(naive) and 0.11 (drop), which three seeds do not prove.
"""


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
            study.Question("Is its gain another one than under a loss for each layer?", more),
            study.Question("Does another rule end elsewhere than a loss for each layer?", of_rules),
            study.Question("Does a rule use other numbers of experts?", of_rules, experts),
            study.Question("Does drop use more experts than naive?", gain, experts),
            study.Question("Does drop keep its experts less alike?", gain, similarity),
            study.Question("Is quantile as balanced as bias?", violation, "max_violation_mean"),
        ),
        conclusion=CONCLUSION,
    )
