"""Trains the experts of a mixture alone: router, attention, norms and embeddings are frozen.

    python scripts/train.py --config=configs/experts_only.py --workdir=runs/experts \\
        --config.init.source=path/to/mixture --config.data.source=path/to/text

The model, its tokenizer and the sequence length (at most 4096 tokens) come from init.source. The
balance losses are off, because nothing that is trained decides where a token goes (in the layers
below, experts change what a router reads, so its choices still drift). To train the router as well,
the other arm of a comparison, set --config.optimizer.frozen="^(?!.*moe/(experts|router))" and
--config.balance.load_balancing_coefficient=0.01. To freeze the router alone, set
--config.optimizer.frozen=moe/router.
The learning rate is that of configs/continue.py. The run prints how many parameters it trains.
"""

from moe_jax import config as configs


def get_config():
    config = configs.default()
    config.seed = 1  # another order of the text than that of a parent that began with seed 0
    config.model.dtype = "auto"
    config.model.remat = "full"
    config.data.source = ""  # to be set
    config.data.sequence_length = 0
    config.optimizer.frozen = "^(?!.*moe/experts)"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 20
    config.balance.load_balancing_coefficient = 0.0
    config.training.num_steps = 1000
    config.training.batch_size = 16
    config.evaluation.every_steps = 100
    config.evaluation.batch_size = 16
    config.evaluation.max_batches = 8
    config.checkpoint.every_steps = 200
    return config
