"""Does naive upcycling collapse if the load-balancing loss is computed over all layers together?

    python scripts/sweep.py --config=configs/sweeps/balance_scope.py --workdir=runs/balance_scope

The released routers of Drop-Upcycling (Nakamura et al., arXiv 2502.19261), all trained with a
balance loss pooled over all layers, use 2.5 of 8 experts per layer with naive and 6.3 with drop.
This sweep runs {naive, drop} x {layer, all_layers} at the quickstart's size, with the paper's
coefficient in the paper's form (0.02, not divided by k). The report plots the effective experts of
every layer, exp(entropy of the load), 8 when balanced; result.json has them as `effective_experts`.
Hardware and time: 2 CPU cores shared with other work, 28 minutes. Expect, as mean effective
experts: layer 7.9 (naive) and 8.0 (drop); all_layers 5.6 and 6.0. So at this size and in 400 steps,
the pooled loss leaves layers uneven for both, but no layer collapses to two experts.
"""

from moe_jax import config as configs
from moe_jax.sweep import arms

PARENT, ARMS = 0, 1  # seeds


def get_config():
    config = configs.default()
    config.seed = PARENT
    config.model.preset = "quickstart"
    config.data.sequence_length = 128
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 40
    config.training.num_steps = 700
    config.training.batch_size = 8
    config.training.log_every = 5
    config.evaluation.every_steps = 100
    config.evaluation.batch_size = 64
    config.evaluation.max_batches = 4
    config.checkpoint.every_steps = 250
    return config


def get_sweep():
    arm = {
        "seed": ARMS,
        "init.source": "@dense",
        "model.num_experts": 8,
        "model.num_experts_per_tok": 2,
        "training.num_steps": 400,
        "optimizer.learning_rate": 2.7e-3,
        "balance.load_balancing_coefficient": 0.02,
        "balance.load_balancing_divide_by_k": False,
    }
    recipes = arms.over("init.upcycle.recipe", ["naive", "drop"])
    scopes = arms.over("balance.load_balancing_scope", ["layer", "all_layers"])
    return arms.chain(arms.named({"dense": {}}), arms.product(arm, recipes, scopes))
