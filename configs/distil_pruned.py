"""Trains a pruned model to predict as its parent does (Minitron: arXiv 2407.14679).

    python scripts/prune.py --source=path/to/parent --text=path/to/text.txt \\
        --model.moe_intermediate_size=512 --output=path/to/smaller
    python scripts/train.py --config=configs/distil_pruned.py --workdir=runs/smaller \\
        --config.init.source=path/to/smaller --config.data.source=path/to/text \\
        --config.objective.distillation.source=path/to/parent

The model, its tokenizer and the sequence length (at most 4096 tokens) come from init.source. The
loss is the cross-entropy of the text plus the divergence from the parent's predictions; the
paper's loss is the divergence alone, --config.objective.distillation.cross_entropy_coefficient=0.
The learning rate is a tenth of a usual pre-training rate, no published value. Memory holds the
parent too, without gradients or moments.
Expect the held-out loss to fall from the pruned model's towards the parent's, which the command
prune prints for its sample of text.
"""

from moe_jax import config as configs


def get_config():
    config = configs.default()
    config.seed = 1  # another order of the text than that of a parent that began with seed 0
    config.model.dtype = "auto"
    config.model.remat = "full"
    config.data.source = ""  # to be set
    config.data.sequence_length = 0
    config.objective.distillation.source = "path/to/parent"  # to be set
    config.objective.distillation.coefficient = 1.0
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 20
    config.training.num_steps = 1000
    config.training.batch_size = 16
    config.evaluation.every_steps = 100
    config.evaluation.batch_size = 16
    config.evaluation.max_batches = 8
    config.checkpoint.every_steps = 200
    return config
