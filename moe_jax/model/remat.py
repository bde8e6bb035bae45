"""What of a block's forward pass is kept for its backward pass, and what is computed again.

MEASURED
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
