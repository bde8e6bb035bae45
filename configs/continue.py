"""Continues training a model, from a Hugging Face folder or a run, on your own text.

    python scripts/train.py --config=configs/continue.py --workdir=runs/more \\
        --config.init.source=path/to/model --config.data.source=path/to/text

The model, its tokenizer and the sequence length (at most 4096 tokens) come from init.source.
It computes in bfloat16 on a TPU or a GPU with units for it, else in float32.
The learning rate of 2e-5 is the fine-tuning rate of the OLMoE paper (arXiv 2409.02060, table 7), a
tenth of a usual pre-training rate or less: the text is new to the model, but its weights are not.
Hardware and time depend on the model; `python scripts/dryrun.py --config=configs/continue.py
--config.init.source=… --topology=…` reports both. Expect the held-out loss to fall from the first
evaluation on; if it rises, lower the learning rate.
"""

from moe_jax import config as configs


def get_config():
    config = configs.default()
    config.seed = 1  # another order of the text than that of a parent that began with seed 0
    config.model.dtype = "auto"
    config.model.remat = "full"
    config.data.source = ""  # to be set
    config.data.sequence_length = 0
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 20
    config.training.num_steps = 1000
    config.training.batch_size = 16
    config.evaluation.every_steps = 100
    config.evaluation.batch_size = 16
    config.evaluation.max_batches = 8
    config.checkpoint.every_steps = 200
    return config
