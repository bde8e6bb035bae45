"""Mixtral 8x7B, to measure memory and speed on any number of chips (Jiang et al., 2401.04088).

    python scripts/train.py --config=configs/mixtral/8x7b.py:64 --workdir=runs/mixtral-8x7b

The argument is the number of chips. Parameters are cut over all of them (fsdp), each takes 2
sequences of 4096; weights and moments are float32, computation is bfloat16, every layer is
recomputed. The paper (arXiv 2401.04088) publishes no training recipe: rate and steps are defaults,
the balancing loss is that of the released checkpoint's config. The text is the embedded one, by
bytes; for real text set data.source and data.tokenizer.
"""

from moe_jax import config as configs

SEQUENCES_PER_CHIP = 2


def get_config(chips: str = "16"):
    if not chips.isdecimal() or int(chips) < 1:
        raise ValueError(f"chips {chips!r} is not a number of chips; use a whole number from 1")
    config = configs.default()
    config.model.preset = "mixtral-8x7b"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.mesh.fsdp = -1
    config.data.sequence_length = 4096
    config.training.batch_size = SEQUENCES_PER_CHIP * int(chips)
    config.training.load_balancing_coefficient = 0.02
    config.training.load_balancing_scope = "all_layers"
    config.training.load_balancing_divide_by_k = False
    config.evaluation.batch_size = config.training.batch_size
    return config
