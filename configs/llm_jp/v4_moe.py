"""LLM-jp-4 32B-A3.8B: 128 experts, top-8, from scratch; or its ablation with a sigmoid router.

    python scripts/train.py --config=configs/llm_jp/v4_moe.py --workdir=runs/llm-jp-4-32b-a3.8b \\
        --config.data.source="corpus/*.jsonl" --config.data.tokenizer=tokenizer.model

The model is the LLM-jp project's release (`32b-a3.8b`, the argument's default): float32 softmax,
weights that sum to one. Learning rate, batch and losses are from its ablation scripts (Megatron):
4e-4 to 4e-5, 1024 sequences, balancing loss 1e-2, z-loss 1e-3. `32b-a3.8b-sigmoid` has the scripts'
other router: biases that move by 1e-3 per step, weights times 2.5, a sequence-wise loss of 1e-4.
Not known here: warmup and tokens (the values set are placeholders), hardware and time. The text is
not part of this repository.

Differs from the paper: a sequence of the sequence-wise loss is a row of packed documents.
"""

from moe_jax import config as configs

SIZES = ("32b-a3.8b", "32b-a3.8b-sigmoid")


def get_config(size: str = "32b-a3.8b"):
    if size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; use one of {', '.join(SIZES)}")
    config = configs.default()
    config.model.preset = f"llm-jp-4-{size}"
    config.model.initializer = "scaled_outputs"  # Megatron's
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
    sigmoid = size.endswith("sigmoid")
    config.balance.bias_update_rate = 1e-3 if sigmoid else 0.0
    config.balance.load_balancing_coefficient = 1e-4 if sigmoid else 1e-2
    config.balance.load_balancing_scope = "layer"
    config.balance.load_balancing_over = "sequence" if sigmoid else "device"
    config.balance.over_layers = "sum"  # as Megatron adds them
    config.balance.router_z_coefficient = 1e-3
    config.evaluation.batch_size = 1024
    return config
