"""Decoding with a cache against the full forward pass, and what sampling may draw."""

import functools

import jax
import numpy as np
import pytest

from moe_jax import hf, model
from moe_jax.evaluation import generate
from moe_jax.evaluation.sampling import Sampling
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
    found = generate.generate(params, config, prompts, num_tokens=NUM_TOKENS)
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
        sampling=Sampling(temperature=0.8),
        key=jax.random.key(1),
    )
    np.testing.assert_array_equal(draw(prompts)[0], draw(prompts[:1])[0])


def test_prompts_of_similar_lengths_share_a_compiled_program():
    config, params = loaded("llama")
    before = generate._continue._cache_size()
    for length in (3, 7, 9, 33, 50, 64):
        prompt = np.resize(prompts_of(config)[0], length)
        generate.generate(params, config, [prompt], num_tokens=NUM_TOKENS)
    assert generate._continue._cache_size() <= before + 2  # for 32 and for 64 tokens


def test_prompts_are_padded_to_few_lengths_that_are_little_longer():
    lengths = range(1, 4097)
    padded = [generate.padded_length(length) for length in lengths]
    assert padded == sorted(padded) and len(set(padded)) == 24
    padding = [(p - length, p) for length, p in zip(lengths, padded, strict=True)]
    assert all(0 <= more < max(32, p / 5 + 1) for more, p in padding)


def test_what_cannot_be_continued_is_refused():
    config, params = loaded("llama")
    for prompts, settings, message in (
        ([], {}, "no prompt"),
        ([np.array([], np.int32)], {}, "has no token"),
        ([np.array([10**6])], {}, "token 1000000 is beyond the 199 of the model"),
        ([np.array([1])], {"temperature": -1.0}, "temperature=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling = Sampling(**settings)
            generate.generate(params, config, prompts, num_tokens=1, sampling=sampling)


def test_a_stream_has_the_tokens_of_all_at_once():
    config, params = loaded("llama")
    how = {"num_tokens": NUM_TOKENS, "sampling": Sampling(temperature=0.8, repetition_penalty=1.3)}
    how |= {"key": jax.random.key(2)}
    whole = generate.generate(params, config, prompts_of(config), **how)
    stream = generate.pieces(params, config, prompts_of(config), piece=3, **how)
    joined_BN = np.concatenate(list(stream), axis=1)
    np.testing.assert_array_equal(joined_BN[:, :NUM_TOKENS], whole)


def test_a_repetition_penalty_counts_the_prompt_and_what_was_drawn():
    """With a penalty without end no token of the text comes again."""
    config, params = loaded("llama")
    never = Sampling(repetition_penalty=1e9)
    prompts = prompts_of(config)
    for prompt, new in zip(
        prompts,
        generate.generate(params, config, prompts, num_tokens=NUM_TOKENS, sampling=never),
        strict=True,
    ):
        assert not set(prompt) & set(new.tolist()) and len(set(new.tolist())) == NUM_TOKENS


def test_a_text_beyond_the_learned_positions_is_refused():
    config, params = loaded("gpt2")
    with pytest.raises(
        ValueError, match="beyond the model's 40 learned positions; .* ask for fewer tokens"
    ):
        generate.generate(params, config, prompts_of(config), num_tokens=30)
