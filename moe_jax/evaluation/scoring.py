"""Log-likelihoods of continuations given contexts, in padded batches of few shapes.

The definitions are those of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836).
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe_jax import model
from moe_jax.data import batches, tokenizers
from moe_jax.evaluation import generate
from moe_jax.model import transformer
from moe_jax.ops import cross_entropy
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding

SHORTEST_ROW = 32  # tokens; rows have this length, or a power of two above it, or the model's limit


@dataclasses.dataclass(frozen=True)
class Pair:
    """The token ids of a context, at least one, and of its continuation, at least one."""

    context: np.ndarray
    continuation: np.ndarray


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a continuation given its context.

    log_likelihood: in nats, summed over the continuation's tokens.
    is_greedy: True if each of its tokens is the most probable one.
    left_out: the number of the context's first tokens that were left out, because the pair is
      longer than the model's limit.
    """

    log_likelihood: float
    num_tokens: int
    is_greedy: bool
    left_out: int


def pair(tokenizer: tokenizers.Tokenizer, context: str, continuation: str) -> Pair:
    """The ids of two texts, split where lm-evaluation-harness splits them.

    Spaces at the end of the context belong to the continuation, whose ids are those of the whole
    text after the number of ids of the context. An empty context is the tokenizer's begin token.

    Raises: ValueError if the continuation is empty, or has no id of its own.
    """
    if not continuation:
        raise ValueError("a continuation is empty; it has no probability")
    begin, text = context.rstrip(), context + continuation
    if not begin:
        return Pair(np.array([tokenizer.bos_id], np.int32), tokenizer.encode(text))
    context_ids = tokenizer.prompt(begin)
    continuation_ids = tokenizer.prompt(text)[len(context_ids) :]
    if not len(continuation_ids):
        raise ValueError(f"the continuation {continuation!r} has no token after its context")
    return Pair(context_ids, continuation_ids)


def ids_of_text(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """The ids of a text whose likelihood is computed as a whole, without a begin token.

    The begin token is the first context. The harness's own "hf" model scores it too, after another
    one, if the tokenizer adds it to texts.
    """
    ids = tokenizer.prompt(text)
    return ids[1:] if ids[0] == tokenizer.bos_id else ids


def windows(ids: np.ndarray, begin_id: int, limit: int) -> list[Pair]:
    """Pairs that score each token of a long text once, each with at most `limit` tokens as input.

    Each window but the last scores `limit` tokens; the last has as much context as fits
    (lm-evaluation-harness, `loglikelihood_rolling`).
    """
    first = Pair(np.array([begin_id], np.int32), ids[:limit])
    found = [first] if len(ids) else []
    for start in range(limit, len(ids), limit):
        end = min(start + limit, len(ids))
        found.append(Pair(ids[end - limit - 1 : start], ids[start:end]))
    return found


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores pairs with the parameters of a model.

    The model is dropless whatever its config says, so that a score depends neither on the padding
    nor on the other pairs of a batch.

    batch_size: rows per batch, a multiple of the mesh's shards of the batch.
    limit: the largest number of tokens that the model reads at once.
    """

    config: model.ModelConfig
    mesh: jax.sharding.Mesh
    batch_size: int
    limit: int

    @functools.cached_property
    def _independent(self) -> model.ModelConfig:
        return generate.independent(self.config)

    def score(self, params: dict, pairs: Sequence[Pair], *, progress: bool = False) -> list[Score]:
        """The score of each pair, in their order.

        Raises: ValueError for a pair with an empty part, or with a continuation that is longer than
          the model's limit.
        """
        by_length = collections.defaultdict(list)
        for i, one in enumerate(pairs):
            by_length[self._row_length(one)].append(i)
        parts = [
            (length, indices[start : start + self.batch_size])
            for length, indices in sorted(by_length.items(), reverse=True)
            for start in range(0, len(indices), self.batch_size)
        ]
        found: dict[int, Score] = {}
        for length, indices in tqdm.tqdm(parts, "scoring", disable=not progress):
            scores = self._scores_of_batch(params, [pairs[i] for i in indices], length)
            found |= zip(indices, scores, strict=True)
        return [found[i] for i in range(len(pairs))]

    def rolling(
        self, params: dict, texts: Sequence[np.ndarray], begin_id: int, *, progress: bool = False
    ) -> list[Score]:
        """The score of each text as a whole, in windows: see `windows`."""
        split = [windows(ids, begin_id, self.limit) for ids in texts]
        every = [one for pairs in split for one in pairs]
        scores = iter(self.score(params, every, progress=progress))
        return [_sum([next(scores) for _ in pairs]) for pairs in split]

    def _row_length(self, one: Pair) -> int:
        if not (len(one.context) and len(one.continuation)):
            raise ValueError("a context or a continuation has no token")
        if len(one.continuation) > self.limit:
            raise ValueError(
                f"a continuation of {len(one.continuation)} tokens is beyond the model's limit of "
                f"{self.limit}; shorten it"
            )
        return row_length(len(one.context) + len(one.continuation) - 1, self.limit)

    def _scores_of_batch(self, params: dict, pairs: list[Pair], length: int) -> list[Score]:
        tokens_BT, targets_BT, segment_ids_BT = np.zeros((3, self.batch_size, length), np.int32)
        spans = []
        for row, one in enumerate(pairs):
            whole = np.concatenate([one.context, one.continuation])
            ids = whole[-(self.limit + 1) :]
            n = len(ids) - 1
            tokens_BT[row, :n], targets_BT[row, :n], segment_ids_BT[row, :n] = ids[:-1], ids[1:], 1
            spans.append((slice(n - len(one.continuation), n), len(whole) - len(ids)))
        on_device = batches.to_device(
            (tokens_BT, targets_BT, segment_ids_BT),
            jax.NamedSharding(self.mesh, sharding.BATCH),
            np.arange(self.batch_size),
            self.batch_size,
        )
        step = meshes.under(self.mesh, _score)
        nats_BT, is_greedy_BT = jax.device_get(step(self._independent, params, *on_device))
        return [
            Score(
                -float(nats_BT[row, span].sum(dtype=np.float64)),
                span.stop - span.start,
                bool(is_greedy_BT[row, span].all()),
                left_out,
            )
            for row, (span, left_out) in enumerate(spans)
        ]


def row_length(length: int, limit: int) -> int:
    """The length to pad a row to: a power of two, at most `limit`."""
    return min(max(SHORTEST_ROW, 1 << (length - 1).bit_length()), limit)


def _sum(scores: list[Score]) -> Score:
    return Score(
        sum(score.log_likelihood for score in scores),
        sum(score.num_tokens for score in scores),
        all(score.is_greedy for score in scores),
        0,
    )


@functools.partial(jax.jit, static_argnums=0)
def _score(config, params, tokens_BT, targets_BT, segment_ids_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    shared = transformer.Shared(positions_BT, segment_ids_BT)
    x_BTD, _ = transformer.hidden_states(params, tokens_BT, shared, config)
    unembed_DV = transformer.unembedding(params)
    nats_BT, predicted_BT = cross_entropy.token_predictions(x_BTD, unembed_DV, targets_BT)
    return jax.lax.with_sharding_constraint((nats_BT, predicted_BT == targets_BT), jax.P())
