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
have are executed once. Hardware: 2 CPU cores. It has not been run yet.
"""

from moe_jax import config as configs
from moe_jax.experiments import study
from moe_jax.sweep import arms

STEPS, LENGTH, WIDTH = 1000, 128, 288
PARENT, ARMS = 0, 10  # seeds: arms read the text in another order
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
RATIO = 1.605  # the FLOPs of a step of the MoE relative to one of its parent
BUDGETS = {"two_thirds": round(2 / 3 * STEPS / RATIO), "twice": round(2 * STEPS / RATIO)}


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
    upcycled = {
        "seed": ARMS,
        "init.source": "@dense",
        "init.upcycle.recipe": "naive",
        "optimizer.learning_rate": 2.7e-3,
        **MOE,
    }
    scratch = {"scratch": {"seed": ARMS, **MOE, **FIXED}}  # the parent's learning rate
    equal = arms.chain(arms.product(upcycled, arms.named(RULES)), arms.named(scratch))
    others = arms.product(
        arms.named({"naive": {**upcycled, **FIXED}, **scratch}),
        arms.named({name: {"training.num_steps": steps} for name, steps in BUDGETS.items()}),
    )
    return arms.seeds(arms.chain(arms.named({"dense": {}}), equal, others), 3)


def get_study():
    rules = study.against([name for name in RULES if name != "naive"], "naive")
    budgets = [study.minus(f"naive-{name}", f"scratch-{name}") for name in BUDGETS]
    upcycle = (budgets[0], study.minus("naive", "scratch"), budgets[1])
    return study.Study(
        questions=(
            study.Question("Does a rule end below the fixed coefficient?", rules),
            study.Question("Does a rule use other numbers of experts?", rules, "effective_experts"),
            study.Question("Does upcycling end below scratch, as the budget grows?", upcycle),
        ),
        crossings=(("naive-twice", "scratch-twice"),),
    )
