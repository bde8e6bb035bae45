"""Skywork-13B, the dense parent of Skywork-MoE (Wei et al., arXiv 2310.19341).

    python scripts/train.py --config=configs/skywork/13b.py --workdir=runs/skywork-13b \\
        --config.data.source="corpus/*.jsonl" --config.data.tokenizer=tokenizer.model

Published: 3.2 T tokens of English, Chinese and code; a thin and deep Llama. The learning rate
(6e-4), batch (16 M tokens) and length of the first schedule (2 T tokens, set here) were not checked
against the report's text; warmup, hardware and time are not known here. The later stages, at the
final rate and on other text, are further runs whose init.source is this one. The initialisation is
Megatron's. The text is not part of this repository. Differs from the paper: only one of several
stages. Attention crosses documents.
"""

from moe_jax import config as configs

TOKENS = 2_000_000_000_000


def get_config():
    config = configs.default()
    config.model.preset = "skywork-13b"
    config.model.initializer = "scaled_outputs"  # Megatron's
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "data/skypile/*.jsonl"
    config.data.tokenizer = "data/skypile/tokenizer.model"
    config.data.sequence_length = 4096
    config.data.document_mask = False
    config.data.reset_positions = False
    config.optimizer.learning_rate = 6e-4
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = 2000
    config.training.batch_size = 4096
    config.training.num_steps = TOKENS // (4096 * config.data.sequence_length)
    config.evaluation.batch_size = 4096
    return config
