"""Continues prompts: a prefill, then one token at a time with a cache of keys and values."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model
from moe_jax.evaluation.sampling import GREEDY, Sampling, check, draw
from moe_jax.model import transformer
from moe_jax.model.layout import layer_groups
from moe_jax.model.router import ROUTERS

PADDED_TO = 32  # tokens; the least step between the lengths to which prompts are padded
PIECE = 16  # tokens that `pieces` computes at a time


def generate(
    params: dict,
    config: model.ModelConfig,
    prompts: list[np.ndarray],
    *,
    num_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
) -> list[np.ndarray]:
    """Generates `num_tokens` token ids after each prompt.

    The model is dropless whatever the config says, because a token must not depend on the
    tokens computed with it. For the same reason an expert-choice router is replaced by a
    token-choice router.

    Args:
      key: a row's samples depend only on it and on the row's index among the prompts; greedy
        generation needs none.

    Raises: ValueError for no prompts or an empty one, ids beyond the vocabulary, settings out of
      range, or a text longer than the learned positions.
    """
    config, tokens_BT, lengths_B = _checked(config, prompts, num_tokens, sampling)
    drawing = _Drawing(jax.random.key(0) if key is None else key, sampling)
    return list(np.asarray(_continue(params, tokens_BT, lengths_B, drawing, config, num_tokens)))


def pieces(
    params: dict,
    config: model.ModelConfig,
    prompts: list[np.ndarray],
    *,
    num_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    length: int = 0,
    piece: int = PIECE,
) -> Iterator[np.ndarray]:
    """`generate` as a stream: the first token of each row [B, 1], and then `piece` more at a time.

    Args:
      length: pads the prompts to this number of tokens, so that batches share compiled code.

    Yields: new ids [B, N] of all rows, at least `num_tokens` of each in all.
    """
    config, tokens_BT, lengths_B = _checked(config, prompts, num_tokens, sampling)
    tokens_BT = np.pad(tokens_BT, ((0, 0), (0, max(0, length - tokens_BT.shape[1]))))
    drawing = _Drawing(jax.random.key(0) if key is None else key, sampling)
    firsts = range(1, num_tokens, piece)
    slots = tokens_BT.shape[1] + 1 + len(firsts) * piece
    drawn = _begin(params, tokens_BT, lengths_B, drawing, config, slots)
    yield np.asarray(drawn.token_B)[:, None]
    for first in firsts:
        drawn, more_NB = _extend(params, drawn, lengths_B, first, drawing, config, piece)
        yield np.asarray(more_NB).T


def generate_until(
    params: dict,
    config: model.ModelConfig,
    prompts: list[np.ndarray],
    ended: Callable[[np.ndarray], bool],
    *,
    num_tokens: int,
    rows: int = 0,
    **how: Any,
) -> list[np.ndarray]:
    """`pieces` until `ended(ids)` is true of the new ids of each row.

    Args:
      rows: the number of prompts that are wanted; the others only fill the batch. 0 is all.
      how: the other arguments of `pieces`.

    Returns: at most `num_tokens` ids of each wanted row, possibly some beyond its end.
    """
    rows = rows or len(prompts)
    found_BN = np.zeros((rows, 0), np.int32)
    for more_BN in pieces(params, config, prompts, num_tokens=num_tokens, **how):
        found_BN = np.concatenate([found_BN, more_BN[:rows]], axis=1)
        if all(map(ended, found_BN)):
            break
    return list(found_BN[:, :num_tokens])


def before_end(ids: np.ndarray, end_ids: Sequence[int]) -> np.ndarray:
    """The ids before the first one that ends a text."""
    return ids[~np.logical_or.accumulate(np.isin(ids, end_ids))]


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


def padded_length(length: int) -> int:
    """The length to which prompts are padded, so that similar ones share a compiled program.

    It has four steps from one power of 2 to the next, so that at most a fifth of it is padding
    beyond 128 tokens, and prompts of up to 4,096 tokens have 24 lengths.
    """
    step = max(PADDED_TO, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def _checked(config, prompts, num_tokens, sampling):
    """The independent model, the padded prompts and their lengths; raises as `generate` does."""
    check(sampling)
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
    # What prompts are padded with is not routed.
    padded = padded_length(longest)
    if config.position_embedding == "learned":
        padded = min(padded, config.max_position_embeddings)
    tokens_BT = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    return independent(config), tokens_BT, lengths_B


class _Drawing(NamedTuple):
    key: jax.Array
    sampling: Sampling

    def draw(self, logits_BV, i, seen_BV):
        return draw(logits_BV, self.sampling, jax.random.fold_in(self.key, i), seen_BV)


class _Drawn(NamedTuple):
    """The last token, the cache with all tokens before it, and the tokens that a text has."""

    token_B: jax.Array
    cache: dict
    seen_BV: jax.Array

    @classmethod
    def of(cls, token_B, cache, seen_BV):
        return cls(token_B, cache, seen_BV.at[jnp.arange(len(token_B)), token_B].set(True))


@functools.partial(jax.jit, static_argnames=("config", "num_tokens"))
def _continue(params, tokens_BT, lengths_B, drawing, config, num_tokens):
    slots = tokens_BT.shape[1] + num_tokens
    drawn = _begin(params, tokens_BT, lengths_B, drawing, config, slots)
    _, token_NB = _extend(params, drawn, lengths_B, 1, drawing, config, num_tokens - 1)
    return jnp.concatenate([drawn.token_B[None], token_NB]).T


@functools.partial(jax.jit, static_argnames=("config", "slots"), inline=True)
def _begin(params, tokens_BT, lengths_B, drawing, config, slots):
    """The first token after each prompt, with the prompts in the cache."""
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    cache = _empty(config, B, slots)
    at_BT = tokens_BT, positions_BT
    logits_BV, cache = _logits_of(params, *at_BT, lengths_B - 1, cache, config)
    # Padding sets the last column, which is cut off.
    there_BT = jnp.where(positions_BT < lengths_B[:, None], tokens_BT, config.vocab_size)
    seen_BV = jnp.zeros((B, config.vocab_size + 1), bool).at[jnp.arange(B)[:, None], there_BT]
    seen_BV = seen_BV.set(True)[:, :-1]
    return _Drawn.of(drawing.draw(logits_BV, 0, seen_BV), cache, seen_BV)


@functools.partial(
    jax.jit, static_argnames=("config", "number"), donate_argnames="drawn", inline=True
)
def _extend(params, drawn, lengths_B, first, drawing, config, number):
    """The state after `number` more draws, and their tokens [number, B], whose indices in the new
    text begin at `first`."""

    def step(drawn, i):
        # A shorter prompt's padding in the cache is overwritten before any query attends to it.
        position_B1 = (lengths_B + i - 1)[:, None]
        zero_B = jnp.zeros_like(lengths_B)
        at_B1 = drawn.token_B[:, None], position_B1
        logits_BV, cache = _logits_of(params, *at_B1, zero_B, drawn.cache, config)
        token_B = drawing.draw(logits_BV, i, drawn.seen_BV)
        return _Drawn.of(token_B, cache, drawn.seen_BV), token_B

    return jax.lax.scan(step, drawn, first + jnp.arange(number))


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
