"""The dense parents of Drop-Upcycling, and the 13B model it is compared to (Nakamura et al., 2025).

    python scripts/train.py --config=configs/drop_upcycling/dense.py:1.5b \\
        --workdir=runs/drop-upcycling-1.5b \\
        --config.data.source="corpus/{name}/*.jsonl" --config.data.tokenizer=tokenizer.model

arXiv 2502.19261. Hardware: TSUBAME4's H100s. Only 1.5b was trained to the end of its schedule (1 T
tokens). 152m and 3.7b became parents after 1 T of 2.07 T tokens, before their rate had decayed:
stop those at step 477,000 and 239,000. 13b was compared at 805 B tokens. The text (Japanese,
English and code, 2 T or 1 T tokens) and the tokenizers (LLM-jp 3.0; 2.2 for 1.5b) are not in this
repository: `data.source` says where the sources are, by the names of the published mixture.

Learning rates, batches, the z-loss of 1e-4 and AdamW's constants are from the authors' Megatron-LM
scripts; the initialisation is Megatron-LM's. By its default, a document sees earlier ones in its
sequence. Differs from the paper: the shares of the languages are those of the files of
`data.source`.
"""

from moe_jax import config as configs
from moe_jax.data.published_mixtures import DROP_UPCYCLING_1_5B, LLM_JP_3

# Size to peak learning rate, sequences a step, steps and mixture.
SIZES = {
    "152m": (3e-4, 512, 988_240, LLM_JP_3),
    "1.5b": (3e-4, 1024, 238_419, DROP_UPCYCLING_1_5B),
    "3.7b": (3e-4, 1024, 494_120, LLM_JP_3),
    "13b": (2e-4, 1024, 494_120, LLM_JP_3),
}


def get_config(size: str = "152m"):
    if size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; use one of {', '.join(SIZES)}")
    learning_rate, batch_size, num_steps, mixture = SIZES[size]
    config = configs.default()
    config.model.preset = f"drop-upcycling-{size}"
    config.model.initializer = "scaled_outputs"  # Megatron's
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "data/drop-upcycling/{name}/*.jsonl"
    config.data.mixture.shares = mixture
    config.data.tokenizer = "data/drop-upcycling/tokenizer.model"
    config.data.sequence_length = 4096
    config.data.document_mask = False
    config.data.reset_positions = False
    config.optimizer.learning_rate = learning_rate
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = 2000
    config.training.batch_size = batch_size
    config.training.num_steps = num_steps
    config.objective.logit_z_coefficient = 1e-4
    config.evaluation.batch_size = batch_size
    return config
