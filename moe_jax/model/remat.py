"""What of a block's forward pass is kept for its backward pass, and what is computed again.

8 layers of 8 experts, top-2. Step time on 2 CPU cores by that without remat in the same run (D=256,
F=512, 8 x 256 tokens, float32: `python scripts/benchmark.py remat`); memory of one of four v5p
chips as compiled ahead of time (D=512, F=1024, 4 x 1024 tokens each, bfloat16, 319 MiB of it the
state), and what lies in the host's memory:

| policy | time | peak, MiB | host, MiB |
|---|---|---|---|
| none | 1.00 | 2,089 | |
| full | 1.03 | 634 | |
| save_experts | 0.96 | 908 | |
| save_dots | 0.94 | 1,061 | |
| offload_experts | 1.06 | 668 | 272 |
| offload_dots | 0.94 | 784 | 466 |

Keeping less can be faster: what is kept must be written and read, on a CPU into memory that is new
in each step.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops import attention

# What each policy keeps beside a block's input. The names are given in attention.py, layers.py and
# moe.py with `named`.
EXPERTS = ("plan", "gate_up")
DOTS = ("qkv", attention.SAVED_NAME, "middle", "router_logits", *EXPERTS)
SAVED = {
    "full": (),
    "save_experts": EXPERTS,
    "save_dots": DOTS,
    "offload_experts": EXPERTS,  # kept in the host's memory
    "offload_dots": DOTS,
}
NAMES = set(DOTS)


def named(name: str, tree):
    """`tree`, whose arrays a policy may keep under `name`."""
    assert name in NAMES, name
    return jax.tree.map(lambda x: checkpoint_name(x, name), tree)


def checkpointed(block: Callable, policy: str) -> Callable:
    """`block`, a scan's step, with its backward pass keeping what `policy` says."""
    if policy == "none":
        return block
    if policy.startswith("offload"):
        keep = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=SAVED[policy],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        keep = jax.checkpoint_policies.save_only_these_names(*SAVED[policy])
    # prevent_cse only matters outside a scan.
    return jax.checkpoint(block, policy=keep, prevent_cse=False)


def made_again(function: Callable) -> Callable:
    """`function`, of which the backward pass keeps the inputs alone under any policy.

    For what is cheap beside a product: else each factor of an activation is kept. Its last product
    is not computed again, for nothing needs the value.
    """
    return jax.checkpoint(function, prevent_cse=False)
