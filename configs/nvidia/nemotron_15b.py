"""Nemotron-4 15B, the dense parent of NVIDIA's upcycling study (Parmar et al., arXiv 2402.16819).

    python scripts/train.py --config=configs/nvidia/nemotron_15b.py --workdir=runs/nemotron-15b \\
        --config.data.source="corpus/*.jsonl" --config.data.tokenizer=tokenizer.model

Published: 8 T tokens in sequences of 4096 on 384 nodes of 8 H100, with the batch raised from 384 to
1152 sequences. Not known: the learning rate (the upcycling paper's text suggests 4.5e-4 to 4.5e-5)
and the warmup. The initialisation is Megatron-LM's, with the standard deviation of the released
config. The text is not part of this repository.

Differs from the paper: the batch size is 1152 throughout. Attention crosses documents.
"""

from moe_jax import config as configs

TOKENS = 8_000_000_000_000


def get_config():
    config = configs.default()
    config.model.preset = "nemotron-4-15b"
    config.model.initializer = "scaled_outputs"  # Megatron's
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "data/nemotron/*.jsonl"
    config.data.tokenizer = "data/nemotron/tokenizer.model"
    config.data.sequence_length = 4096
    config.data.document_mask = False
    config.data.reset_positions = False
    config.optimizer.learning_rate = 4.5e-4
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = 2000
    config.training.batch_size = 1152
    config.training.num_steps = TOKENS // (1152 * config.data.sequence_length)
    config.evaluation.batch_size = 1152
    return config
