"""The same work in other libraries, for comparison in benchmarks."""

import importlib.util
import os
import pathlib
from collections.abc import Callable

from moe_jax import model
from moe_jax.ops import implementations

PROMPT = 32  # the tokens of a prompt


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
    return _steps(mixtral, torch.randint(0, config.vocab_size, (8, 256)))


def _steps(network, tokens_BT) -> Callable:
    import torch

    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, weight_decay=0.1)

    def step() -> float:
        loss = network(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def hugging_face_forward(folder: pathlib.Path, rows: int, length: int) -> Callable:
    """The logits of all positions."""
    import torch

    network = _hugging_face(folder)
    tokens_BT = torch.randint(0, network.config.vocab_size, (rows, length))

    def forward():
        with torch.no_grad():
            return float(network(tokens_BT, use_cache=False).logits[0, 0, 0])

    return forward


def hugging_face_train(folder: pathlib.Path, rows: int, length: int) -> Callable:
    """A step of AdamW with clipping, and the load-balancing loss of a mixture."""
    import torch

    network = _hugging_face(folder).train()
    if hasattr(network.config, "num_local_experts"):
        network.config.output_router_logits = True
    return _steps(network, torch.randint(0, network.config.vocab_size, (rows, length)))


def hugging_face_decode(folder: pathlib.Path, rows: int, length: int) -> Callable:
    """Greedy continuations of prompts by `length` tokens."""
    import torch

    network = _hugging_face(folder)
    prompts_BT = torch.randint(0, network.config.vocab_size, (rows, PROMPT))

    def decode():
        with torch.no_grad():
            return network.generate(
                prompts_BT,
                attention_mask=torch.ones_like(prompts_BT),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            ).shape

    return decode


def _hugging_face(folder: pathlib.Path):
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# Peer -> benchmark -> a function that takes a model's config.
PEERS: dict[str, dict[str, Callable]] = {"hf": {"train_step": hugging_face_train_step}}
# Peer -> work of `real.py` -> a function that takes a folder, a number of rows and a length.
REAL: dict[str, dict[str, Callable]] = {
    "hf": {
        "forward": hugging_face_forward,
        "train": hugging_face_train,
        "decode": hugging_face_decode,
    }
}
NEEDS = {"hf": ("torch", "transformers")}


def check(peer: str, benchmark: str) -> None:
    """Raises: ValueError for a benchmark, machine or environment that the peer does not support."""
    if benchmark not in (*PEERS[peer], "real"):
        can = ", ".join([*PEERS[peer], "real"])
        raise ValueError(f"--peer={peer} does not do {benchmark}; it does {can}")
    if (here := implementations.platform()) != "cpu":
        where = f"is made for a CPU, not for a {here}"
        raise ValueError(f"--peer={peer} {where}; set JAX_PLATFORMS=cpu")
    missing = [name for name in NEEDS[peer] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--peer={peer} needs more: pip install {' '.join(missing)}")
