"""Trains the routers of a mixture alone: its experts and all else are frozen.

    python scripts/train.py --config=configs/router_only.py --workdir=runs/router \\
        --config.init.source=path/to/mixture --config.data.source=path/to/text

The model, its tokenizer and the sequence length (at most 4096 tokens) come from init.source. It
shows how much of a gain is the choice of experts, and brings new routers to experts that are done
(BTX's last phase trains all: arXiv 2403.07816). The balance loss stays on: an expert that gets no
token cannot be chosen again by its gradient.
The learning rate, higher than that of whole models, is a common choice and no published recipe. The
run prints how many parameters it trains: a matrix of hidden size x experts in each layer.
"""

from moe_jax import config as configs


def get_config():
    config = configs.default()
    config.seed = 1  # another order of the text than that of a parent that began with seed 0
    config.model.dtype = "auto"
    config.model.remat = "full"
    config.data.source = ""  # to be set
    config.data.sequence_length = 0
    config.optimizer.frozen = "^(?!.*moe/router)"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.balance.load_balancing_coefficient = 0.01
    config.training.num_steps = 1000
    config.training.batch_size = 16
    config.evaluation.every_steps = 100
    config.evaluation.batch_size = 16
    config.evaluation.max_batches = 8
    config.checkpoint.every_steps = 200
    return config
