"""Do OLMoE's choices hold at this size: fine experts, no shared one, z-loss, QK-norm, token choice?

    python scripts/sweep.py --config=configs/experiments/olmoe/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/olmoe/cpu.py

OLMoE (Muennighoff et al., arXiv 2409.02060) trains from scratch, with fine experts, of which a
token chooses several. Here an MoE from scratch with 32 experts, top-8, is compared with coarser
ones of the same size and FLOPs, with one of its active experts shared by all tokens, with the
router z-loss, with QK-norm, and with experts that choose tokens. Hardware: 2 CPU cores.

It has not been run yet; its results will be in docs/results.md.
"""

from moe_jax.experiments import cpu, study
from moe_jax.sweep import arms


def experts(number, active, width, **others):
    return {
        "model.num_experts": number,
        "model.num_experts_per_tok": active,
        "model.moe_intermediate_size": width,
        **others,
    }


QUARTER = cpu.WIDTH // 4
COEFFICIENT = "balance.load_balancing_coefficient"
CHOICE = {
    "model.router": "expert_choice",
    "model.dispatch": "capacity",
    "model.capacity_factor": 1.0,
    COEFFICIENT: 0.0,
}
NAMED = {
    "fine": experts(32, 8, QUARTER),
    "medium": experts(16, 4, cpu.WIDTH // 2),
    "coarse": experts(8, 2, cpu.WIDTH),
    "shared": experts(31, 7, QUARTER, **{"model.shared_expert_intermediate_size": QUARTER}),
    "z_loss": experts(32, 8, QUARTER, **{"balance.router_z_coefficient": 1e-3}),
    "qk_norm": experts(32, 8, QUARTER, **{"model.qk_norm": "full"}),
    "expert_choice": experts(32, 8, QUARTER, **CHOICE),
}


get_config = cpu.config


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
