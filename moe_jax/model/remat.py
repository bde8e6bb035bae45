"""Rematerialisation: which values of the forward pass are kept for the backward pass.

The table was measured on 8 layers of 8 experts, top-2. Time is one step on 2 CPU cores, relative to
the step without remat in the same run (D=256, F=512, 8 x 256 tokens, float32: `python
scripts/benchmark.py remat`). Peak and host are memory of the device and of its host, for one of
four v5p chips, from ahead-of-time compilation (D=512, F=1024, 4 x 1024 tokens each, bfloat16; the
train state is 319 MiB of the peak):

| policy | time | peak, MiB | host, MiB |
|---|---|---|---|
| none | 1.00 | 2,089 | |
| full | 1.03 | 634 | |
| save_experts | 0.96 | 908 | |
| save_dots | 0.94 | 1,061 | |
| offload_experts | 1.06 | 668 | 272 |
| offload_dots | 0.94 | 784 | 466 |

Keeping less can be faster: kept values must be written and read again, and on a CPU their memory is
newly allocated in each step.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.ops import attention_reference

# Besides a block's input, each policy keeps the values with these names, given by `named`.
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
    """`tree`, with its arrays marked so that a policy can keep them under `name`."""
    assert name in DOTS, name
    return jax.tree.map(lambda x: checkpoint_name(x, name), tree)


def checkpointed(block: Callable, policy: str) -> Callable:
    """`block`, the body of a scan, with its backward pass under `policy`."""
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
    """`function`, recomputed in the backward pass from its inputs under any policy.

    For functions that are cheap apart from the matrix product that they end in: otherwise each
    factor of an activation would be kept. That last product is not recomputed, because the backward
    pass does not need its value.
    """
    return jax.checkpoint(function, prevent_cse=False)
