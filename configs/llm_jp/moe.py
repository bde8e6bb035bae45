"""LLM-jp-3 MoE: 8 experts, top-2, Drop-Upcycled from the dense models (arXiv 2502.19261).

    python scripts/train.py --config=configs/llm_jp/moe.py:8x1.8b --workdir=runs/llm-jp-3-8x1.8b \\
        --config.data.source="corpus/*.jsonl" --config.data.tokenizer=tokenizer.model

Needs the parent, trained with configs/llm_jp/dense.py in the workdir that init.source names.
Learning rate, batch and balancing loss are from 8x1.8b's Megatron script, the tokens (2.1 T) from
the model cards. Not known here: 8x13b's learning rate (set to its parent's), whether the z-loss on
the logits was kept (it is here), hardware and time. The text is not part of this repository.

Differs from the paper: the model cards do not say how neurons are redrawn, so the paper's way is
used (by neuron); a device's microbatch, over which the balancing loss is computed as in
Megatron-LM, has as many sequences as the mesh gives it.
"""

from moe_jax import config as configs

# Size to parent and peak learning rate.
SIZES = {"8x1.8b": ("1.8b", 3e-4), "8x13b": ("13b", 2e-4)}
TOKENS = 2_100_000_000_000


def get_config(size: str = "8x1.8b"):
    if size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; use one of {', '.join(SIZES)}")
    parent, learning_rate = SIZES[size]
    config = configs.default()
    config.seed = 1  # the parent's is 0: this run sees the text in another order
    config.model.preset = f"llm-jp-3-{size}"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.init.source = f"runs/llm-jp-3-{parent}"
    config.init.upcycle.recipe = "drop"
    config.init.upcycle.ratio = 0.5
    config.init.upcycle.router = "centred_uniform"
    config.data.source = "data/llm-jp/*.jsonl"
    config.data.tokenizer = "data/llm-jp/tokenizer.model"
    config.data.sequence_length = 4096
    config.data.document_mask = False
    config.data.reset_positions = False
    config.optimizer.learning_rate = learning_rate
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = 2000
    config.training.batch_size = 1024
    config.training.num_steps = TOKENS // (1024 * config.data.sequence_length)
    config.balance.load_balancing_coefficient = 0.01
    config.balance.over_layers = "sum"  # as Megatron adds them
    config.balance.load_balancing_scope = "layer"
    config.balance.load_balancing_over = "device"
    config.balance.load_balancing_divide_by_k = True
    config.objective.logit_z_coefficient = 1e-4
    config.evaluation.batch_size = 1024
    return config
