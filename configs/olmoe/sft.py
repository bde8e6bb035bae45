"""OLMoE-1B-7B-Instruct's first part: supervised fine-tuning on conversations, batch 128.

    python scripts/train.py --config=configs/olmoe/sft.py --workdir=runs/olmoe-1b-7b-sft \\
        --config.init.source=runs/olmoe-1b-7b --config.data.source="talks/*.jsonl"

arXiv 2409.02060: 2 epochs at 2e-5. The load-balancing loss is off, which gave 54.0 on average
against 52.8 with it (--config.balance.load_balancing_coefficient=0.01). The assistant's turns are
trained; docs/adaptation.md says what a line of data.source is. The conversations of the paper
(Tülu 3's mixture with code and mathematics) are not in this repository. The batch is 128 rows, and
several short conversations share a row, each of which sees only itself.

Differs from the paper: the batch counts rows and not conversations; the schedule falls to 0 by a
cosine instead of linearly; the chat template is that of the tokenizer's folder.
"""

from moe_jax import config as configs


def get_config():
    config = configs.default()
    config.seed = 1
    config.model.preset = "olmoe-1b-7b"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.init.source = "runs/olmoe-1b-7b"
    config.data.source = "data/talks/*.jsonl"
    config.data.conversations = True
    config.data.sequence_length = 4096
    config.data.packing = "best_fit"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.final_learning_rate_ratio = 0.0
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.0
    config.optimizer.beta2 = 0.999
    config.training.batch_size = 128
    config.training.num_steps = 0
    config.training.num_epochs = 2.0
    config.balance.load_balancing_coefficient = 0.0
    config.balance.router_z_coefficient = 0.0
    config.evaluation.batch_size = 128
    return config
