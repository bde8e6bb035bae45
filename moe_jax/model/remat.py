"""Rematerialisation: what a backward pass keeps of its forward pass, and what it computes again.

The table is of 8 layers of 8 experts, top-2. Time is that of a step on 2 CPU cores relative to the
step without remat in the same run (D=256, F=512, 8 x 256 tokens, float32: `python
scripts/benchmark.py remat`). Memory is that of one of four v5p chips as compiled ahead of time
(D=512, F=1024, 4 x 1024 tokens each, bfloat16, 319 MiB of it the state), and what lies in the
host's memory:

| policy | time | peak, MiB | host, MiB |
|---|---|---|---|
| none | 1.00 | 2,089 | |
| full | 1.03 | 634 | |
| save_experts | 0.96 | 908 | |
| save_dots | 0.94 | 1,061 | |
| offload_experts | 1.06 | 668 | 272 |
| offload_dots | 0.94 | 784 | 466 |

Keeping less can be faster: kept values are written and read, on a CPU in memory that is new in each
step.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops import attention_reference

# Each policy keeps these beside a block's input, by the names that `named` gives.
EXPERTS = ("plan", "gate_up")
DOTS = ("qkv", attention_reference.SAVED_NAME, "middle", "router_logits", *EXPERTS)
SAVED = {
    "full": (),
    "save_experts": EXPERTS,
    "save_dots": DOTS,
    "offload_experts": EXPERTS,  # kept in the host's memory
    "offload_dots": DOTS,
}


def named(name: str, tree):
    """`tree`, whose arrays a policy may keep under `name`."""
    assert name in DOTS, name
    return jax.tree.map(lambda x: checkpoint_name(x, name), tree)


def checkpointed(block: Callable, policy: str) -> Callable:
    """`block`, a scan's step, whose backward pass keeps what `policy` says."""
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
    """`function`, of which the backward pass keeps only the inputs under any policy.

    It is for functions that are cheap beside a product, else each factor of an activation is kept.
    Their last product is not computed again, for nothing needs its value.
    """
    return jax.checkpoint(function, prevent_cse=False)
