"""Answers in batches of padded prompts against one prompt at a time, and where they end."""

import functools

import numpy as np
import pytest

from moe_jax.data import tokenizers
from moe_jax.evaluation import answers, generate
from moe_jax.evaluation.sampling import Sampling
from tests.evaluation.test_scoring import loaded, most_probable

NUM_TOKENS = 20  # more than a piece


class Numbers:
    """A tokenizer whose text is "7 3 5 ", so that every text is a list of ids."""

    bos_id = 1

    def prompt(self, text):
        return np.array([1, *map(int, text.split())], np.int32)

    def decode(self, ids):
        return "".join(f"{i} " for i in ids)


class Bare(Numbers):
    """`Numbers` without the begin token."""

    def prompt(self, text):
        return super().prompt(text)[1:]


PROMPTS = ["5 6 7", "9 8 9", "3 4 5 6 7 8 9 3 4 5 6"]


def answered(name, prompts, batch_size=2, limit=48, tokenizer=None, **settings):
    config, params = loaded(name)
    settings = answers.Settings(**{"num_tokens": NUM_TOKENS, **settings})
    tokenizer, sizes = tokenizer or Numbers(), {"batch_size": batch_size, "limit": limit}
    return answers.answers(params, config, tokenizer, prompts, settings, **sizes)


@functools.cache
def alone(name, prompt):
    """The greedy ids after one prompt, by a forward pass over the whole text for each."""
    return most_probable(name, Numbers().prompt(prompt), NUM_TOKENS).tolist()


@pytest.mark.parametrize("name", ["llama", pytest.param("olmoe", marks=pytest.mark.long)])
def test_answers_in_batches_are_those_of_each_prompt_alone(name):
    """The last of the two batches has one prompt, the shortest."""
    for prompt, answer in zip(PROMPTS, answered(name, PROMPTS), strict=True):
        assert answer.ids.tolist() == alone(name, prompt)
        assert answer.text == Numbers().decode(answer.ids) and answer.left_out == 0


def test_an_answer_ends_before_a_stop_or_an_end_token():
    whole = alone("llama", PROMPTS[0])
    third, stop = whole[2], f" {whole[4]} {whole[5]} "
    [ended] = answered("llama", PROMPTS[:1], end_ids=(third,))
    assert ended.ids.tolist() == whole[: whole.index(third)]
    [stopped] = answered("llama", PROMPTS[:1], stops=("absent", stop))
    text = Numbers().decode(whole)
    assert stopped.text == text[: text.index(stop)]


def test_a_batch_stops_when_all_of_its_answers_have_ended(monkeypatch):
    calls, extend = [], generate._extend
    monkeypatch.setattr(generate, "_extend", lambda *a: calls.append(1) or extend(*a))
    answered("llama", PROMPTS[:2], end_ids=tuple(range(loaded("llama")[0].vocab_size)))
    assert not calls  # the first token is an end token
    answered("llama", PROMPTS[:2])
    assert len(calls) == 2  # 1 + 16 + 3 tokens


def test_a_long_prompt_loses_its_first_tokens_and_they_are_counted():
    numbers, room = [str(3 + n % 7) for n in range(60)], 48 - NUM_TOKENS
    [cut] = answered("llama", [" ".join(numbers)])
    [kept] = answered("llama", [" ".join(numbers[-room:])], tokenizer=Bare())
    assert (cut.left_out, kept.left_out) == (61 - room, 0)
    assert cut.ids.tolist() == kept.ids.tolist()


def test_samples_are_those_of_the_seed():
    draw = functools.partial(answered, "llama", PROMPTS, sampling=Sampling(temperature=1.0))
    first = [answer.text for answer in draw(seed=0)]
    assert first == [answer.text for answer in draw(seed=0)]
    assert first != [answer.text for answer in draw(seed=1)]


@pytest.mark.parametrize("num_tokens", [0, 48])
def test_an_answer_must_leave_room_for_a_prompt(num_tokens):
    with pytest.raises(ValueError, match=f"an answer of {num_tokens} tokens must have at least"):
        answered("llama", PROMPTS, num_tokens=num_tokens)


def test_bytes_stop_within_a_token_of_several_characters():
    tokenizer = tokenizers.load("bytes")
    settings = answers.Settings(num_tokens=9, stops=("é",))
    assert answers._has_ended(tokenizer.encode("né"), tokenizer, settings)
    assert not answers._has_ended(tokenizer.encode("né")[:2], tokenizer, settings)
