"""Do OLMoE's choices hold at this size: fine experts, no shared one, z-loss, QK-norm, token choice?

    python scripts/sweep.py --config=configs/experiments/olmoe/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/olmoe/cpu.py

OLMoE (Muennighoff et al., arXiv 2409.02060) trains from scratch, with fine experts, of which a
token chooses several. Here an MoE from scratch with 32 experts, top-8, is compared with coarser
ones of the same size and FLOPs, with one of its active experts shared by all tokens, with the
router z-loss, with QK-norm, and with experts that choose tokens. Hardware: 2 CPU cores. It has not
been run yet.
"""

from moe_jax import config as configs
from moe_jax.experiments import study
from moe_jax.sweep import arms

STEPS, LENGTH, WIDTH = 1000, 128, 288
PARENT = 0  # seed


def experts(number, active, width, **others):
    return {
        "model.num_experts": number,
        "model.num_experts_per_tok": active,
        "model.moe_intermediate_size": width,
        **others,
    }


COEFFICIENT = "balance.load_balancing_coefficient"
CHOICE = {
    "model.router": "expert_choice",
    "model.dispatch": "capacity",
    "model.capacity_factor": 1.0,
    COEFFICIENT: 0.0,
}
NAMED = {
    "fine": experts(32, 8, WIDTH // 4),
    "medium": experts(16, 4, WIDTH // 2),
    "coarse": experts(8, 2, WIDTH),
    "shared": experts(31, 7, WIDTH // 4, **{"model.shared_expert_intermediate_size": WIDTH // 4}),
    "z_loss": experts(32, 8, WIDTH // 4, **{"balance.router_z_coefficient": 1e-3}),
    "qk_norm": experts(32, 8, WIDTH // 4, **{"model.qk_norm": "full"}),
    "expert_choice": experts(32, 8, WIDTH // 4, **CHOICE),
}


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
    return arms.seeds(arms.product({COEFFICIENT: 0.01}, arms.named(NAMED)), 3)


def get_study():
    others = [name for name in NAMED if name != "fine"]
    every = study.against(others, "fine")
    return study.Study(
        questions=(
            study.Question("Does a choice end elsewhere than the 32 fine experts?", every),
            study.Question("Does it use other numbers of experts?", every, "effective_experts"),
        ),
        crossings=tuple((name, "fine") for name in others),
    )
