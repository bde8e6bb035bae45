"""Records every routing decision of a model on a text, with one layer of the model in memory.

Each layer's weights are read once. The hidden states of all tokens lie on disk: a layer reads them
in chunks from one file and writes its output to another one. A recording that was killed goes on
after its last finished layer.
"""

import dataclasses
import functools
import hashlib
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe_jax import tree
from moe_jax.analysis import decisions
from moe_jax.data.batches import Batch
from moe_jax.model import layers, layout, transformer
from moe_jax.model.config import MOE, ModelConfig
from moe_jax.model.router import ROUTERS

CHUNK_TOKENS = 4096  # with top-8 and 2048 channels, the rows of a chunk's experts take 270 MB
_LOGIT_ROWS = 256  # tokens whose logits are in memory: 160 MB for 152,000 ids


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's parameters, read leaf by leaf.

    paths: those of all leaves. leaf: (path, slices of the leading axes) -> array, in its own dtype.
    fingerprint: equal for equal weights.
    """

    config: ModelConfig
    paths: Collection[str]
    leaf: Callable[[str, tuple[slice, ...]], np.ndarray]
    fingerprint: str


def check(config: ModelConfig) -> None:
    """Raises: ValueError for a model that does not route single tokens."""
    if not config.num_experts:
        raise ValueError("the model is dense: it has no routing to analyse; give a mixture")
    if config.dispatch == "merge":
        raise ValueError(
            "the model merges its experts (dispatch='merge'): no token is routed to an expert, so "
            "there is nothing to count"
        )


def facts(
    weights: Weights, chunks: Sequence[Batch], labels: Sequence[str], *, model: str, text: str
) -> decisions.Facts:
    """Describes a recording of this model on these chunks of rows; `model` and `text` are names."""
    config = weights.config
    chooses = not ROUTERS[config.router].causal  # experts choose tokens: a token may have all
    return decisions.Facts(
        model=model,
        text=text,
        labels=tuple(labels),
        layers=tuple(layout.sparse_layers(config)),
        num_hidden_layers=config.num_hidden_layers,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts if chooses else config.num_experts_per_tok,
        vocab_size=config.vocab_size,
        num_tokens=sum(int(np.count_nonzero(chunk.segment_ids_BT)) for chunk in chunks),
        model_digest=model_digest(weights),
        text_digest=text_digest(chunks, labels),
    )


def model_digest(weights: Weights) -> str:
    """A hash of the model's config and its weights' fingerprint."""
    named = dataclasses.asdict(weights.config), weights.fingerprint
    return hashlib.sha256(repr(named).encode()).hexdigest()


def text_digest(chunks: Sequence[Batch], labels: Sequence[str]) -> str:
    """A hash of the rows that does not depend on how many of them are in a chunk."""
    digest = hashlib.sha256(repr(tuple(labels)).encode())
    for chunk in chunks:
        arrays = (chunk.tokens_BT, chunk.targets_BT, chunk.segment_ids_BT, chunk.labels_BT)
        for row in np.stack(arrays, axis=1).astype(np.int32):  # [4, T]
            if row[2].any():
                digest.update(row.tobytes())
    return digest.hexdigest()


def record(
    weights: Weights,
    chunks: Sequence[Batch],
    facts: decisions.Facts,
    folder: pathlib.Path,
    *,
    after_layer: Callable[[int], None] = lambda layer: None,
) -> None:
    """Records the decisions into a folder, which may hold an unfinished recording of the same.

    Args: chunks: rows of one shape, all in memory as ids. after_layer: called with its index.

    Raises: ValueError if the folder holds a recording of something else, or the disk has no room
      for the hidden states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, config = _begun(folder, facts), weights.config
    hidden = _Hidden(folder, chunks[0].tokens_BT.shape, config)
    if decisions.TOKENS in state.digests:
        hidden.remove()  # which a process that was killed may have left
        return
    if not state.finished:
        hidden.check_room(len(chunks))
    total = len(chunks) * (config.num_hidden_layers + 1)
    with tqdm.tqdm(
        desc="routing",
        total=total,
        initial=len(chunks) * state.finished,
        unit="chunk",
        disable=None,
    ) as progress:
        if not state.finished:
            hidden.write(0, _embedded(weights, chunks))
        for layer in range(state.finished, config.num_hidden_layers):
            state = _record_layer(weights, chunks, hidden, folder, state, layer, progress)
            after_layer(layer)
        path = folder / decisions.TOKENS
        with decisions.writing(path, facts.token_dtype, facts.num_tokens) as append:
            for chunk, predicted_BT in _predictions(weights, chunks, hidden):
                append(_ids(chunk, predicted_BT, facts))
                progress.update()
    digests = {**state.digests, path.name: decisions.digest_of(path)}
    decisions.write_state(folder, dataclasses.replace(state, digests=digests))
    hidden.remove()


def _begun(folder: pathlib.Path, facts: decisions.Facts) -> decisions.State:
    state = decisions.read_state(folder)
    if state is None:
        if any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; choose another folder or remove it")
        decisions.write_state(folder, state := decisions.State(facts))
    named = {name: getattr(facts, name) for name in ("model", "text")}
    if dataclasses.replace(state.facts, **named) != facts:
        raise ValueError(
            f"{folder} holds the routing of {_names(state.facts)}, or with other options, not of "
            f"{_names(facts)}; choose another folder or remove it"
        )
    return state


def _names(facts: decisions.Facts) -> str:
    return f"{decisions.short(facts.model)} on {decisions.short(facts.text)}"


class _Hidden:
    """The hidden states of all chunks before a layer, in one of two files."""

    def __init__(self, folder: pathlib.Path, rows: tuple[int, ...], config: ModelConfig):
        self._folder, self._shape = folder, (*rows, config.hidden_size)
        self._dtype = jnp.dtype(config.dtype)

    def _path(self, layer: int) -> pathlib.Path:
        return self._folder / f"hidden_{layer % 2}.bin"

    def check_room(self, num_chunks: int) -> None:
        needed = 2 * num_chunks * int(np.prod(self._shape)) * self._dtype.itemsize
        if (free := shutil.disk_usage(self._folder).free) < needed:
            raise ValueError(
                f"{self._folder} has {free / 1e9:.1f} GB free, but the hidden states take "
                f"{needed / 1e9:.1f} GB; lower --max_tokens or choose another folder"
            )

    def write(self, layer: int, parts: Iterator[jax.Array]) -> None:
        with self._path(layer).open("wb") as file:
            for x_BTD in parts:
                # As bytes, because numpy's tofile knows no bfloat16.
                file.write(np.asarray(x_BTD).reshape(-1).view(np.uint8).data)

    def read(self, layer: int) -> Iterator[np.ndarray]:
        size = int(np.prod(self._shape)) * self._dtype.itemsize
        with self._path(layer).open("rb") as file:
            while part := file.read(size):
                yield np.frombuffer(part, self._dtype).reshape(self._shape)

    def remove(self) -> None:
        for layer in (0, 1):
            self._path(layer).unlink(missing_ok=True)


def _embedded(weights: Weights, chunks: Sequence[Batch]) -> Iterator[jax.Array]:
    paths = [path for path in weights.paths if path.startswith("embed/")]
    params = {path.removeprefix("embed/"): jnp.asarray(weights.leaf(path, ())) for path in paths}
    for chunk in chunks:
        yield _embed(params, chunk.tokens_BT, chunk.positions_BT, weights.config)


_embed = jax.jit(transformer.embed, static_argnums=3)


def _record_layer(weights, chunks, hidden, folder, state, layer, progress) -> decisions.State:
    config, facts = weights.config, state.facts
    run = functools.partial(_block, config=config, kind=config.block_kinds[layer])
    stack, index, num_dropped = _read_layer(weights, layer), jnp.int32(layer), 0

    def outputs(append):
        nonlocal num_dropped
        for chunk, x_BTD in zip(chunks, hidden.read(layer), strict=True):
            x_BTD, routing, dropped = run(
                x_BTD, stack, index, chunk.positions_BT, chunk.segment_ids_BT
            )
            if routing is not None:
                append(_records(routing, chunk, facts))
                num_dropped += int(dropped)
            yield x_BTD
            progress.update()

    if layer not in facts.layers:
        hidden.write(layer + 1, outputs(None))
        state = dataclasses.replace(state, finished=layer + 1)
    else:
        path = folder / decisions.layer_file(layer)
        with decisions.writing(path, facts.layer_dtype, facts.num_tokens) as append:
            hidden.write(layer + 1, outputs(append))
        state = decisions.State(
            facts,
            finished=layer + 1,
            digests={**state.digests, path.name: decisions.digest_of(path)},
            num_dropped={**state.num_dropped, layer: num_dropped},
        )
    decisions.write_state(folder, state)
    return state


def _read_layer(weights: Weights, layer: int) -> dict:
    """One layer's parameters as stacks of one layer, so that products read them where they lie."""
    slot, row = layout.slots(weights.config.block_kinds)[layer]
    prefix, index = f"blocks/{slot}/", (slice(row, row + 1),)
    own = [path for path in weights.paths if path.startswith(prefix)]
    return tree.unflatten(
        {path.removeprefix(prefix): jnp.asarray(weights.leaf(path, index)) for path in own}
    )


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _block(x_BTD, stack, index, positions_BT, segment_ids_BT, *, config, kind):
    params = jax.tree.map(lambda leaf: leaf[0], stack)
    x_BTD, output = transformer.block(
        x_BTD,
        layout.rows_of_stacks(params, stack, jnp.int32(0)),
        {"index": index},
        transformer.Shared(positions_BT, segment_ids_BT),
        config=config,
        kind=kind,
        return_routing=kind.feed_forward == MOE,
    )
    if output.stats is None:
        return x_BTD, None, None
    routing = output.stats.routing
    P = min(decisions.MOST_PROBABILITIES, config.num_experts)
    largest_BTP = jax.lax.top_k(routing.probabilities_ME, P)[0]
    chosen = routing.expert_index_MA, routing.weight_MA, largest_BTP
    return x_BTD, chosen, output.stats.num_dropped.sum()


def _records(routing, chunk: Batch, facts: decisions.Facts) -> np.ndarray:
    """The records of a chunk's tokens without padding."""
    valid_BT = np.asarray(chunk.segment_ids_BT) > 0
    expert_NA, weight_NA, probability_NP = (np.asarray(x)[valid_BT] for x in routing)
    # Most routers give this order; one whose selection has a bias does not. Unused slots are last.
    used_NA = np.where(expert_NA < facts.num_experts, weight_NA, -np.inf)
    order_NA = np.argsort(-used_NA, axis=1, kind="stable")
    records = np.empty(len(expert_NA), facts.layer_dtype)
    records["expert"] = np.take_along_axis(expert_NA, order_NA, axis=1)
    records["weight"] = np.take_along_axis(weight_NA, order_NA, axis=1)
    records["probability"] = probability_NP
    return records


def _predictions(weights: Weights, chunks, hidden: _Hidden) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each chunk with the most probable next id at each of its positions, [B, T]."""
    config, paths = weights.config, ("final_norm/scale", "final_norm/bias", "unembed")
    params = {path: jnp.asarray(weights.leaf(path, ())) for path in paths if path in weights.paths}
    if "unembed" not in params:
        params["embed/tokens"] = jnp.asarray(weights.leaf("embed/tokens", ()))
    for chunk, x_BTD in zip(chunks, hidden.read(config.num_hidden_layers), strict=True):
        yield chunk, np.asarray(_predict(x_BTD, tree.unflatten(params), config))


@functools.partial(jax.jit, static_argnames="config")
def _predict(x_BTD, params, config):
    x_BTD = layers.norm(x_BTD, params["final_norm"], config)
    unembed_DV = transformer.unembedding(params).astype(x_BTD.dtype)

    def of_token(x_D):
        logits_V = jnp.matmul(x_D, unembed_DV, preferred_element_type=jnp.float32)
        return jnp.argmax(logits_V).astype(jnp.int32)

    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    return jax.lax.map(of_token, x_MD, batch_size=_LOGIT_ROWS).reshape(x_BTD.shape[:2])


def _ids(chunk: Batch, predicted_BT: np.ndarray, facts: decisions.Facts) -> np.ndarray:
    valid_BT = np.asarray(chunk.segment_ids_BT) > 0
    records = np.empty(int(valid_BT.sum()), facts.token_dtype)
    columns = chunk.labels_BT, chunk.tokens_BT, chunk.targets_BT, predicted_BT
    for name, column_BT in zip(decisions.IDS, columns, strict=True):
        records[name] = np.asarray(column_BT)[valid_BT]
    return records
