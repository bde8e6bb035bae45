"""Upcycling and its relatives side by side, at the quickstart's size.

    python scripts/sweep.py --config=configs/sweeps/relatives.py --workdir=runs/relatives

There is one run for each system, all from the same dense parent (some from it and a second one that
was trained further with the text in a different order) and for the same number of tokens. What each
system needs besides is its entry in `SYSTEMS`. Most have no config at full size, because their
sizes are not public. Hardware and time: 2 CPU cores, about 30 minutes. Models of this size say
nothing about which system is best; the report shows loss, experts in use and how similar they are.
"""

from moe_jax import config as configs
from moe_jax.sweep import arms

RECIPE, SOURCE = "init.upcycle.recipe", "init.source"
BALANCE, ROUTER = "balance.load_balancing_coefficient", "model.router"
OVER_LAYERS = "balance.over_layers"
TWO = {SOURCE: "@dense,@second"}
SHARDS = {
    "model.num_experts": 16,
    "model.num_experts_per_tok": 4,
    "model.moe_intermediate_size": 64,
}
PARTS = {**SHARDS, "model.num_experts": 4, "model.num_experts_per_tok": 2}
# Name -> what differs from naive upcycling to 8 experts, top-2.
SYSTEMS = {
    "naive": {},
    "noise": {RECIPE: "noise"},
    "drop": {RECIPE: "drop"},
    "virtual_group": {RECIPE: "virtual_group", **SHARDS, "model.norm_topk_prob": False},
    "branch_train_mix": {RECIPE: "branch_train_mix", **TWO},
    "bam": {RECIPE: "bam", **TWO, "model.num_attention_experts": 2},
    "divmoe": {
        RECIPE: "divmoe",
        **TWO,
        **SHARDS,
        ROUTER: "group_topk",
        "model.num_expert_groups": 4,
    },
    "llama_moe": {
        **{RECIPE: "llama_moe", **PARTS, ROUTER: "noisy_topk_mlp"},
        "init.upcycle.router": "torch_linear",
        **{BALANCE: 0.0, "balance.importance_coefficient": 0.01, OVER_LAYERS: "sum"},
    },
    "moe_ct": {
        **{RECIPE: "moe_ct", "model.shared_expert_intermediate_size": 256},
        "optimizer.frozen": r"^(?!.*moe/(experts|router))",
    },
    "skywork": {
        **{RECIPE: "skywork", "model.gate_norm_std": 1.0},
        **{"balance.load_balancing_form": "squared", OVER_LAYERS: "sum"},
        "balance.load_balancing_schedule": "adaptive",
    },
    "loss_free": {ROUTER: "sigmoid_topk", BALANCE: 0.0, "balance.bias_update_rate": 1e-3},
    "quantile": {ROUTER: "sigmoid_topk", BALANCE: 0.0, "balance.bias_update": "quantile"},
    "expert_choice": {ROUTER: "expert_choice", "model.dispatch": "capacity"},
    "lory": {"model.dispatch": "merge", "model.merge_segment_length": 32, BALANCE: 0.0},
    "ds_moe": {
        **{"model.num_experts_per_tok": 8, "model.norm_topk_prob": False, BALANCE: 0.0},
        "evaluation.num_experts_per_tok": 3,
        "balance.mutual_information_coefficient": 6.3e-4,
    },
    "omoe": {"optimizer.orthogonal_every": 20},
}


def get_config():
    config = configs.default()
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
    rate = {"optimizer.learning_rate": 2.7e-3}
    arm = {
        "seed": 1,
        SOURCE: "@dense",
        RECIPE: "naive",
        "model.num_experts": 8,
        "model.num_experts_per_tok": 2,
        "training.num_steps": 200,
        **rate,
    }
    second = {"seed": 2, SOURCE: "@dense", "training.num_steps": 200, **rate}
    parents = arms.named({"dense": {}, "second": second})
    return arms.chain(parents, arms.product(arm, arms.named(SYSTEMS)))
