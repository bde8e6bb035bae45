"""Upcycles your own dense model to an MoE and trains it, on your own text.

    python scripts/train.py --config=configs/upcycle.py --workdir=runs/moe \\
        --config.init.source=path/to/dense --config.data.source=path/to/text

The dense model, its tokenizer and the sequence length (at most 4096 tokens) come from
init.source. The recipe is naive upcycling; --config.init.upcycle.recipe=drop redraws half of each
expert's neurons (`python scripts/recipes.py` lists all recipes).
The learning rate of 2e-4 with a decay to a tenth is that of Drop-Upcycling's MoEs (arXiv
2502.19261), 2/3 of their parents' peak rate: NVIDIA also restarts at the pre-training rate
(arXiv 2410.07524). It is meant for many thousands of steps. For a short run, or one that must not
get worse than its parent, set --config.optimizer.learning_rate=2e-5 as configs/continue.py does.
Hardware and time: a token uses 2 of 8 experts, so a step takes about twice as long as the dense
model's; but memory holds all 8, with their gradients and moments. `python scripts/dryrun.py
--config=configs/upcycle.py --config.init.source=… --topology=…` reports both.
Expect the held-out loss to rise at first and to fall below the parent's later.
"""

from moe_jax import config as configs


def get_config():
    config = configs.default()
    config.seed = 1  # another order of the text than that of a parent that began with seed 0
    config.init.upcycle.recipe = "naive"
    config.model.num_experts = 8
    config.model.num_experts_per_tok = 2
    config.model.dtype = "auto"
    config.model.remat = "full"
    config.data.source = ""  # to be set
    config.data.sequence_length = 0
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 100
    config.training.num_steps = 10_000
    config.training.batch_size = 16
    config.evaluation.every_steps = 100
    config.evaluation.batch_size = 16
    config.evaluation.max_batches = 8
    config.checkpoint.every_steps = 200
    return config
