"""Mixtral 8x7B, to measure memory and speed on any number of chips (Jiang et al., 2401.04088).

    python scripts/train.py --config=configs/mixtral/8x7b.py:64 --workdir=runs/mixtral-8x7b

The argument is the number of chips. Parameters are sharded over all of them (fsdp), and each takes
2 sequences of 4096; weights and moments are float32, computation is bfloat16, and every layer is
rematerialised. The paper (arXiv 2401.04088) publishes no training recipe: rate and steps are
defaults, and the balancing loss is from the released checkpoint's config. The text is the embedded
one, as bytes; for real text, set data.source and data.tokenizer. Differs from the paper: everything
but the model, because its training is not published.

The smallest v5p slice that can train it, compiled ahead of time with jax 0.10.2 (2x2x2 is 32.2 GB
short even with one sequence per device):

    python scripts/dryrun.py --config=configs/mixtral/8x7b.py --topology=v5p:2x2x4

    v5p:2x2x4: 16 devices, fsdp=16, microbatches 1, remat full
      memory   54.28 GB of 102.80 GB (arguments 35.04 GB, temporaries 29.04 GB): fits
      FLOPs    8.212e+14 = 1.000 x analytic, 1.258 x model
      seconds  1.79 at least (compute 1.79, hbm 0.906, ici 1.17, dcn 0): MFU at most 80 %
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
    config.balance.load_balancing_coefficient = 0.02
    config.balance.load_balancing_scope = "all_layers"
    config.balance.over_layers = "mean"  # of one term, as in Transformers
    config.balance.load_balancing_divide_by_k = False
    config.evaluation.batch_size = config.training.batch_size
    return config
