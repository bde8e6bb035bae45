"""SmolLM2-135M, a dense Llama small enough for one device (Ben Allal et al., arXiv 2502.02737).

    python scripts/train.py --config=configs/smollm2/135m.py --workdir=runs/smollm2-135m \\
        --config.data.source="corpus/*.jsonl" --config.data.tokenizer=tokenizer.model

Published: 2 T tokens on 64 H100, a constant learning rate with linear decay over the last 20 %. The
rate, batch (1 M tokens), warmup, weight decay and standard deviation of initial weights are from
SmolLM1-135M's published training file; the paper's text was not checked. The text is not part of
this repository. Differs from the paper: the tokenizer is the file that data.tokenizer names (the
paper's is a BPE, whose tokenizer.json works).
"""

from moe_jax import config as configs

TOKENS = 2_000_000_000_000


def get_config():
    config = configs.default()
    config.model.preset = "smollm2-135m"
    config.model.initializer_range = 0.0416
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "data/smollm2/*.jsonl"
    config.data.tokenizer = "data/smollm2/tokenizer.model"
    config.data.sequence_length = 2048
    config.training.batch_size = 512
    config.training.num_steps = TOKENS // (512 * config.data.sequence_length)
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "wsd"
    config.optimizer.final_learning_rate_ratio = 0.0
    config.optimizer.warmup_steps = 2000
    config.optimizer.decay_steps = config.training.num_steps // 5
    config.optimizer.weight_decay = 0.01
    config.evaluation.batch_size = 512
    return config
