"""Continues prompts: a prefill, then one token at a time with a cache of keys and values."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model
from moe_jax.model import transformer
from moe_jax.model.layout import layer_groups
from moe_jax.model.router import ROUTERS

PADDED_TO = 32  # the number of tokens of prompts is rounded up to its multiples


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
    if config.dispatch == "merge":
        raise ValueError("merged experts (dispatch='merge') cannot generate token by token")
    router = ROUTERS[config.router].decodes_as or config.router
    config = dataclasses.replace(config, dispatch="dropless", router=router, remat="none")
    key = jax.random.key(0) if key is None else key
    drawn = _continue(params, tokens_BT, lengths_B, key, temperature, top_p, config, num_tokens)
    return list(np.asarray(drawn))


@functools.partial(jax.jit, static_argnames=("config", "num_tokens"))
def _continue(params, tokens_BT, lengths_B, key, temperature, top_p, config, num_tokens):
    B, T = tokens_BT.shape

    def logits_of(tokens_BT, positions_BT, last_B, cache):
        """The logits at index `last_B` of these tokens, and the cache with these tokens added."""
        is_text_BT = jnp.arange(tokens_BT.shape[1]) <= last_B[:, None]
        shared = transformer.Shared(positions_BT, is_text_BT.astype(jnp.int32))
        x_BTD, _, cache = transformer.run_blocks(params, tokens_BT, shared, config, cache=cache)
        x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
        unembed_DV = transformer.unembedding(params).astype(x_BD.dtype)
        return jnp.matmul(x_BD, unembed_DV, preferred_element_type=jnp.float32), cache

    def draw(logits_BV, i):
        return sample(logits_BV, jax.random.fold_in(key, i), temperature, top_p)

    def step(carry, i):
        token_B, cache = carry
        # A shorter prompt's padding in the cache is overwritten before any query attends to it.
        position_B1 = (lengths_B + i - 1)[:, None]
        zero_B = jnp.zeros_like(lengths_B)
        logits_BV, cache = logits_of(token_B[:, None], position_B1, zero_B, cache)
        token_B = draw(logits_BV, i)
        return (token_B, cache), token_B

    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    cache = _empty(config, B, T + num_tokens)
    logits_BV, cache = logits_of(tokens_BT, positions_BT, lengths_B - 1, cache)
    first_B = draw(logits_BV, 0)
    _, token_NB = jax.lax.scan(step, (first_B, cache), jnp.arange(1, num_tokens))
    return jnp.concatenate([first_B[None], token_NB]).T


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
