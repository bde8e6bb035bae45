"""The main example: dense -> Drop-Upcycling -> MoE on the embedded 19-language text, in minutes.

    bash scripts/quickstart.sh
    python scripts/sweep.py --config=configs/quickstart.py --workdir=runs/quickstart

A dense parent (0.66 M parameters) becomes an MoE with 8 experts, top-2 (3.4 M, 1.05 M active), in
three ways. Two runs are controls: an MoE from scratch, and the parent trained further on as many
tokens. All of them see the same text in the same order. A run that starts at the parent's loss
first gets worse: its learning rate warms up again, and Adam's moments start at zero. Hardware and
time: 2 CPU cores, about 7 minutes with installation. Expect, in bits per byte on held-out text:
dense 3.42, dense_continued 3.32, scratch 3.86, naive 3.30, drop_0.5 3.30, drop_1.0 3.36.
"""

from moe_jax import config as configs

PARENT, ARMS = 0, 1  # seeds: the arms go on with text in another order than their parent's


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
    config.evaluation.every_steps = 60
    config.evaluation.batch_size = 64
    config.evaluation.max_batches = 4
    config.evaluation.prompts = (
        "To insert a table, ",
        "Um eine Tabelle ",
        "Чтобы ",
        "Cliquez sur ",
    )
    config.checkpoint.every_steps = 250
    return config


def get_sweep():
    arm = {
        "seed": ARMS,
        "training.num_steps": 240,
        "optimizer.learning_rate": 2.7e-3,  # 2/3 of the parent's, as in the paper
    }
    moe = {**arm, "model.num_experts": 8, "model.num_experts_per_tok": 2}
    upcycled = {**moe, "init.source": "@dense"}
    drop = {**upcycled, "init.upcycle.recipe": "drop"}
    return [
        {"name": "dense", "overrides": {}, "after": []},
        # Needs nothing of the parent: it waits so that the parent has all cores to itself.
        {"name": "scratch", "overrides": moe, "after": ["dense"]},
        {"name": "dense_continued", "overrides": {**arm, "init.source": "@dense"}, "after": []},
        {"name": "naive", "overrides": {**upcycled, "init.upcycle.recipe": "naive"}, "after": []},
        {"name": "drop_0.5", "overrides": {**drop, "init.upcycle.ratio": 0.5}, "after": []},
        {"name": "drop_1.0", "overrides": {**drop, "init.upcycle.ratio": 1.0}, "after": []},
    ]
