"""The same work in other libraries, for comparison in benchmarks."""

import importlib.util
from collections.abc import Callable

from moe_jax import model
from moe_jax.ops import implementations


def hugging_face_train_step(config: model.ModelConfig) -> Callable:
    """A train step of Mixtral in Transformers and PyTorch: losses, gradients, clipping, AdamW."""
    import torch
    import transformers

    torch.manual_seed(0)
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_kv_heads,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            output_router_logits=True,  # adds the load-balancing loss
            use_cache=False,
            sliding_window=None,
        )
    )
    optimizer = torch.optim.AdamW(mixtral.parameters(), lr=3e-4, weight_decay=0.1)
    tokens_BT = torch.randint(0, config.vocab_size, (8, 256))

    def step() -> float:
        loss = mixtral(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mixtral.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


# Peer -> benchmark -> a function that takes a model's config.
PEERS: dict[str, dict[str, Callable]] = {"hf": {"train_step": hugging_face_train_step}}
NEEDS = {"hf": ("torch", "transformers")}


def check(peer: str, benchmark: str) -> None:
    """Raises: ValueError for a benchmark, machine or environment that the peer does not support."""
    if benchmark not in PEERS[peer]:
        can = ", ".join(PEERS[peer])
        raise ValueError(f"--peer={peer} does not do {benchmark}; it does {can}")
    if (here := implementations.platform()) != "cpu":
        where = f"is made for a CPU, not for a {here}"
        raise ValueError(f"--peer={peer} {where}; set JAX_PLATFORMS=cpu")
    missing = [name for name in NEEDS[peer] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--peer={peer} needs more: pip install {' '.join(missing)}")
