"""OLMoE-1B-7B: 64 narrow experts, top-8, from scratch on 5 T tokens (Muennighoff et al., 2024).

    python scripts/train.py --config=configs/olmoe/1b_7b.py --workdir=runs/olmoe-1b-7b \\
        --config.data.source="corpus/{name}/*.jsonl" --config.data.tokenizer=tokenizer.model

arXiv 2409.02060. Published hardware and time: 256 H100, about 10 days. The paper ends with 100 B
tokens of linear decay to 0 (schedule "wsd", 23,842 steps from 4e-5): here a second run whose
init.source is this one, with fresh optimizer moments (the paper keeps the old ones). The losses are
those of megablocks: averaged over layers, computed over a device's microbatch. The text (OLMoE-mix)
is not part of this repository: `data.source` says where its seven sources are, by name. Their
shares are those of their tokens, in the anneal too: 4.06 T tokens are seen 1.3 times. For other
shares in the last 100 B tokens, add --config.data.mixture.stages="((1168250,(('pes2o',1),)),)".

Differs from the paper: documents with repeated n-grams are not filtered out; the tokenizer is the
file that data.tokenizer names (the paper's is a BPE, whose tokenizer.json works); a device's
microbatch has as many sequences as the mesh gives it. As in the paper, attention crosses documents.

The smallest v5p slice that exists can train it, compiled ahead of time with jax 0.10.2:

    python scripts/dryrun.py --config=configs/olmoe/1b_7b.py --topology=v5p:2x2x1 \\
        --config.training.accumulation_steps=32

    v5p:2x2x1: 4 devices, fsdp=4, microbatches 32, remat full
      memory   43.85 GB of 102.80 GB (arguments 20.79 GB, temporaries 39.11 GB): fits
      FLOPs    1.069e+16 = 1.000 x analytic, 1.294 x model
      seconds  23.3 at least (compute 23.3, hbm 14.8, ici 4.95, dcn 0): MFU at most 77 %
"""

from moe_jax import config as configs
from moe_jax.data import published_mixtures

TOKENS = 5_000_000_000_000  # of the cosine


def get_config():
    config = configs.default()
    config.model.preset = "olmoe-1b-7b"
    config.model.initializer = "truncated_normal"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "data/olmoe-mix/{name}/*.jsonl"
    config.data.mixture.shares = published_mixtures.OLMOE
    config.data.tokenizer = "data/olmoe-mix/tokenizer.model"
    config.data.sequence_length = 4096
    config.data.document_mask = False
    config.data.reset_positions = False
    config.optimizer.learning_rate = 4e-4
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = 2500
    config.optimizer.no_weight_decay = ""
    config.training.batch_size = 1024
    config.training.num_steps = TOKENS // (1024 * config.data.sequence_length)
    config.balance.load_balancing_coefficient = 0.01
    config.balance.load_balancing_scope = "layer"
    config.balance.over_layers = "mean"  # as megablocks averages them
    config.balance.load_balancing_over = "device"
    config.balance.load_balancing_divide_by_k = True
    config.balance.router_z_coefficient = 0.001
    config.evaluation.batch_size = 1024
    return config
