"""A conversation continues its own text, and ends where the model ends it."""

import dataclasses
import functools
import io
import json
import sys

import jax
import pytest

from moe_jax import hf, model
from moe_jax.commands import generate as generate_command
from moe_jax.data import tokenizer_training, tokenizers
from moe_jax.data.chat import Conversation
from moe_jax.data.chat_template import ChatTemplate
from moe_jax.evaluation import chatting, generate
from moe_jax.evaluation.sampling import GREEDY, Sampling

SOURCE = (
    "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
TEMPLATE = ChatTemplate(SOURCE, (("eos_token", "</s>"),), "here")
TURNS = "human", "gpt", "human"
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


def talk(*contents):
    return Conversation(tuple(said(*contents)))


def test_an_answer_in_parts_is_the_greedy_continuation_of_the_rendered_text():
    messages = said("Hello?", "Yes.", "And now?")
    prompt = BYTES.with_offsets("uHello?</s>aYes.</s>uAnd now?</s>a")[0]
    expected = generate.generate(params(), CONFIG, [prompt], num_tokens=NUM_TOKENS)[0]
    kept = generate.before_end(expected, (BYTES.eos_id,))
    parts = list(chat().stream(messages, jax.random.key(0)))
    assert "".join(parts) == BYTES.decode(kept)
    assert chat().answers([Conversation(tuple(messages)), talk("?")], jax.random.key(0))[
        0
    ] == BYTES.decode(kept)


def test_an_answer_ends_before_an_end_token():
    prompt = chat().prompt(talk("?"))
    whole = generate.generate(params(), CONFIG, [prompt], num_tokens=NUM_TOKENS)[0]
    end = int(whole[5])
    kept = whole[: whole.tolist().index(end)]
    ended = chat(end_ids=(end,))
    assert "".join(ended.stream(said("?"), jax.random.key(0))) == BYTES.decode(kept)
    assert ended.answers([talk("?")], jax.random.key(0)) == [BYTES.decode(kept)]


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


@pytest.mark.parametrize(
    "record",
    [
        {"messages": said("a", "b", "c")},
        {"conversations": [{"from": f, "value": v} for f, v in zip(TURNS, "abc", strict=True)]},
        {"prompt": said("a", "b", "c")},
        {"prompt": said("a", "b", "c"), "completion": "d"},
    ],
)
def test_a_record_is_asked_in_every_form_of_training_with_its_tools(record):
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chatting.asked(record) == Conversation(tuple(said("a", "b", "c")))
    found = chatting.asked({**record, "tools": tools})
    assert found == Conversation(tuple(said("a", "b", "c")), tuple(tools))
    source = "{{ tools | tojson if tools }}{{ messages[0].content }}"
    partner = dataclasses.replace(chat(), template=ChatTemplate(source, (), "here"))
    assert BYTES.decode(partner.prompt(found)) == json.dumps(tools) + "a"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "a"}, 'none of "messages", "conversations", or "prompt"; write'),
        ({"messages": []}, '"messages" is not a list of messages; mend'),
        ({"messages": "a"}, '"messages" is not a list of messages; mend'),
        ({"conversations": [{"from": "human"}]}, "message 1 has neither"),
        ({"prompt": 3}, '"prompt" is not a list of messages'),
        ({"prompt": "a", "tools": 3}, '"tools" is not a list'),
    ],
)
def test_a_record_that_cannot_be_asked_is_refused(record, words):
    with pytest.raises(ValueError, match=words):
        chatting.asked(record)


def test_a_line_that_is_not_utf8_is_read(monkeypatch):
    given = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nb\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", given)
    assert list(generate_command._lines()) == ["caf\ufffd", "b"]


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
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "has no chat template; put a Jinja file into it" in error
    (tmp_path / "moe" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(SystemExit):
        run()
    error = capsys.readouterr().err
    assert "chat_template.jinja is not UTF-8 (byte 0); save it as UTF-8" in error
    (tmp_path / "moe" / "chat_template.jinja").write_text(SOURCE)
    talks = tmp_path / "talks.jsonl"
    talks.write_text("".join(json.dumps({"messages": said(text)}) + "\n" for text in "12"))
    run(f"--messages={talks}", f"--output={tmp_path / 'out.jsonl'}", "--system=0")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["messages"][1]["content"] for record in records] == ["1", "2"]
    assert all(isinstance(record["answer"], str) for record in records)
    refused = {"messages": [{"role": "user", "content": None, "tool_calls": [{}]}]}
    for line, words in (
        ('{"text": "1"}', "it has none of"),
        ('{"messages": ', "it is not JSON"),
        (json.dumps(refused), "the chat template of"),
    ):
        talks.write_text(f"{line}\n")
        with pytest.raises(SystemExit):
            run(f"--messages={talks}")
        assert f"line 1: {words}" in capsys.readouterr().err
