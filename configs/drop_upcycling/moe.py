"""Drop-Upcycling: 8 experts, top-2, half of each expert's neurons redrawn (Nakamura et al., 2025).

    python scripts/train.py --config=configs/drop_upcycling/moe.py:8x1.5b \\
        --workdir=runs/drop-upcycling-8x1.5b \\
        --config.data.source="corpus/{name}/*.jsonl" --config.data.tokenizer=tokenizer.model

arXiv 2502.19261: 500 B tokens for every method, at the same learning rate. For naive upcycling, set
`--config.init.upcycle.ratio=0`; for training from scratch, remove the `init` lines from this file.
Needs the parent, trained with configs/drop_upcycling/dense.py. Published hardware: 8 nodes of 4
H100 for 8x1.5b, 16 for 8x3.7b. The released code redraws with `index_sharing=per_matrix` and
`permute_neurons=True`; the paper, followed here, redraws by neuron. The text is not part of this
repository: `data.source` says where the sources are, by the names of the parent's mixture.

Rates, steps and the warmup from 2e-5 are from the authors' moe-recipes scripts, in which weight
decay applies to all parameters; the balancing loss is that of Transformers' Mixtral, over all
layers together and one device's microbatch. Attention crosses documents. Differs from the paper: a
device's microbatch has as many sequences as the mesh gives it.

The smallest v5p slice that can train 8x3.7b, compiled ahead of time with jax 0.10.2 (2x2x1 is
2.3 GB short even with one sequence per device):

    python scripts/dryrun.py --config=configs/drop_upcycling/moe.py:8x3.7b --topology=v5p:2x2x2 \\
        --config.training.accumulation_steps=32

    v5p:2x2x2: 8 devices, fsdp=8, microbatches 32, remat full
      memory   55.64 GB of 102.80 GB (arguments 27.89 GB, temporaries 44.13 GB): fits
      FLOPs    2.373e+16 = 1.000 x analytic, 1.269 x model
      seconds  51.7 at least (compute 51.7, hbm 23.5, ici 13.8, dcn 0): MFU at most 79 %
"""

from moe_jax import config as configs
from moe_jax.data.published_mixtures import DROP_UPCYCLING_1_5B, LLM_JP_3

# Size to parent, sequences a step, steps and mixture.
SIZES = {
    "8x152m": ("152m", 512, 238_419, LLM_JP_3),
    "8x1.5b": ("1.5b", 1024, 119_210, DROP_UPCYCLING_1_5B),
    "8x3.7b": ("3.7b", 1024, 119_210, LLM_JP_3),
}


def get_config(size: str = "8x152m"):
    if size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; use one of {', '.join(SIZES)}")
    parent, batch_size, num_steps, mixture = SIZES[size]
    config = configs.default()
    config.seed = 1  # the parent's is 0: this run sees the text in another order
    config.model.preset = f"drop-upcycling-{size}"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.init.source = f"runs/drop-upcycling-{parent}"
    config.init.upcycle.recipe = "drop"
    config.init.upcycle.ratio = 0.5
    config.init.upcycle.index_sharing = "neuron"
    config.init.upcycle.router = "centred_uniform"
    config.data.source = "data/drop-upcycling/{name}/*.jsonl"
    config.data.mixture.shares = mixture
    config.data.tokenizer = "data/drop-upcycling/tokenizer.model"
    config.data.sequence_length = 4096
    config.data.document_mask = False
    config.data.reset_positions = False
    config.optimizer.learning_rate = 2e-4
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = 2000
    config.optimizer.initial_learning_rate_ratio = 0.1
    config.optimizer.no_weight_decay = ""
    config.training.batch_size = batch_size
    config.training.num_steps = num_steps
    config.balance.load_balancing_coefficient = 0.02
    config.balance.load_balancing_scope = "all_layers"
    config.balance.over_layers = "mean"  # of one term, as in Transformers
    config.balance.load_balancing_divide_by_k = False
    config.balance.load_balancing_over = "device"
    config.evaluation.batch_size = batch_size
    return config
