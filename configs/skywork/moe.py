"""Skywork-MoE: Skywork-13B upcycled to 16 experts, top-2, normalised gates (Wei et al., 2024).

    python scripts/train.py --config=configs/skywork/moe.py --workdir=runs/skywork-moe \\
        --config.data.source="corpus/*.jsonl" --config.data.tokenizer=tokenizer.model

arXiv 2406.06563. Needs the parent, trained with configs/skywork/13b.py. Published hardware: 1536
A800, each at 690 tokens per second. As in the paper, the balancing coefficient of each layer
follows its drop rate, up to 0.01. Not known here: capacity, rate, warmup, batch and tokens; the
values set are placeholders. The text (English, Chinese and code at 7 : 2 : 1) is not part of this
repository. Differs from the paper: the dispatch is dropless, and the drop rate is that of a
capacity of 1.25.

The smallest v5p slice that can train it, compiled ahead of time with jax 0.10.2 (2x4x4 is 11.2 GB
short even with one sequence per device):

    python scripts/dryrun.py --config=configs/skywork/moe.py --topology=v5p:4x4x4 \\
        --config.training.accumulation_steps=32

    v5p:4x4x4: 64 devices, fsdp=64, microbatches 32, remat full
      memory   65.71 GB of 102.80 GB (arguments 27.50 GB, temporaries 59.73 GB): fits
      FLOPs    5.007e+16 = 1.000 x analytic, 1.307 x model
      seconds  109 at least (compute 109, hbm 70.4, ici 92.9, dcn 0): MFU at most 76 %

The layouts that the paper compares are arguments, moe.py:ep, :edp and :etp: experts are spread over
devices with different tokens, spread over tensor-parallel devices, or sharded by these; each has a
capacity of 1.25 times the even load (hence the FLOPs) and four devices along the axis. The same
command prints:

    ep   fsdp=16 expert=4   62.55 GB  1.170 x analytic  128 s (hbm 26.5, ici 24.9)  MFU <= 65 %
    edp  fsdp=16 edp=4      72.38 GB  1.198 x analytic  131 s (hbm 58.8, ici 39.8)  MFU <= 64 %
    etp  fsdp=16 tensor=4   73.48 GB  1.198 x analytic  131 s (hbm 66.0, ici 39.8)  MFU <= 64 %
"""

from moe_jax import config as configs

# The paper's §4 compares experts over the data-parallel devices, over the tensor-parallel ones, and
# cut by these. Experts have a capacity in all, so that an exchange has one shape.
LAYOUTS = {"fsdp": {}, "ep": {"expert": 4}, "edp": {"edp": 4}, "etp": {"tensor": 4}}


def get_config(layout: str = "fsdp"):
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    config = configs.default()
    config.seed = 1  # the parent's is 0: this run sees the text in another order
    config.mesh.update(LAYOUTS[layout])
    if layout != "fsdp":
        config.model.dispatch = "capacity"
    config.model.preset = "skywork-moe"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.init.source = "runs/skywork-13b"
    config.init.upcycle.recipe = "skywork"
    config.data.source = "data/skypile/*.jsonl"
    config.data.tokenizer = "data/skypile/tokenizer.model"
    config.data.sequence_length = 8192
    config.optimizer.learning_rate = 6e-5
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = 2000
    config.training.batch_size = 2048
    config.training.num_steps = 10_000
    config.balance.load_balancing_coefficient = 0.01
    config.balance.load_balancing_scope = "layer"
    config.balance.over_layers = "sum"  # the report's §4.2
    config.balance.load_balancing_form = "squared"
    config.balance.load_balancing_schedule = "adaptive"
    config.evaluation.batch_size = 2048
    return config
