"""Held-out loss: nats per token, bits per byte, language by language, and the experts' load."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model
from moe_jax.analysis import measures
from moe_jax.data.batches import Batch
from moe_jax.model import transformer
from moe_jax.ops import bins, cross_entropy


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """Losses in nats per predicted token.

    `router` holds the sums that measures of the routers are computed from; None for a dense model.
    """

    loss: float
    bits_per_byte: float
    per_language: dict[str, dict[str, float]]
    router: Mapping[str, np.ndarray] | None

    def row(self) -> dict:
        """The validation row of metrics.jsonl."""
        fields = ("loss", "bits_per_byte", "per_language")
        return {name: getattr(self, name) for name in fields}


def make_eval_step(config: model.ModelConfig, num_labels: int) -> Callable:
    """(params, batch) to nats and tokens [B, labels], sums of each row, and the routers' sums.

    One float32 sum over a whole batch would lose 0.4 % of the nats of 4 million tokens. With
    merged experts a row's first segment is left out: its experts are merged by its own tokens, so
    that each of them sees the later ones (`model/merging.py`).
    """
    looks_ahead = config.merge_segment_length if config.dispatch == "merge" else 0

    def eval_step(params: dict, batch: Batch):
        shared = transformer.Shared(batch.positions_BT, batch.segment_ids_BT)
        x_BTD, stats = transformer.hidden_states(params, batch.tokens_BT, shared, config)
        unembed_DV = transformer.unembedding(params)
        nats_BT = cross_entropy.token_losses(x_BTD, unembed_DV, batch.targets_BT)
        counted_BT = (batch.segment_ids_BT > 0) & (jnp.arange(nats_BT.shape[1]) >= looks_ahead)
        label_BT = jnp.where(counted_BT, batch.labels_BT, num_labels)  # beyond the last bin
        by_label = jax.vmap(functools.partial(bins.sum_by_bin, num_bins=num_labels))
        nats, tokens = by_label(nats_BT, label_BT), by_label(jnp.ones_like(label_BT), label_BT)
        return nats, tokens, measures.router_sums(stats)

    return eval_step


def evaluate(
    eval_step: Callable, params: dict, batches: Iterable[Batch], bytes_per_token: dict[str, float]
) -> HeldOutLoss:
    """Averages `eval_step` over batches.

    Args:
      bytes_per_token: for each label, in the order of the batches' label ids, the mean bytes of
        text per predicted token. Over the whole held-out text, all of its tokens counted, bits per
        byte are exact.
    """

    def of_batch(nats_BN, tokens_BN, router):
        sums = nats_BN.sum(axis=0, dtype=np.float64), tokens_BN.sum(axis=0), router
        wide = {"i": np.int64, "f": np.float64}
        return jax.tree.map(lambda x: x.astype(wide[x.dtype.kind]), sums)

    sums = (of_batch(*jax.device_get(eval_step(params, batch))) for batch in batches)
    nats, tokens, router = functools.reduce(lambda *two: jax.tree.map(np.add, *two), sums)
    num_bytes = tokens * np.array(list(bytes_per_token.values()))

    def row(nats, tokens, num_bytes):
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / num_bytes}

    per_language = {
        label: row(*values)
        for label, *values in zip(bytes_per_token, nats, tokens, num_bytes, strict=True)
        if values[1]
    }
    total = row(nats.sum(), tokens.sum(), num_bytes.sum())
    return HeldOutLoss(**total, per_language=per_language, router=router)
