"""Qwen3-30B-A3B: 128 narrow experts, top-8 (Yang et al., arXiv 2505.09388).

    python scripts/train.py --config=configs/qwen3/30b_a3b.py --workdir=runs/qwen3-30b-a3b \\
        --config.data.source="corpus/*.jsonl" --config.data.tokenizer=tokenizer.model

Published: 36 T tokens in three stages, the first with sequences of 4096; a balancing loss over the
global batch, with its coefficient (0.001) in the released checkpoint's config. Not published: rate,
warmup, batch, hardware and time; the values set are placeholders for one stage of 1 T tokens. The
text is not part of this repository.

Differs from the paper: only one of three stages; the tokenizer is the file that data.tokenizer
names (the paper's is a BPE, whose tokenizer.json works).
"""

from moe_jax import config as configs

TOKENS = 1_000_000_000_000


def get_config():
    config = configs.default()
    config.model.preset = "qwen3-30b-a3b"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "data/qwen3/*.jsonl"
    config.data.tokenizer = "data/qwen3/tokenizer.model"
    config.data.sequence_length = 4096
    config.optimizer.learning_rate = 3e-4
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = 2000
    config.training.batch_size = 1024
    config.training.num_steps = TOKENS // (1024 * config.data.sequence_length)
    config.balance.load_balancing_coefficient = 0.001
    config.balance.load_balancing_scope = "layer"
    config.balance.over_layers = "mean"  # not published
    # As in the Hugging Face loss, for which the coefficient is written.
    config.balance.load_balancing_divide_by_k = False
    config.evaluation.batch_size = 1024
    return config
