"""Continuations of prompts, by a full forward pass for each new token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model


def generate(
    params: dict,
    config: model.ModelConfig,
    prompts: list[np.ndarray],
    *,
    num_tokens: int,
    temperature: float,
    key: jax.Array,
) -> list[np.ndarray]:
    """`num_tokens` sampled ids after each prompt of ids; temperature 0 takes the likeliest.

    A row's draws depend on the key and its place among the prompts only.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts])
    tokens_BT = np.zeros((len(prompts), lengths_B.max() + num_tokens), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    filled_BT = _fill(params, tokens_BT, lengths_B, key, config, num_tokens, temperature)
    return [
        row[length : length + num_tokens]
        for row, length in zip(np.asarray(filled_BT), lengths_B, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("config", "num_tokens", "temperature"))
def _fill(params, tokens_BT, lengths_B, key, config, num_tokens, temperature):
    def add_token(i, tokens_BT):
        # Causal: what stands after the last token does not reach its logits.
        logits_BTV = model.apply(params, tokens_BT, config).logits_BTV
        last_B = lengths_B + i - 1
        logits_BV = jnp.take_along_axis(logits_BTV, last_B[:, None, None], axis=1)[:, 0]
        if temperature:
            drawn_B = jax.random.categorical(jax.random.fold_in(key, i), logits_BV / temperature)
        else:
            drawn_B = jnp.argmax(logits_BV, axis=-1)
        return tokens_BT.at[jnp.arange(len(lengths_B)), last_B + 1].set(drawn_B.astype(jnp.int32))

    return jax.lax.fori_loop(0, num_tokens, add_token, tokens_BT)
