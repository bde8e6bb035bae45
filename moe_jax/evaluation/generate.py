"""Continues prompts: a prefill, then one token at a time with a cache of keys and values."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model
from moe_jax.model import transformer
from moe_jax.model.layout import layer_groups
from moe_jax.model.router import ROUTERS

PADDED_TO = 32  # the number of tokens of prompts is rounded up to its multiples
PIECE = 16  # tokens that `generate_until` computes before it looks for the end of a text


def generate(
    params: dict,
    config: model.ModelConfig,
    prompts: list[np.ndarray],
    *,
    num_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    key: jax.Array | None = None,
) -> list[np.ndarray]:
    """Generates `num_tokens` token ids after each prompt.

    The model is dropless whatever the config says, because a token must not depend on the
    tokens computed with it. For the same reason an expert-choice router is replaced by a
    token-choice router.

    Args:
      temperature: 0 takes the most probable token, and needs no key.
      top_p: samples from the smallest set of tokens with at least this total probability (nucleus
        sampling, Holtzman et al., arXiv 1904.09751).
      key: a row's samples depend only on it and on the row's index among the prompts.

    Raises: ValueError for no prompts or an empty one, ids beyond the vocabulary, settings out of
      range, or a text longer than the learned positions.
    """
    config, tokens_BT, lengths_B = _checked(config, prompts, num_tokens, temperature, top_p)
    key = jax.random.key(0) if key is None else key
    drawn = _continue(params, tokens_BT, lengths_B, key, temperature, top_p, config, num_tokens)
    return list(np.asarray(drawn))


def generate_until(
    params: dict,
    config: model.ModelConfig,
    prompts: list[np.ndarray],
    ended: Callable[[np.ndarray], bool],
    *,
    num_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    length: int = 0,
    rows: int = 0,
) -> list[np.ndarray]:
    """`generate`, a piece at a time, until `ended(ids)` is true of the new ids of each row.

    Args:
      length: pads the prompts to this number of tokens, so that batches share compiled code.
      rows: the number of prompts that are wanted; the others only fill the batch. 0 is all.

    Returns: at most `num_tokens` ids of each wanted row, possibly some beyond its end.
    """
    config, tokens_BT, lengths_B = _checked(config, prompts, num_tokens, temperature, top_p)
    tokens_BT = np.pad(tokens_BT, ((0, 0), (0, max(0, length - tokens_BT.shape[1]))))
    sampling = _Sampling(jax.random.key(0) if key is None else key, temperature, top_p)
    num_pieces = -(-(num_tokens - 1) // PIECE)  # after the first token
    slots = tokens_BT.shape[1] + 1 + num_pieces * PIECE
    token_B, cache = _begin(params, tokens_BT, lengths_B, sampling, config, slots)
    rows = rows or len(prompts)
    found_BN = np.asarray(token_B)[:rows, None]
    for piece in range(num_pieces):
        if all(map(ended, found_BN)):
            break
        first = 1 + piece * PIECE
        (token_B, cache), more_NB = _extend(
            params, token_B, cache, lengths_B, first, sampling, config, PIECE
        )
        found_BN = np.concatenate([found_BN, np.asarray(more_NB).T[:rows]], axis=1)
    return list(found_BN[:, :num_tokens])


def independent(config: model.ModelConfig) -> model.ModelConfig:
    """The model in which a token depends neither on later tokens nor on other rows.

    Raises: ValueError for merged experts, which have no such form.
    """
    if config.dispatch == "merge":
        raise ValueError(
            "merged experts (dispatch='merge') cannot generate token by token, nor score a "
            "continuation: the experts of a segment are merged by the segment before"
        )
    router = ROUTERS[config.router].decodes_as or config.router
    return dataclasses.replace(config, dispatch="dropless", router=router, remat="none")


def _checked(config, prompts, num_tokens, temperature, top_p):
    """The independent model, the padded prompts and their lengths; raises as `generate` does."""
    if not (0 <= temperature < math.inf and 0 < top_p <= 1):
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}: use at least 0, and more than 0 up to 1"
        )
    if not prompts:
        raise ValueError("there is no prompt")
    lengths_B = np.array([len(prompt) for prompt in prompts])
    if not lengths_B.all():
        raise ValueError("a prompt has no token; begin it with the tokenizer's begin token")
    if (largest := max(int(np.max(prompt)) for prompt in prompts)) >= config.vocab_size:
        raise ValueError(
            f"token {largest} is beyond the {config.vocab_size} of the model; "
            "is this the tokenizer that it was trained with?"
        )
    longest = int(lengths_B.max())
    fix = f"the longest prompt has {longest}; ask for fewer tokens after it"
    config.check_rows(longest + num_tokens, fix)
    # Prompts of similar lengths share a compiled program; what they are padded with is not routed.
    padded = -(-longest // PADDED_TO) * PADDED_TO
    if config.position_embedding == "learned":
        padded = min(padded, config.max_position_embeddings)
    tokens_BT = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    return independent(config), tokens_BT, lengths_B


class _Sampling(NamedTuple):
    key: jax.Array
    temperature: float
    top_p: float

    def draw(self, logits_BV, i):
        return sample(logits_BV, jax.random.fold_in(self.key, i), self.temperature, self.top_p)


@functools.partial(jax.jit, static_argnames=("config", "num_tokens"))
def _continue(params, tokens_BT, lengths_B, key, temperature, top_p, config, num_tokens):
    slots, sampling = tokens_BT.shape[1] + num_tokens, _Sampling(key, temperature, top_p)
    first_B, cache = _begin(params, tokens_BT, lengths_B, sampling, config, slots)
    rest = params, first_B, cache, lengths_B, 1, sampling, config, num_tokens - 1
    _, token_NB = _extend(*rest)
    return jnp.concatenate([first_B[None], token_NB]).T


@functools.partial(jax.jit, static_argnames=("config", "slots"), inline=True)
def _begin(params, tokens_BT, lengths_B, sampling, config, slots):
    """The first token after each prompt, and the cache with the prompts in it."""
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    cache = _empty(config, B, slots)
    at_BT = tokens_BT, positions_BT
    logits_BV, cache = _logits_of(params, *at_BT, lengths_B - 1, cache, config)
    return sampling.draw(logits_BV, 0), cache


@functools.partial(
    jax.jit, static_argnames=("config", "number"), donate_argnames="cache", inline=True
)
def _extend(params, token_B, cache, lengths_B, first, sampling, config, number):
    """((the last token, the cache), tokens [number, B]): those of the indices from `first` on."""

    def step(carry, i):
        token_B, cache = carry
        # A shorter prompt's padding in the cache is overwritten before any query attends to it.
        position_B1 = (lengths_B + i - 1)[:, None]
        zero_B = jnp.zeros_like(lengths_B)
        at_B1 = token_B[:, None], position_B1
        logits_BV, cache = _logits_of(params, *at_B1, zero_B, cache, config)
        token_B = sampling.draw(logits_BV, i)
        return (token_B, cache), token_B

    return jax.lax.scan(step, (token_B, cache), first + jnp.arange(number))


def _logits_of(params, tokens_BT, positions_BT, last_B, cache, config):
    """The logits at index `last_B` of these tokens, and the cache with these tokens added."""
    is_text_BT = jnp.arange(tokens_BT.shape[1]) <= last_B[:, None]
    shared = transformer.Shared(positions_BT, is_text_BT.astype(jnp.int32))
    x_BTD, _, cache = transformer.run_blocks(params, tokens_BT, shared, config, cache=cache)
    x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
    unembed_DV = transformer.unembedding(params).astype(x_BD.dtype)
    return jnp.matmul(x_BD, unembed_DV, preferred_element_type=jnp.float32), cache


def _empty(config: model.ModelConfig, B: int, S: int) -> dict:
    E = config.num_attention_experts
    shape = (*((E,) if E else ()), B, S, config.num_kv_heads, config.head_size)
    return {
        slot: {n: jnp.zeros((len(layers), *shape), config.dtype) for n in ("k", "v")}
        for group in layer_groups(config.block_kinds)
        for slot, layers in group.layers.items()
    }


def sample(logits_BV: jax.Array, key: jax.Array, temperature, top_p) -> jax.Array:
    """Samples a token for each row, [B]; the most probable at temperature 0. Settings may be
    traced."""
    return jax.lax.cond(
        temperature > 0,
        lambda: _drawn(logits_BV, key, temperature, top_p),
        lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    )


def _drawn(logits_BV, key, temperature, top_p):
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits_BV)))
    below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)  # prevents overflow
    scaled_BV = below_BV / jnp.maximum(temperature, 1e-30)
    order_BV = jnp.argsort(-scaled_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=-1) - jax.nn.softmax(sorted_BV)
    # The most probable token is always kept, whatever top_p is.
    kept_BV = (before_BV < top_p) | (jnp.arange(logits_BV.shape[-1]) == 0)
    place_B = jax.vmap(jax.random.categorical)(rows, jnp.where(kept_BV, sorted_BV, -jnp.inf))
    return jnp.take_along_axis(order_BV, place_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
