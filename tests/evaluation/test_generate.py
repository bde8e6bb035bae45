"""Decoding with a cache against the full forward pass, and what sampling may draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import hf, model
from moe_jax.evaluation import generate
from tests.hf.test_golden import GOLDEN, NAMES

NUM_TOKENS = 5
QUICK = ("lola", "mistral", "qwen3_moe_mixed")
apply = jax.jit(model.apply, static_argnames="config")


@functools.cache
def loaded(name):
    return hf.load(GOLDEN / name)


def prompts_of(config):
    draw = np.random.default_rng(0).integers
    return [draw(0, config.vocab_size, length).astype(np.int32) for length in (14, 6)]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in NAMES]
)
def test_greedy_tokens_are_those_of_the_full_forward_pass(name):
    """Longer than the sliding window of mistral; rows of different lengths."""
    config, params = loaded(name)
    prompts = prompts_of(config)
    found = generate.generate(params, config, prompts, num_tokens=NUM_TOKENS, temperature=0.0)
    for prompt, tokens in zip(prompts, found, strict=True):
        text = np.concatenate([prompt, tokens])
        padded = np.zeros((1, 14 + NUM_TOKENS), np.int32)  # one shape to compile
        padded[0, : len(text)] = text
        logits_TV = np.asarray(apply(params, padded, config).logits_BTV)[0, : len(text) - 1]
        np.testing.assert_array_equal(logits_TV[len(prompt) - 1 :].argmax(axis=-1), tokens)


def test_a_row_does_not_depend_on_the_prompts_after_it():
    config, params = loaded("llama")
    prompts = prompts_of(config)
    draw = functools.partial(
        generate.generate,
        params,
        config,
        num_tokens=NUM_TOKENS,
        temperature=0.8,
        key=jax.random.key(1),
    )
    np.testing.assert_array_equal(draw(prompts)[0], draw(prompts[:1])[0])


def test_prompts_of_similar_lengths_share_a_compiled_program():
    config, params = loaded("lola")
    before = generate._continue._cache_size()
    for prompt in (prompts_of(config)[0][:length] for length in (3, 7, 9)):
        generate.generate(params, config, [prompt], num_tokens=NUM_TOKENS, temperature=0.0)
    assert generate._continue._cache_size() <= before + 1


def test_top_p_draws_only_among_the_fewest_tokens_that_have_it():
    probabilities_V = jnp.array([0.1, 0.4, 0.3, 0.2])
    logits_BV = jnp.tile(jnp.log(probabilities_V), (4000, 1))
    draw = functools.partial(generate.sample, logits_BV, jax.random.key(0))

    def shares(tokens_B):
        return np.bincount(tokens_B, minlength=4) / 4000

    # Five standard deviations of a share among 4000 draws are at most 0.04.
    np.testing.assert_allclose(shares(draw(1.0, 1.0)), probabilities_V, atol=0.04)
    np.testing.assert_allclose(shares(draw(1.0, 0.6)), [0, 4 / 7, 3 / 7, 0], atol=0.04)
    np.testing.assert_array_equal(shares(draw(1.0, 1e-6)), [0, 1, 0, 0])
    np.testing.assert_array_equal(shares(draw(0.0, 1.0)), [0, 1, 0, 0])
    np.testing.assert_array_equal(shares(draw(1e-38, 1.0)), [0, 1, 0, 0])
    warmer = probabilities_V**0.5 / jnp.sum(probabilities_V**0.5)
    np.testing.assert_allclose(shares(draw(2.0, 1.0)), warmer, atol=0.04)


def test_what_cannot_be_continued_is_refused():
    config, params = loaded("llama")
    for prompts, settings, message in (
        ([], {}, "no prompt"),
        ([np.array([], np.int32)], {}, "has no token"),
        ([np.array([10**6])], {}, "token 1000000 is beyond the 199 of the model"),
        ([np.array([1])], {"temperature": -1.0}, "temperature=-1.0"),
        ([np.array([1])], {"top_p": 0.0}, "top_p=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate.generate(
                params, config, prompts, num_tokens=1, **{"temperature": 0.0, **settings}
            )


def test_a_text_beyond_the_learned_positions_is_refused():
    config, params = loaded("gpt2")
    with pytest.raises(
        ValueError, match="beyond the model's 40 learned positions; .* ask for fewer tokens"
    ):
        generate.generate(params, config, prompts_of(config), num_tokens=30, temperature=0.0)
