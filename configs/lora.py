"""LoRA: trains a low-rank pair beside each matrix of a model, dense or sparse, on your own text.

    python scripts/train.py --config=configs/lora.py --workdir=runs/lora \\
        --config.init.source=path/to/model --config.data.source=path/to/text

The model, its tokenizer and the sequence length (at most 4096 tokens) come from init.source. Each
attention projection, each matrix of a dense feed-forward and each matrix of each expert gets a pair
of rank 8 (Hu et al., arXiv 2106.09685); --config.lora.targets narrows that, for example to
"attention/w[qv]$", the paper's choice. All other parameters are frozen. The workdir is a model
in which the pairs are merged: evaluate, generate and convert read it as any other.
Learning rate and alpha are common choices, no published recipe. Memory: the weights once, and
gradients and moments of the pairs alone, whose number the run prints. Expect the held-out loss to
fall from the first evaluation on.
"""

from moe_jax import config as configs


def get_config():
    config = configs.default()
    config.seed = 1  # another order of the text than that of a parent that began with seed 0
    config.model.dtype = "auto"
    config.model.remat = "full"
    config.data.source = ""  # to be set
    config.data.sequence_length = 0
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.optimizer.frozen = "^(?!.*lora)"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 20
    config.training.num_steps = 1000
    config.training.batch_size = 16
    config.evaluation.every_steps = 100
    config.evaluation.batch_size = 16
    config.evaluation.max_batches = 8
    config.checkpoint.every_steps = 200
    return config
