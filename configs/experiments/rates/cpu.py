"""Which learning rate does a run need after upcycling, and does an early ranking hold at its end?

    python scripts/sweep.py --config=configs/experiments/rates/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/rates/cpu.py

The arms of `advise --measure`, trained to their end: the rate warms up again to 2/3 of the parent's
peak and decays (re-warmed, as in NVIDIA's and Drop-Upcycling's papers: He et al., arXiv 2410.07524;
Nakamura et al., arXiv 2502.19261), stays at the parent's last rate (inherited), or stays at the
last rate of the re-warmed schedule (minimum). `advise --measure` compares them after 200 steps;
here they are compared after 250 steps and after 1,000. The parents and the three seeds are those of
configs/experiments/bench/cpu.py: in the same workdir, the runs that both files have are executed
once. Hardware: 2 CPU cores.

The hours that it took, and its results, are in docs/results.md.
"""

from moe_jax.experiments import cpu, study
from moe_jax.sweep import arms, learning_rates

REWARMED, LAST = 2.7e-3, 0.1  # the peak, and the last rate relative to the peak of any schedule
RATES = {"inherited": LAST * 4e-3, "minimum": LAST * REWARMED}
RECIPES = ("naive", "drop")
CONCLUSION = """
The early ranking is the reverse of the last one. After a quarter of the steps both constant rates
are ahead of the re-warmed one on average, by 0.082 to 0.114: its loss first rises (naive) or falls
more slowly (drop). At the end the re-warmed rate is lowest with both recipes and all three seeds,
by 0.229 to 0.297; the curves cross at 0.32 to 0.46 M of 1.02 M tokens. The early differences do not
pass the correction, the last ones do.

So a comparison after 200 steps does not say which rate a long run should have: it finds the best
one for a run of that length. `advise --measure` is good for that, and for the rate above which the
loss rises too far. For a long run, re-warm, as the papers do; a low rate is for a short run, or one
that must not get worse on the way.
"""

get_config = cpu.config


def get_sweep():
    arm = {
        "seed": cpu.ARMS,
        "init.source": "@dense",
        "model.num_experts": 8,
        "model.num_experts_per_tok": 2,
        "balance.load_balancing_coefficient": 0.04,
    }
    rates = {
        "re-warmed": {"optimizer.learning_rate": REWARMED},
        **{name: learning_rates.constant(rate) for name, rate in RATES.items()},
    }
    runs = arms.product(arm, arms.over("init.upcycle.recipe", RECIPES), arms.named(rates))
    return arms.seeds(arms.chain(arms.named({"dense": {}}), runs), 3)


def get_study():
    pairs = tuple((f"{r}-{rate}", f"{r}-re-warmed") for r in RECIPES for rate in RATES)
    constant = tuple(study.minus(*pair) for pair in pairs)
    return study.Study(
        questions=(
            study.Question("Which rate is ahead after a quarter of the steps?", constant, "early"),
            study.Question("Which rate ends lowest?", constant),
            study.Question("How far does the loss rise at first?", constant, "dip"),
        ),
        crossings=pairs,
        conclusion=CONCLUSION,
    )
