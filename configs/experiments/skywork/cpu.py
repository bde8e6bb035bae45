"""Do Skywork-MoE's gate normalisation and adaptive coefficients help, and when is scratch better?

    python scripts/sweep.py --config=configs/experiments/skywork/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/skywork/cpu.py

Skywork-MoE (Wei et al., arXiv 2406.06563) normalises the router's logits, adapts each layer's
balance coefficient to its drop rate, and finds that upcycling and training from scratch end alike
with 2/3 of the parent's budget, and that scratch is better with twice that budget. Here: naive
upcycling with each of the two rules, with both and with none; and naive upcycling and training from
scratch with 2/3, 1.6 (as many tokens) and 2 times the parent's FLOPs. The parents and the three
seeds are those of configs/experiments/bench/cpu.py: in the same workdir, the runs that both files
have are executed once. Hardware: 2 CPU cores.

The hours that it took, and its results, are in docs/results.md.
"""

from moe_jax.experiments import bench, cpu, study
from moe_jax.sweep import arms

MOE = {"model.num_experts": 8, "model.num_experts_per_tok": 2}
FIXED = {"balance.load_balancing_coefficient": 0.04}
ADAPTIVE = {
    "balance.load_balancing_form": "squared",
    "balance.load_balancing_schedule": "adaptive",
    "balance.over_layers": "sum",
}
NORMALISED = {"model.gate_norm_std": 1.0}
RULES = {
    "naive": FIXED,
    "normalised": {**FIXED, **NORMALISED},
    "adaptive": ADAPTIVE,
    "both": {**ADAPTIVE, **NORMALISED},
}
RATIO = bench.flops_ratio(cpu.DENSE, cpu.LENGTH)
BUDGETS = {"two_thirds": round(2 / 3 * cpu.STEPS / RATIO), "twice": round(2 * cpu.STEPS / RATIO)}
CONCLUSION = """
Neither rule ends below a fixed coefficient at this size. Gate normalisation is not shown to change
the loss (by more than 0.008 bits per byte). The adaptive coefficient ends 0.023 higher and uses
1.05 experts fewer in a layer: with the paper's constants, the only ones that were tried, it
balances these layers less than the fixed one.

Upcycling ends below an MoE from scratch with every budget, by 0.574 with two thirds of the parent's
FLOPs, 0.528 with 1.6 times as many, and 0.452 with twice as many. That the advantage shrinks with
the budget (by 0.122) is the paper's direction. The crossing is not: there, training from scratch
was as good with two thirds and clearly better with twice. The paper advises to tune the learning
rate for each case, which was not done: all arms from scratch have the dense parent's.

With the parent's FLOPs counted there is no winner: upcycling with two thirds of the parent's budget
costs less in all than training from scratch with twice that budget, and ends within 0.197 of it.
"""


get_config = cpu.config


def get_sweep():
    upcycled = {
        "seed": cpu.ARMS,
        "init.source": "@dense",
        "init.upcycle.recipe": "naive",
        "optimizer.learning_rate": 2.7e-3,
        **MOE,
    }
    scratch = {"scratch": {"seed": cpu.ARMS, **MOE, **FIXED}}  # the parent's learning rate
    equal = arms.chain(arms.product(upcycled, arms.named(RULES)), arms.named(scratch))
    others = arms.product(
        arms.named({"naive": {**upcycled, **FIXED}, **scratch}),
        arms.named({name: {"training.num_steps": steps} for name, steps in BUDGETS.items()}),
    )
    return arms.seeds(arms.chain(arms.named({"dense": {}}), equal, others), 3)


def get_study():
    rules = study.against([name for name in RULES if name != "naive"], "naive")
    budgets = [study.minus(f"naive-{name}", f"scratch-{name}") for name in BUDGETS]
    shrinks = (study.difference(budgets[1], budgets[0]),)
    counted = (study.minus("naive-two_thirds", "scratch-twice"),)
    upcycle = (budgets[0], study.minus("naive", "scratch"), budgets[1])
    return study.Study(
        questions=(
            study.Question("Does a rule end below the fixed coefficient?", rules),
            study.Question("Does a rule use other numbers of experts?", rules, "effective_experts"),
            study.Question("Does upcycling end below scratch, as the budget grows?", upcycle),
            study.Question("Does that advantage shrink as the budget grows?", shrinks),
            study.Question("Does it end below scratch with the parent's FLOPs counted?", counted),
        ),
        crossings=(("naive-twice", "scratch-twice"),),
        conclusion=CONCLUSION,
    )
