"""Held-out loss in nats per token and bits per byte, by language, and the experts' load."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model
from moe_jax.analysis import measures
from moe_jax.data.batches import Batch
from moe_jax.evaluation import comparison
from moe_jax.model import transformer
from moe_jax.ops import bins, cross_entropy

MOST_BLOCKS = 64  # 1.5 KB in a row of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """Losses in nats per predicted token.

    held_out_tokens: the number of predicted tokens that they average over.
    blocks: nats, tokens and bytes of at most MOST_BLOCKS consecutive parts of the text; two models'
      blocks of one text are pairs, from which a report draws for its intervals.
    router: the sums for the router measures; None for a dense model.
    """

    loss: float
    bits_per_byte: float
    held_out_tokens: int
    per_language: dict[str, dict[str, float]]
    blocks: list[list[float]]
    router: Mapping[str, np.ndarray] | None

    def row(self) -> dict:
        """The validation row of metrics.jsonl."""
        fields = ("loss", "bits_per_byte", "held_out_tokens", "per_language", "blocks")
        return {name: getattr(self, name) for name in fields}


@dataclasses.dataclass(frozen=True)
class Sums:
    """The sums for each row and label; padding rows have no tokens.

    bytes_per_token: the mean bytes of text per predicted token, for each label.
    """

    nats_RN: np.ndarray
    tokens_RN: np.ndarray
    bytes_per_token: dict[str, float]
    router: Mapping[str, np.ndarray] | None

    def loss(self) -> HeldOutLoss:
        labels = {label: self.of_labels(label) for label in self.bytes_per_token}
        return HeldOutLoss(
            **self._mean(),
            held_out_tokens=int(self.tokens_RN.sum()),
            per_language={
                label: sums._mean() for label, sums in labels.items() if sums.tokens_RN.any()
            },
            blocks=self._blocks(),
            router=self.router,
        )

    def _blocks(self) -> list[list[float]]:
        parts = np.array_split(self._rows, max(1, min(MOST_BLOCKS, len(self._rows))))
        return [part.sum(axis=0).round(3).tolist() for part in parts]

    def of_labels(self, *labels: str) -> "Sums":
        """The sums of these labels only."""
        known = list(self.bytes_per_token)
        at = [known.index(label) for label in labels]
        own = {label: self.bytes_per_token[label] for label in labels}
        return Sums(self.nats_RN[:, at], self.tokens_RN[:, at], own, None)

    def by_source(self, labels_of: Mapping[str, Sequence[str]]) -> dict:
        """The entry "per_source" of the validation row: the losses of each source of a mixture,
        whose labels are given; none for a single source."""
        if len(labels_of) < 2:
            return {}
        every = {name: self.of_labels(*labels) for name, labels in labels_of.items()}
        return {
            "per_source": {
                name: {**sums._mean(), "held_out_tokens": int(sums.tokens_RN.sum())}
                for name, sums in every.items()
                if sums.tokens_RN.any()
            }
        }

    def intervals(self, *, seed: int = 0) -> dict[str, list[float] | None]:
        """95 % bootstrap intervals of the loss and the bits per byte; None for too few rows.

        Rows are drawn with replacement, because tokens of one row, often from one document, are not
        independent (Efron, "Bootstrap methods", Annals of Statistics 7, 1979; percentile method).
        """
        sums_R3 = self._rows[self.tokens_RN.any(axis=1)]
        if len(sums_R3) < comparison.FEWEST:
            return {"loss": None, "bits_per_byte": None}
        drawn = [_losses(means_3) for means_3 in comparison.means(sums_R3, seed)]
        return {
            name: comparison.middle([losses[name] for losses in drawn])
            for name in ("loss", "bits_per_byte")
        }

    @property
    def _rows(self) -> np.ndarray:
        """[R, 3]: nats, tokens and bytes of each row."""
        bytes_N = np.array(list(self.bytes_per_token.values()))
        columns = self.nats_RN.sum(axis=1), self.tokens_RN.sum(axis=1), self.tokens_RN @ bytes_N
        return np.stack(columns, axis=1)

    def _mean(self) -> dict[str, float]:
        return _losses(self._rows.sum(axis=0))


def _losses(sums_3: np.ndarray) -> dict[str, float]:
    """Means from the sums of nats, tokens and bytes; NaN over none, as for empty documents."""
    nats, tokens, num_bytes = map(float, sums_3)
    return {
        "loss": nats / tokens if tokens else math.nan,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else math.nan,
    }


def make_eval_step(config: model.ModelConfig, num_labels: int) -> Callable:
    """(params, batch) -> nats and tokens per row and label, [B, labels], and the routers' sums.

    The sums are per row because one float32 sum over a whole batch would lose 0.4 % of the nats of
    4 million tokens. With merged experts a row's first segment is left out: its experts are merged
    by its own tokens, so each of these sees the later ones (`model/merging.py`).
    """
    looks_ahead = config.merge_segment_length if config.dispatch == "merge" else 0

    def eval_step(params: dict, batch: Batch):
        shared = transformer.Shared(batch.positions_BT, batch.segment_ids_BT)
        x_BTD, stats = transformer.hidden_states(params, batch.tokens_BT, shared, config)
        unembed_DV = transformer.unembedding(params)
        nats_BT = cross_entropy.token_losses(x_BTD, unembed_DV, batch.targets_BT)
        counted_BT = (batch.weights_BT > 0) & (jnp.arange(nats_BT.shape[1]) >= looks_ahead)
        label_BT = jnp.where(counted_BT, batch.labels_BT, num_labels)  # uncounted: no bin
        by_label = jax.vmap(functools.partial(bins.sum_by_bin, num_bins=num_labels))
        nats, tokens = by_label(nats_BT, label_BT), by_label(jnp.ones_like(label_BT), label_BT)
        return nats, tokens, measures.router_sums(stats)

    return eval_step


def evaluate(
    eval_step: Callable, params: dict, batches: Iterable[Batch], bytes_per_token: dict[str, float]
) -> Sums:
    """The sums of `eval_step` over batches.

    Args:
      bytes_per_token: the mean bytes of text per predicted token for each label, in the order of
        the batches' label ids. Bits per byte are exact if all tokens of the held-out text are
        counted.
    """
    wide = {"i": np.int64, "f": np.float64}
    nats, tokens, router = [], [], None
    for batch in batches:
        nats_BN, tokens_BN, own = jax.tree.map(
            lambda x: x.astype(wide[x.dtype.kind]), jax.device_get(eval_step(params, batch))
        )
        nats.append(nats_BN)
        tokens.append(tokens_BN)
        router = own if router is None else jax.tree.map(np.add, router, own)
    nats_RN, tokens_RN = np.concatenate(nats), np.concatenate(tokens)
    filled_R = tokens_RN.any(axis=1)
    return Sums(nats_RN[filled_R], tokens_RN[filled_R], bytes_per_token, router)
