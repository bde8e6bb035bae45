"""A parent's statistics for recipes and router initialisers: measured on text, kept in a file.

Each statistic is an array with a leading axis of all layers; `plan.STATISTICS` has their shapes.
"""

import functools
import itertools
import pathlib
import zipfile
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe_jax.model import layers, layout, transformer
from moe_jax.model.config import ModelConfig
from moe_jax.ops import cross_entropy
from moe_jax.upcycle import plan, pruning

SAMPLE = 1024  # number of tokens on which clusters and similarities are measured


def load(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The statistics in a file; raises ValueError if it is missing or has other contents."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(arrays)
    except FileNotFoundError:
        raise ValueError(f"no file {path}; make it with scripts/collect_statistics.py") from None
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path} is not a file of scripts/collect_statistics.py") from None
    if not set(found) <= set(plan.STATISTICS):
        raise ValueError(f"{path} holds {', '.join(found)}; known are {', '.join(plan.STATISTICS)}")
    return found


def of_mixture(params: dict, config: ModelConfig, tokens_NBT: Sequence) -> dict[str, np.ndarray]:
    """`load`, `similarity` and `utility` of an MoE's experts on N batches of tokens.

    Similarity is the linear CKA (Kornblith et al., arXiv 1905.00414) of the experts' outputs for
    the same tokens (Zhang et al., arXiv 2407.09590); utility is the sum of squared gradients of the
    loss with respect to an expert's weights (arXiv 2604.19835).

    Raises: ValueError for tokens that this model cannot read.
    """
    check_tokens(config, tokens_NBT)
    L, E = config.num_hidden_layers, config.num_experts
    found = {
        "load": np.zeros((L, E)),
        "similarity": np.zeros((L, E, E)),
        "utility": np.zeros((L, E)),
    }
    batches = tqdm.tqdm(tokens_NBT, "experts", unit="batch", disable=None)
    for number, tokens_BT in enumerate(batches):
        for layer, params_of_layer, x_MD, load_E in _layers(params, tokens_BT, config):
            if load_E is None:
                continue
            found["load"][layer] += load_E
            if number == 0:
                found["similarity"][layer] = cka_of_experts(
                    x_MD[:SAMPLE], params_of_layer["experts"], config
                )
    for tokens_BT in tqdm.tqdm(tokens_NBT, "gradients", unit="batch", disable=None):
        grads = _gradient(params, jnp.asarray(tokens_BT), config)
        for layer in layout.sparse_layers(config):
            grads_E = layout.layer(grads, config, layer, "moe", "experts")
            found["utility"][layer] += expert_utility(grads_E)
    return found


def of_dense(
    params: dict,
    config: ModelConfig,
    tokens_NBT: Sequence,
    *,
    num_experts: int,
    neurons: str,
    num_neurons: int | None = None,
) -> dict[str, np.ndarray]:
    """`centroids` of the feed-forwards' inputs, and the `neurons` of each of `num_experts` experts.

    Args:
      neurons: "weights" or "activations" gives balanced clusters of the neurons by their inner
        weights or by their activations on the text. "gradient" gives each expert the neurons that
        are most important on one part of the text, by `neuron_importance`; experts may share
        neurons. All are LLaMA-MoE's (Zhu et al., arXiv 2406.16554, §3.1), which calls the last one
        inner sharing.
      num_neurons: the number of neurons per expert with "gradient"; by default, and in all other
        cases, it is the E-th part of all neurons.

    Raises: ValueError for an impossible number of neurons, tokens that this model cannot read, or
      too few tokens for this number of experts.
    """
    E, L, F = num_experts, config.num_hidden_layers, config.intermediate_size
    size = F // E if num_neurons is None else num_neurons
    _check(
        _problems_of_tokens(config, tokens_NBT),
        _problems_of_neurons(config, tokens_NBT, size, E, neurons, num_neurons),
    )
    found = {
        "centroids": np.zeros((L, E, config.hidden_size)),
        "neurons": np.zeros((L, E, size), np.int64),
    }
    inputs = _layers(params, tokens_NBT[0], config)
    for layer, ffn, x_MD, _ in tqdm.tqdm(inputs, "clusters", L, unit="layer", disable=None):
        sample_MD = np.asarray(x_MD[:SAMPLE], np.float64)
        groups = balanced_clusters(sample_MD[: len(sample_MD) // E * E], E, seed=layer)
        found["centroids"][layer] = [sample_MD[group].mean(axis=0) for group in groups]
        if neurons != "gradient":
            features_FX = _features(neurons, ffn, x_MD[:SAMPLE], config)
            found["neurons"][layer] = balanced_clusters(features_FX[: E * size], E, seed=layer)
    if neurons == "gradient":
        importance = np.zeros((L, E, F))
        batches = tqdm.tqdm(tokens_NBT, "gradients", unit="batch", disable=None)
        for number, tokens_BT in enumerate(batches):
            importance[:, number % E] += _importance(params, jnp.asarray(tokens_BT), config)
        found["neurons"] = pruning.best(importance, size)
    return found


def expert_utility(grads_E: dict) -> np.ndarray:
    """[E]: the sum of each expert's squared gradients."""
    own = [np.square(_exact(g)).sum(axis=tuple(range(1, g.ndim))) for g in grads_E.values()]
    return np.sum(own, axis=0)


def neuron_importance(
    x_MD: jax.Array, gradient_MD: jax.Array, ffn: dict, config: ModelConfig
) -> jax.Array:
    """[F]: the sum over tokens of |h · dL/dh|, where h is the input of the down projection.

    For each token this is the first-order change of the loss L if the neuron were set to zero (Zhu
    et al., LLaMA-MoE, arXiv 2406.16554, §3.1).

    Args: x_MD: the feed-forward's inputs. gradient_MD: the loss's gradient at its outputs.
    """
    h_MF = hidden_neurons(x_MD.astype(jnp.float32), ffn, config)
    gradient_MF = gradient_MD.astype(jnp.float32) @ ffn["down"].astype(jnp.float32).T
    return jnp.sum(jnp.abs(h_MF * gradient_MF), axis=0)


def hidden_neurons(x_MD: jax.Array, ffn: dict, config: ModelConfig) -> jax.Array:
    """[M, F]: the input of the down projection."""
    inner = [name for name in ("gate", "up") if name in ffn]
    hidden = (layers.add_bias(x_MD @ ffn[n].astype(x_MD.dtype), ffn, f"{n}_bias") for n in inner)
    return layers.activate(tuple(hidden), config)


@functools.partial(jax.jit, static_argnames="config")
def cka_of_experts(x_MD: jax.Array, experts_E: dict, config: ModelConfig) -> jax.Array:
    """[E, E]: linear CKA of the experts' outputs for all of these tokens."""

    def gram(ffn):
        y_MD = layers.feed_forward(x_MD, ffn, config).astype(jnp.float32)
        y_MD -= jnp.mean(y_MD, axis=0)
        gram_MM = y_MD @ y_MD.T
        return gram_MM / jnp.maximum(jnp.linalg.norm(gram_MM), jnp.finfo(jnp.float32).tiny)

    gram_EX = jax.lax.map(gram, experts_E).reshape(config.num_experts, -1)
    return gram_EX @ gram_EX.T


def loss(params: dict, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """The mean cross-entropy, in nats, of the tokens after the first one of each row."""
    inputs_BT, unembed_DV = tokens_BT[:, :-1], transformer.unembedding(params)
    shared = one_document(inputs_BT)
    x_BTD, _ = transformer.hidden_states(params, inputs_BT, shared, config)
    return cross_entropy.token_losses(x_BTD, unembed_DV, tokens_BT[:, 1:]).mean()


def balanced_clusters(points_NX: np.ndarray, k: int, *, seed: int, rounds: int = 10) -> np.ndarray:
    """[k, N/k]: the indices of the points in k clusters of equal size, by a balanced k-means.

    Each round assigns points to centres in order of the distance between point and centre, skipping
    centres that are full.
    """
    N = len(points_NX)
    room = N // k
    centres_KX = points_NX[np.random.default_rng(seed).choice(N, k, replace=False)]
    for _ in range(rounds):
        square_NK = ((points_NX**2).sum(axis=1)[:, None] + (centres_KX**2).sum(axis=1)) - (
            2 * points_NX @ centres_KX.T
        )
        cluster_N, left_K = np.full(N, -1), np.full(k, room)
        for pair in np.argsort(square_NK, axis=None, kind="stable"):
            n, c = divmod(int(pair), k)
            if cluster_N[n] < 0 and left_K[c]:
                cluster_N[n], left_K[c] = c, left_K[c] - 1
        groups = np.argsort(cluster_N, kind="stable").reshape(k, room)
        centres_KX = points_NX[groups].mean(axis=1)
    return groups


def check_tokens(config: ModelConfig, tokens_NBT: Sequence) -> None:
    """Raises: ValueError for tokens that this model cannot read."""
    _check(_problems_of_tokens(config, tokens_NBT))


def _check(*problems: Iterator[str]) -> None:
    for problem in itertools.chain(*problems):
        raise ValueError(problem)


def _problems_of_tokens(config: ModelConfig, tokens_NBT: Sequence):
    T = tokens_NBT[0].shape[1]
    if T < 2:
        yield f"rows of {T} token have no next one to predict; use a sequence length of 2 or more"
    config.check_rows(T)
    if (largest := max(int(np.max(tokens_BT)) for tokens_BT in tokens_NBT)) >= config.vocab_size:
        yield (
            f"token {largest} is beyond the {config.vocab_size} of the model; "
            "is this the tokenizer that it was trained with?"
        )


def _problems_of_neurons(config, tokens_NBT, size, E, neurons, num_neurons):
    F = config.intermediate_size
    if not 0 < size <= F or (num_neurons is not None and neurons != "gradient"):
        yield (
            f"{size} of the {F} neurons to each expert cannot be; give neurons='gradient' and "
            f"num_neurons from 1 to {F}, or at most {F} experts"
        )
    if neurons != "gradient" and F % E:
        yield (
            f"{F} neurons are not divisible by num_experts={E}: {F % E} would be in no expert; "
            "use a divisor, or neurons='gradient'"
        )

    N, M = len(tokens_NBT), min(tokens_NBT[0].size, SAMPLE)
    if M < E:
        yield (
            f"num_experts={E} centroids cannot be of {M} tokens (the first {SAMPLE} of a batch at "
            f"most); use larger batches, or at most {M} experts"
        )
    if neurons == "gradient" and N < E:
        yield (
            f"neurons='gradient' needs a batch of text for each of {E} experts, not {N} in all; "
            f"use {E} batches or more"
        )


def _exact(x: jax.Array) -> np.ndarray:
    # numpy adds bfloat16 in bfloat16, where 256 + 1 is 256.
    return np.asarray(x, np.float32)


def _features(neurons: str, ffn: dict, x_MD: jax.Array, config: ModelConfig) -> np.ndarray:
    """[F, X]: each neuron's inner weights or activations, normalised to length one."""
    if neurons == "weights":
        inner = [np.asarray(ffn[n], np.float64).T for n in ("gate", "up") if n in ffn]
        features_FX = np.concatenate(inner, axis=1)
    else:
        features_FX = np.asarray(hidden_neurons(x_MD, ffn, config), np.float64).T
    return features_FX / np.maximum(np.linalg.norm(features_FX, axis=1, keepdims=True), 1e-12)


def _layers(params: dict, tokens_BT: jax.Array, config: ModelConfig) -> Iterator[tuple]:
    """Yields for each layer its feed-forward's parameters, its normalised inputs, and its load."""
    shared = one_document(tokens_BT)
    x_BTD = transformer.embed(params["embed"], tokens_BT, shared.positions_BT, config)
    for layer, kind, block in layout.layers(params, config):
        x_BTD, output = _block(x_BTD, block, {"index": layer}, shared, config=config, kind=kind)
        inputs_MD = output.tapped["feed_forward_input"].reshape(tokens_BT.size, -1)
        load_E = None if output.stats is None else output.stats.tokens_per_expert_E.sum(axis=0)
        yield layer, block.get("moe") or block["mlp"], inputs_MD, load_E


_block = jax.jit(
    functools.partial(transformer.block, taps=("feed_forward_input",)),
    static_argnames=("config", "kind"),
)


def one_document(tokens_BT: jax.Array) -> transformer.Shared:
    """Positions and segment ids for rows that are one document each."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return transformer.Shared(positions_BT, jnp.ones_like(positions_BT))


def _importance(params: dict, tokens_BT: jax.Array, config: ModelConfig) -> np.ndarray:
    """[L, F]: the importance of each neuron of a dense model on these tokens."""
    shared, inputs, found = one_document(tokens_BT[:, :-1]), [], []
    x_BTD = transformer.embed(params["embed"], tokens_BT[:, :-1], shared.positions_BT, config)
    for layer, kind, block in layout.layers(params, config):
        inputs.append(x_BTD)
        x_BTD, _ = _block(x_BTD, block, {"index": layer}, shared, config=config, kind=kind)
    head = (params["final_norm"], transformer.unembedding(params))
    gradient_BTD = _of_head(x_BTD, *head, tokens_BT[:, 1:], config)
    for layer, kind in reversed([*enumerate(config.block_kinds)]):
        block = layout.layer(params, config, layer)
        gradient_BTD, importance_F = _of_block(
            gradient_BTD, inputs.pop(), block, {"index": layer}, shared, config=config, kind=kind
        )
        found.append(importance_F)
    return np.stack(found[::-1])


@functools.partial(jax.jit, static_argnames="config")
def _of_head(x_BTD, final_norm, unembed_DV, targets_BT, config):
    """The loss's gradient at the last block's output."""

    def loss(x_BTD):
        y_BTD = layers.norm(x_BTD, final_norm, config)
        return cross_entropy.token_losses(y_BTD, unembed_DV, targets_BT).mean()

    return jax.grad(loss)(x_BTD)


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _of_block(gradient_BTD, x_BTD, block, *others, config, kind):
    """The loss's gradient at a block's input, and the importance of the block's neurons.

    A block adds its feed-forward's output to the residual stream, so the gradient at that output
    equals the gradient at the block's own output.
    """
    run = functools.partial(_block, config=config, kind=kind)
    _, pull, output = jax.vjp(lambda x_BTD: run(x_BTD, block, *others), x_BTD, has_aux=True)
    both = (output.tapped["feed_forward_input"], gradient_BTD)
    x_MD, gradient_MD = (y_BTD.reshape(-1, config.hidden_size) for y_BTD in both)
    return *pull(gradient_BTD), neuron_importance(x_MD, gradient_MD, block["mlp"], config)


@functools.partial(jax.jit, static_argnames="config")
def _gradient(params, tokens_BT, config):
    return jax.grad(loss)(params, tokens_BT, config)
