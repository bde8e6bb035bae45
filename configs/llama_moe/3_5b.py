"""LLaMA-MoE v1: Llama 2 7B's feed-forwards split into 16 experts, top-4 (Zhu et al., 2024).

    python scripts/train.py --config=configs/llama_moe/3_5b.py --workdir=runs/llama-moe-3.5b \\
        --config.init.source=path/to/llama-2-7b --config.data.source="corpus/*.jsonl" \\
        --config.data.tokenizer=path/to/llama-2-7b/tokenizer.json

arXiv 2406.16554: 200 B tokens in batches of 14.7 M, here 3,584 sequences of 4,096. The partition is
random; outputs are scaled by N/k; the balancing losses are the variation of importance and load,
summed over layers. The gate is that of the released code (gate_network="mlp"): two layers with tanh
in between, PyTorch's initialisation, and noise that starts at its minimum. Rate, warmup and weight
decay are from the authors' scripts. Benchmark average in the paper: 57.7; Sheared-LLaMA-2.7B: 56.4.
Not known here: hardware and time. The text (SlimPajama with Sheared-LLaMA's sampling weights) is
not part of this repository.

Differs from the paper: the sampling weights of its sources are those of the files of `data.source`,
and do not change during training. Attention crosses documents.
"""

from moe_jax import config as configs

TOKENS = 200_000_000_000


def get_config():
    config = configs.default()
    config.model.preset = "llama-moe-3.5b"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.init.source = "path/to/llama-2-7b"
    config.init.upcycle.recipe = "llama_moe"
    config.init.upcycle.partition = "random"
    config.init.upcycle.router = "torch_linear"
    config.data.source = "data/slimpajama/*.jsonl"
    config.data.tokenizer = "data/slimpajama/tokenizer.model"
    config.data.sequence_length = 4096
    config.data.document_mask = False
    config.data.reset_positions = False
    config.optimizer.learning_rate = 2e-4
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = 100
    config.training.batch_size = 3584
    config.training.num_steps = TOKENS // (3584 * config.data.sequence_length)
    config.balance.load_balancing_coefficient = 0.0
    config.balance.importance_coefficient = 0.01
    config.balance.over_layers = "sum"  # as the authors' code adds them
    config.balance.load_balancing_over = "device"
    config.evaluation.batch_size = 3584
    return config
