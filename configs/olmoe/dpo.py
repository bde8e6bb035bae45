"""OLMoE-1B-7B-Instruct's second part: direct preference optimisation of the SFT model, batch 32.

    python scripts/train.py --config=configs/olmoe/dpo.py --workdir=runs/olmoe-1b-7b-dpo \\
        --config.init.source=runs/olmoe-1b-7b-sft --config.data.source="pairs/*.jsonl"

arXiv 2409.02060: 3 epochs at 5e-7 with beta 0.1. The load-balancing loss is off, which gave 57.7 on
average against 57.1 with it (--config.balance.load_balancing_coefficient=0.01). docs/adaptation.md
says what a record of data.source is; the 61 k pairs of the paper (UltraFeedback) are not in this
repository. Prompts and answers are messages, or texts that stand for one message each, and the chat
template is that of the tokenizer's folder. A row holds one pair, so the batch is 32 pairs. The
router is trained; --config.optimizer.frozen=moe/router keeps it.

Differs from the paper: the schedule falls to 0 by a cosine instead of linearly,
with a warmup of 570 steps, a tenth of those of 61 k pairs.
"""

from moe_jax import config as configs


def get_config():
    config = configs.default()
    config.seed = 2
    config.model.preset = "olmoe-1b-7b"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.init.source = "runs/olmoe-1b-7b-sft"
    config.data.source = "data/pairs/*.jsonl"
    config.data.conversations = True
    config.data.sequence_length = 4096  # of both answers together
    config.objective.name = "dpo"
    config.objective.preference.reference = config.init.get_ref("source")
    config.objective.preference.beta = 0.1
    config.optimizer.learning_rate = 5e-7
    config.optimizer.final_learning_rate_ratio = 0.0
    config.optimizer.warmup_steps = 570
    config.optimizer.weight_decay = 0.0
    config.optimizer.beta2 = 0.999
    config.training.batch_size = 32
    config.training.num_steps = 0
    config.training.num_epochs = 3.0
    config.balance.load_balancing_coefficient = 0.0
    config.balance.router_z_coefficient = 0.0
    config.evaluation.batch_size = 32
    return config
