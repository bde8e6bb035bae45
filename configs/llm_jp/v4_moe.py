"""LLM-jp-4 32B-A3.8B: 128 experts, top-8, sigmoid scores with selection biases, from scratch.

    python scripts/train.py --config=configs/llm_jp/v4_moe.py --workdir=runs/llm-jp-4-32b-a3.8b \\
        --config.data.source="corpus/*.jsonl" --config.data.tokenizer=tokenizer.model

Sizes of the LLM-jp project's release; rate, batch and balancing of its ablation scripts for this
kind of router: biases move by 1e-3 a step, weights times 2.5, a sequence-wise loss of 1e-4 (here
over a device). Not known here: warmup, tokens (those set are placeholders), hardware and time. The
text is not part of this repository.
"""

from moe_jax import config as configs


def get_config():
    config = configs.default()
    config.model.preset = "llm-jp-4-32b-a3.8b"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "data/llm-jp/*.jsonl"
    config.data.tokenizer = "data/llm-jp/tokenizer.model"
    config.data.sequence_length = 4096
    config.optimizer.learning_rate = 4e-4
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = 2000
    config.training.batch_size = 1024
    config.training.num_steps = 100_000
    config.balance.bias_update_rate = 1e-3
    config.balance.load_balancing_coefficient = 1e-4
    config.balance.load_balancing_scope = "layer"
    config.balance.load_balancing_over = "device"
    config.balance.over_layers = "sum"  # as Megatron adds them
    config.balance.router_z_coefficient = 1e-3
    config.evaluation.batch_size = 1024
    return config
