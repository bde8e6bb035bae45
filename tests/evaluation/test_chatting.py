"""A conversation continues its own text, and ends where the model ends it."""

import dataclasses
import functools
import json
import sys

import jax
import pytest

from moe_jax import hf, model
from moe_jax.commands import generate as generate_command
from moe_jax.data import tokenizer_training, tokenizers
from moe_jax.data.chat_template import ChatTemplate
from moe_jax.evaluation import chatting, generate
from moe_jax.evaluation.sampling import GREEDY, Sampling

SOURCE = (
    "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
TEMPLATE = ChatTemplate(SOURCE, (("eos_token", "</s>"),), "here")
BYTES = tokenizers.load("bytes")
NUM_TOKENS = 12
CONFIG = model.ModelConfig(
    model_type="mixtral",
    vocab_size=BYTES.vocab_size,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=256,
)


@functools.cache
def params():
    return jax.jit(model.init, static_argnums=0)(CONFIG, jax.random.key(0))


def chat(end_ids=(BYTES.eos_id,), sampling=GREEDY):
    return chatting.Chat(params(), CONFIG, BYTES, TEMPLATE, end_ids, NUM_TOKENS, sampling)


def said(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": one} for role, one in zip(roles, contents, strict=False)]


def test_an_answer_in_parts_is_the_greedy_continuation_of_the_rendered_text():
    messages = said("Hello?", "Yes.", "And now?")
    prompt = BYTES.with_offsets("uHello?</s>aYes.</s>uAnd now?</s>a")[0]
    expected = generate.generate(params(), CONFIG, [prompt], num_tokens=NUM_TOKENS)[0]
    kept = generate.before_end(expected, (BYTES.eos_id,))
    parts = list(chat().stream(messages, jax.random.key(0)))
    assert "".join(parts) == BYTES.decode(kept)
    assert chat().answers([messages, said("?")], jax.random.key(0))[0] == BYTES.decode(kept)


def test_an_answer_ends_before_an_end_token():
    prompt = chat().prompt(said("?"))
    whole = generate.generate(params(), CONFIG, [prompt], num_tokens=NUM_TOKENS)[0]
    end = int(whole[5])
    kept = whole[: whole.tolist().index(end)]
    ended = chat(end_ids=(end,))
    assert "".join(ended.stream(said("?"), jax.random.key(0))) == BYTES.decode(kept)
    assert ended.answers([said("?")], jax.random.key(0)) == [BYTES.decode(kept)]


def test_a_conversation_goes_on_and_begins_anew():
    """What comes after /reset is answered as if nothing had been said before."""
    heard = []
    partner = chat(sampling=Sampling(temperature=1.0))
    lines = ["a?", "b?", "/reset", "a?"]
    chatting.talk(partner, lines, heard.append, system="s", seed=7)
    first, second, third = "".join(heard).removesuffix("\n").split("\n")[:3]
    system = [{"role": "system", "content": "s"}]
    for number, messages, answer in (
        (0, said("a?"), first),
        (1, said("a?", first, "b?"), second),
        (3, said("a?"), third),
    ):
        key = jax.random.key(7 + number)
        assert "".join(partner.stream([*system, *messages], key)) == answer


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, GREEDY),
        ({"temperature": 0.6, "top_k": 20}, GREEDY),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None},
            Sampling(temperature=0.6, top_k=20),
        ),
    ],
)
def test_the_settings_of_a_folder_are_those_of_its_generation_config(found, expected):
    assert chatting.settings(found) == expected


@pytest.mark.parametrize("value", [0, 2, "much", True, []])
def test_a_setting_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"generation_config.json: top_p=.* must be more than 0"):
        chatting.settings({"do_sample": True, "top_p": value})


def test_the_command_answers_a_file_of_conversations(tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(CONFIG, vocab_size=270)
    hf.save(tmp_path / "moe", config, model.init(config, jax.random.key(1)))
    words = [str(i) for i in range(99)]
    piece_model = tokenizer_training.sentencepiece_model(words, "bpe", 270)
    (tmp_path / "moe" / "tokenizer.model").write_bytes(piece_model)
    options = ["--chat", f"--checkpoint={tmp_path / 'moe'}", "--num_tokens=4"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["generate.py", *options, *more])
        generate_command.main()
        return capsys.readouterr()

    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2 and "has no chat template" in capsys.readouterr().err
    (tmp_path / "moe" / "chat_template.jinja").write_text(SOURCE)
    talks = tmp_path / "talks.jsonl"
    talks.write_text("".join(json.dumps({"messages": said(text)}) + "\n" for text in "12"))
    run(f"--messages={talks}", f"--output={tmp_path / 'out.jsonl'}", "--system=0")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["messages"][1]["content"] for record in records] == ["1", "2"]
    assert all(isinstance(record["answer"], str) for record in records)
    talks.write_text('{"text": "1"}\n')
    with pytest.raises(SystemExit):
        run(f"--messages={talks}")
    assert "line 1" in capsys.readouterr().err.splitlines()[-1]
