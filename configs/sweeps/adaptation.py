"""Does instruction tuning of a mixture want a balance loss, and a router that learns?

    python scripts/sweep.py --config=configs/sweeps/adaptation.py --workdir=runs/adaptation

A small mixture is trained on the embedded help texts, and then tuned on the same texts as
conversations (a page's title asks, its body answers) in four arms: with and without the balance
loss, the routers trained or frozen. OLMoE (Muennighoff et al., arXiv 2409.02060, section 4.4) found
tuning without the balance loss better (54.0 against 52.8 on average).
Hardware and time: 2 CPU cores, 8 to 13 minutes. Result: docs/adaptation.md has the table.
"""

from moe_jax import config as configs
from moe_jax.sweep import arms

MIXTURE, SEEDS = 0, (1, 2, 3)


def get_config():
    config = configs.default()
    config.seed = MIXTURE
    config.model.preset = "quickstart"
    config.model.num_experts = 8
    config.model.num_experts_per_tok = 2
    config.data.sequence_length = 256
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 40
    config.training.num_steps = 500
    config.training.batch_size = 8
    config.training.log_every = 5
    config.evaluation.every_steps = 30
    config.evaluation.batch_size = 32
    config.evaluation.max_batches = 4
    return config


def get_sweep():
    arm = {
        "init.source": "@mixture",
        "data.source": "instructions",
        "data.conversations": True,
        "data.packing": "best_fit",
        "training.num_steps": 120,
        "optimizer.learning_rate": 1e-3,
    }
    balance, frozen = "balance.load_balancing_coefficient", "optimizer.frozen"
    losses = arms.named({"balanced": {balance: 0.01}, "free": {balance: 0.0}})
    routers = arms.named({"trained": {frozen: ""}, "frozen": {frozen: "moe/router"}})
    tuned = arms.product(arm, losses, routers)
    return arms.chain(arms.named({"mixture": {}}), arms.seeds(tuned, SEEDS))
