"""Statistics of where the routers send tokens, from counts alone (numpy)."""

import numpy as np


def health(tokens_per_expert_LE: np.ndarray) -> dict[str, list]:
    """How evenly each sparse layer uses its experts.

    Returns, each with one entry per layer:
      tokens_per_expert: shares of the assignments, summing to 1.
      effective_experts: exp(entropy of the shares), E when balanced, 1 when collapsed.
      max_violation: (largest load - mean) / mean (Wang et al., arXiv 2408.15664).
      dead_experts: experts with less than 1 % of the balanced load.
    """
    counts_LE = np.asarray(tokens_per_expert_LE, np.float64)
    share_LE = counts_LE / np.maximum(counts_LE.sum(axis=1, keepdims=True), 1)
    E = share_LE.shape[1]
    log_LE = np.log(np.where(share_LE > 0, share_LE, 1))
    return {
        "tokens_per_expert": share_LE.round(5).tolist(),
        "effective_experts": np.exp(-(share_LE * log_LE).sum(axis=1)).round(4).tolist(),
        "max_violation": (share_LE.max(axis=1) * E - 1).round(4).tolist(),
        "dead_experts": (share_LE < 0.01 / E).sum(axis=1).tolist(),
    }
