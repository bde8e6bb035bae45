"""Held-out loss: nats per token, bits per byte, language by language, and the experts' load."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model
from moe_jax.analysis import measures
from moe_jax.data.batches import Batch
from moe_jax.model import transformer
from moe_jax.ops import cross_entropy


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
    """(params, batch) to summed nats and tokens per label, and the routers' sums."""

    def eval_step(params: dict, batch: Batch):
        shared = transformer.Shared(batch.positions_BT, batch.segment_ids_BT)
        x_BTD, stats = transformer.hidden_states(params, batch.tokens_BT, shared, config)
        unembed_DV = transformer.unembedding(params)
        nats_BT = cross_entropy.token_losses(x_BTD, unembed_DV, batch.targets_BT)
        # Padding goes to a bin of its own, cut off below.
        label_BT = jnp.where(batch.segment_ids_BT > 0, batch.labels_BT, num_labels)
        nats, tokens = (
            jnp.bincount(label_BT.ravel(), weights=w_BT.ravel(), length=num_labels + 1)[:-1]
            for w_BT in (nats_BT, jnp.ones_like(nats_BT))
        )
        return nats, tokens, measures.router_sums(stats)

    return eval_step


def evaluate(
    eval_step: Callable, params: dict, batches: Iterable[Batch], bytes_per_token: dict[str, float]
) -> HeldOutLoss:
    """Averages `eval_step` over batches.

    Args:
      bytes_per_token: for each label, in the order of the batches' label ids, the mean bytes of
        text per predicted token. Over the whole held-out text bits per byte are exact.
    """
    sums = jax.tree.map(
        lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0),
        *(jax.device_get(eval_step(params, batch)) for batch in batches),
    )
    nats, tokens, router = sums
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
