"""LOLA: 167 languages, every second layer 16 experts, top-1, with capacity (Srivastava et al.).

    python scripts/train.py --config=configs/lola/lola.py --workdir=runs/lola \\
        --config.data.source="corpus/*.jsonl" --config.data.tokenizer=tokenizer.model

arXiv 2409.11272. Published hardware and time: 96 A100 with 40 GB, 19 days to step 296,000 (465 B
tokens), where the authors stopped; the schedule is longer: warmup over 10 % and decay over 80 % of
1 T tokens. Learning rate, batch, capacity and losses are from the authors' scripts (DeepSpeed,
which sums the balancing loss over layers); the initialisation is Megatron's. CulturaX is not part
of this repository. The sampling of languages is not known for certain: the authors' scripts
disagree, and the one followed here gives every language of a million documents the same share.
For shares n^0.3 / sum n^0.3 of the languages' tokens n:

    --config.data.mixture.weights=temperature --config.data.mixture.exponent=0.3

Differs from the paper: there is no dropout (the paper: 0.1); the dtype is bfloat16 (the paper:
float16); the tokenizer is the file that data.tokenizer names (the paper's is a byte-level BPE,
whose tokenizer.json works); a device's microbatch has as many sequences as the mesh gives it. In
evaluation, tokens compete for an expert's slots within their sequence, not the device's batch, and
the tokens dropped at random are the same each time. Attention crosses documents, as in the paper.

The smallest v5p slice that exists can train it, compiled ahead of time with jax 0.10.2:

    python scripts/dryrun.py --config=configs/lola/lola.py --topology=v5p:2x2x1 \\
        --config.training.accumulation_steps=24

    v5p:2x2x1: 4 devices, fsdp=4, microbatches 24, remat full
      memory   41.98 GB of 102.80 GB (arguments 22.41 GB, temporaries 31.49 GB): fits
      FLOPs    4.665e+15 = 1.036 x analytic, 1.306 x model
      seconds  10.2 at least (compute 10.2, hbm 5.26, ici 4.29, dcn 0): MFU at most 77 %
"""

from moe_jax import config as configs

STEPS_OF_1T = 1_000_000_000_000 // (768 * 2048)


def get_config():
    config = configs.default()
    config.model.preset = "lola"
    config.model.initializer = "scaled_outputs"  # Megatron's
    config.model.dispatch = "capacity"
    config.model.token_priority = "random"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "data/culturax/*.jsonl"
    config.data.mixture.by_label = True
    config.data.mixture.weights = "uniform"
    config.data.mixture.minimum_documents = 1_000_000
    config.data.tokenizer = "data/culturax/tokenizer.model"
    config.data.sequence_length = 2048
    config.data.document_mask = False
    config.data.reset_positions = False
    config.optimizer.learning_rate = 2e-4
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = STEPS_OF_1T // 10
    config.training.batch_size = 768
    config.training.num_steps = STEPS_OF_1T * 8 // 10
    config.balance.load_balancing_coefficient = 0.01
    config.balance.over_layers = "sum"  # as DeepSpeed adds them
    config.balance.load_balancing_scope = "layer"
    config.balance.load_balancing_over = "device"
    config.evaluation.batch_size = 768
    return config
