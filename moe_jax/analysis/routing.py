"""Statistics of where the routers send tokens, from counts alone (numpy)."""

import numpy as np

from moe_jax.model import router


def health(
    tokens_per_expert_LE: np.ndarray,
    *,
    kind: str = "softmax_topk",
    capacity_factor: float,
    dropped_L: np.ndarray | None = None,
) -> dict[str, str | list]:
    """How evenly each sparse layer uses its experts.

    Returns `kind`, the router's name, so that a forced balance is not taken for a learned one, and
    with one entry per layer each:
      tokens_per_expert: shares of the assignments, summing to 1.
      effective_experts: exp(entropy of the shares), E when balanced, 1 when collapsed.
      max_violation: (largest load - mean) / mean (Wang et al., arXiv 2408.15664).
      dead_experts: experts with less than 1 % of the balanced load.
      virtual_drop_rate: the share that experts of that capacity would have dropped, the batch as
        one group.
      dropped_share: with `dropped_L`, the share of the assignments that was dropped.
    """
    counts_LE = np.asarray(tokens_per_expert_LE, np.float64)
    share_LE = counts_LE / np.maximum(counts_LE.sum(axis=1, keepdims=True), 1)
    E = share_LE.shape[1]
    log_LE = np.log(np.where(share_LE > 0, share_LE, 1))
    rows = {
        "kind": kind,
        "tokens_per_expert": share_LE.round(5).tolist(),
        "effective_experts": np.exp(-(share_LE * log_LE).sum(axis=1)).round(4).tolist(),
        "max_violation": (share_LE.max(axis=1) * E - 1).round(4).tolist(),
        "dead_experts": (share_LE < 0.01 / E).sum(axis=1).tolist(),
        "virtual_drop_rate": router.virtual_drop_rate(counts_LE, capacity_factor).round(5).tolist(),
    }
    if dropped_L is not None:
        rows["dropped_share"] = (dropped_L / counts_LE.sum(axis=1).clip(min=1)).round(5).tolist()
    return rows
