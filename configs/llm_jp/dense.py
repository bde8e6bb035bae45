"""LLM-jp-3: dense Japanese-English models in eight sizes (LLM-jp, arXiv 2407.03963).

    python scripts/train.py --config=configs/llm_jp/dense.py:1.8b --workdir=runs/llm-jp-3-1.8b \\
        --config.data.source="corpus/{name}/*.jsonl" --config.data.tokenizer=tokenizer.model

Learning rates, batches and tokens are from the project's training scripts and model cards. The text
(2.07 T tokens of the LLM-jp corpus v3) and the tokenizer (LLM-jp's 3.0, a SentencePiece model) are
not part of this repository; `data.source` says where the sources of the mixture are, by name; the
shares are the published ones. The sizes differ only in shape, learning rate and batch. Not known
here: hardware and time. On few devices, raise training.accumulation_steps.

The initialisation is Megatron-LM's. By its default, a document sees earlier ones in its sequence.
Differs from the paper: the data mixture.
"""

from moe_jax import config as configs
from moe_jax.data import published_mixtures

# Size to peak learning rate and sequences a step.
SIZES = {
    "150m": (3e-4, 512),
    "440m": (3e-4, 512),
    "980m": (3e-4, 512),
    "1.8b": (3e-4, 512),
    "3.7b": (3e-4, 1024),
    "7.2b": (2.5e-4, 1024),
    "13b": (2e-4, 1024),
    "172b": (8e-5, 1728),
}
TOKENS = 2_072_488_058_295


def get_config(size: str = "150m"):
    if size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; use one of {', '.join(SIZES)}")
    learning_rate, batch_size = SIZES[size]
    config = configs.default()
    config.model.preset = f"llm-jp-3-{size}"
    config.model.initializer = "scaled_outputs"  # Megatron's
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "data/llm-jp/{name}/*.jsonl"
    config.data.mixture.shares = published_mixtures.LLM_JP_3
    config.data.tokenizer = "data/llm-jp/tokenizer.model"
    config.data.sequence_length = 4096
    config.data.document_mask = False
    config.data.reset_positions = False
    config.optimizer.learning_rate = learning_rate
    config.optimizer.final_learning_rate_ratio = 0.1
    config.optimizer.warmup_steps = 2000
    config.training.batch_size = batch_size
    config.training.num_steps = TOKENS // (batch_size * config.data.sequence_length)
    config.objective.logit_z_coefficient = 1e-4
    config.evaluation.batch_size = batch_size
    return config
