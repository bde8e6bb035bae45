"""Log-probabilities of pairs of answers under a reference model, computed once and cached."""

import dataclasses
import hashlib
import json
import pathlib

import jax
import numpy as np

from moe_jax import files, model, tree
from moe_jax.data import batches
from moe_jax.data.cache import writing
from moe_jax.data.preferences import PairCorpus, PairPlan
from moe_jax.parallel import distributed, sharding
from moe_jax.parallel import mesh as meshes
from moe_jax.training import checkpoint, objective

FORMAT = 1  # the version of the file's format, a part of its key


def log_probs(
    pairs: PairCorpus,
    config: model.ModelConfig,
    params: dict,
    mesh: jax.sharding.Mesh,
    *,
    sequence_length: int,
    batch_size: int,
) -> np.ndarray:
    """The log-probability of each token of the pairs' answers, as `PairCorpus.reference_X`."""

    def of_batch(params, batch):
        x_BTD, _ = objective.hidden_states(params, batch, None, config)
        return -objective.token_losses(params, x_BTD, batch)

    replicated = jax.NamedSharding(mesh, jax.P())
    compiled = meshes.under(mesh, jax.jit(of_batch, out_shardings=replicated))
    plan = PairPlan(pairs.pairs, sequence_length=sequence_length, seed=0, shuffled=False)
    fed = batches.feed(
        *(batches.one_pass, pairs, plan),
        sharding=jax.NamedSharding(mesh, sharding.BATCH),
        batch_size=batch_size,
        columns=pairs.columns,
    )
    found_X = np.zeros(len(pairs.tokens_X), np.float32)
    rows = (row for batch in fed for row in np.asarray(compiled(params, batch)))
    ends = np.concatenate([[0], pairs.ends_R])
    for pair, row_T in zip(range(plan.rows_per_epoch), rows, strict=False):
        at = 0
        for record in (2 * pair, 2 * pair + 1):
            length = int(pairs.pairs[record])
            there = slice(int(ends[record]) + 1, int(ends[record + 1]))
            found_X[there] = row_T[at : at + length] * pairs.weights(record)
            at += length
    return found_X


def with_reference(
    pairs: PairCorpus,
    config: model.ModelConfig,
    params: dict,
    mesh: jax.sharding.Mesh,
    *,
    cache: pathlib.Path,
    sequence_length: int,
    batch_size: int,
) -> PairCorpus:
    """The pairs with the reference's log-probabilities, from the folder `cache` if it has them.

    They are stored under a hash of the model's config and parameters, the pairs and the row length.
    """
    digests = checkpoint.digests(tree.flatten(params))
    key = [FORMAT, repr(config), sorted(digests.items()), pairs.digest, sequence_length]
    path = cache / "references" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.npy"
    known_X = _read(path, pairs)
    if not all(distributed.exchange(known_X is not None)):  # the processes compute together
        number = f"{len(pairs.pairs) // 2:,}"
        distributed.say(f"computing the reference's log-probabilities of {number} pairs")
        known_X = log_probs(
            *(pairs, config, params, mesh), sequence_length=sequence_length, batch_size=batch_size
        )
        with distributed.together(ValueError), writing(cache):
            if distributed.is_first():
                path.parent.mkdir(parents=True, exist_ok=True)
                with files.whole_file(path) as unfinished, open(unfinished, "wb") as file:
                    np.save(file, known_X)
    return dataclasses.replace(pairs, reference_X=known_X)


def _read(path: pathlib.Path, pairs: PairCorpus) -> np.ndarray | None:
    try:
        known_X = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # missing or damaged: it is computed anew
        return None
    fits = known_X.shape == pairs.tokens_X.shape and known_X.dtype == np.float32
    return known_X if fits and np.isfinite(known_X).all() else None
