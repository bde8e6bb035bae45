"""Loss falls on what the assistant would generate, for the published families of templates."""

import gc
import json
import pathlib
import time

import numpy as np
import pyarrow
import pytest

from moe_jax.data import chat, chat_template, tokenizer_training, tokenizers
from tests.data.chat_families import ENDS, LAST, SPECIAL, SYSTEM, TALK, answers, of, template


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("name", ENDS)
def test_the_assistants_turns_with_their_ends_are_trained_and_nothing_else(name, system):
    text, trained = answers(name, [SYSTEM] * system + TALK)
    begin = " " if name in ("llama2", "mistral") else ""
    shown = begin + "{}" + ENDS[name]
    assert trained == [
        shown.format("A matrix."),
        LAST.get(name, shown).format("A small network."),
    ]
    rest = text
    for turn in trained:
        rest = rest.replace(turn, "", 1)
    assert "matrix" not in rest and "network" not in rest
    assert "Be brief." in rest or not system
    assert "What is a router?" in rest and "And an expert?" in rest


@pytest.mark.parametrize("name", ENDS)
def test_a_single_turn_begins_where_a_prompt_ends(name):
    """What is trained is what the model is asked for when it generates."""
    text, (trained,) = answers(name, TALK[:2])
    prompt = template(name).render(TALK[:1], prompt=True).text
    assert (prompt + trained).strip() == text.strip()


def test_only_the_completion_of_a_prompt_is_trained():
    record = {"prompt": TALK[:3], "completion": [TALK[3]]}
    talk = chat.conversation(record)
    found = chat.render(template("chatml"), talk, SPECIAL)
    (span,) = found.spans
    assert found.text[slice(*span)] == "A small network.<|im_end|>\n"


def test_three_forms_of_a_record_are_one_conversation():
    sharegpt = {
        "conversations": [
            {"from": "human" if message["role"] == "user" else "gpt", "value": message["content"]}
            for message in TALK
        ]
    }
    same = [chat.conversation(record).messages for record in ({"messages": TALK}, sharegpt)]
    assert same[0] == same[1] == tuple(TALK)
    asked = chat.conversation({"prompt": "Why?", "completion": "So."})
    assert [message["role"] for message in asked.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "no"}, "has none of"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": "no"}, "not a list of messages"),
        ({"messages": [{"content": "no"}]}, 'message 1 has no "role"'),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has no"),
        ({"messages": [{"role": "assistant", "content": None}]}, "neither content nor tool"),
        ({"messages": TALK[:1]}, "no message is the assistant's"),
        ({"messages": TALK, "tools": 3}, '"tools" is not a list'),
        ({"prompt": TALK, "completion": TALK[:1]}, "no message is the assistant's"),
        (
            {"messages": [TALK[0], {"role": "model", "content": "no"}]},
            'are "user", "model"; an ans',
        ),
        (
            {"conversations": [{"from": "bing", "value": "no"}]},
            '1 is from "bing"; the known .* gpt',
        ),
        ({"conversations": [{"from": ["gpt"], "value": "no"}]}, "message 1 is from"),
        ({"messages": TALK, "tools": "[{"}, '"tools" is not .* nor the JSON'),
        ({"messages": TALK, "tools": "{}"}, '"tools" is not a list of objects'),
    ],
)
def test_a_record_that_is_no_conversation_is_refused(record, problem):
    with pytest.raises(ValueError, match=problem):
        chat.conversation(record)


def test_a_turn_of_a_tool_is_kept_and_not_trained():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    tool = {"role": "tool", "content": "5"}
    text, trained = answers("chatml", [TALK[0], call, tool, TALK[1]])
    assert "<|im_start|>tool\n5<|im_end|>" in text
    assert trained == ["<|im_end|>\n", "A matrix.<|im_end|>\n"]


def test_a_template_that_does_not_show_the_turns_is_refused():
    """It writes the messages from the last to the first, so that no turn continues another, and a
    content in upper case, so that it is not to be found."""
    backwards = of(
        "{% for m in messages | reverse %}{{ m.role }}{{ m.content | upper }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="does not show where the assistant's turns are"):
        chat.render(backwards, chat.Conversation(tuple(TALK)), SPECIAL)
    half = of("{% generation %}{{ messages[1].content }}{% endgeneration %}")
    with pytest.raises(ValueError, match="marks 1 of 2 turns"):
        chat.render(half, chat.Conversation(tuple(TALK)), SPECIAL)


CHARACTERS = 7


def encode(text):
    """A toy tokenizer with tokens of a few characters, of which some cross a turn's beginning."""
    stops = range(CHARACTERS, len(text) + CHARACTERS, CHARACTERS)
    offsets = np.array([(stop - CHARACTERS, min(stop, len(text))) for stop in stops])
    return np.arange(len(offsets)), offsets


def test_a_token_with_a_part_of_the_prompt_has_no_weight():
    offsets = np.array([(0, 4), (4, 8), (8, 12), (12, 16)])
    np.testing.assert_array_equal(chat.weights(offsets, [(6, 13)]), [0, 0, 1, 0])
    np.testing.assert_array_equal(chat.weights(offsets, [(6, 16)]), [0, 0, 1, 1])
    two_answers = [(0, 6), (6, 13)]  # no prompt between them
    np.testing.assert_array_equal(chat.weights(offsets, two_answers), [1, 1, 1, 0])
    empty = np.array([(3, 3), (6, 6), (13, 13), (13, 14)])
    np.testing.assert_array_equal(chat.weights(empty, [(6, 13)]), [0, 1, 0, 0])
    np.testing.assert_array_equal(chat.weights(offsets, []), [0, 0, 0, 0])


def test_a_long_conversation_loses_whole_turns():
    def tokens(most, messages=tuple(TALK)):
        form = chat.Form(template("chatml"), most)
        return form.tokens(chat.Conversation(messages), encode, SPECIAL)

    whole = tokens(1000)
    assert whole is not None and whole.left_out == 0
    fewer, first = tokens(len(whole.ids_N) - 1), tokens(1000, tuple(TALK[:2]))
    assert fewer is not None and fewer.left_out == 2 and first is not None
    np.testing.assert_array_equal(fewer.ids_N, first.ids_N)
    np.testing.assert_array_equal(fewer.weights_N, first.weights_N)
    assert fewer.text == first.text == "A matrix.<|im_end|>\n"
    assert tokens(3) is None


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ ''.__class__.__mro__ }}", "fails"),
        ("{{ messages.append(1) }}", "fails"),
        ("{% import 'os' as os %}", "fails"),
        ("{% include 'x' %}", "fails"),
        ("{% for i in range(10**9) %}a{% endfor %}", "fails"),
        ("{{ cycler.__init__.__globals__.os }}", "fails"),
        ("{{ 'a' * 10**12 }}", "memory|fails|ends its process"),
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{% if %}", "fails"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
            "{% endfor %}{% endfor %}{% endfor %}",
            "takes more than",
        ),
        ("{{ 9**(9**9) }}", "takes more than"),
        ("{% for a in range(9999) %}{{ 'ab' * 99999 }}{% endfor %}", "writes more than|memory"),
    ],
)
def test_a_malicious_template_is_refused_in_time(source, problem, monkeypatch):
    began = time.monotonic()
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    with pytest.raises(ValueError, match=problem) as refused:
        of(source).render(TALK)
    assert "\n" not in str(refused.value) and "the chat template of here" in str(refused.value)
    assert time.monotonic() - began < 5
    assert of("{{ messages[0].content }}").render(TALK).text == "What is a router?"


def test_many_renderings_leave_no_file_open():
    descriptors = pathlib.Path("/dev/fd")
    chat_template.PLAIN.render([])
    before = len(list(descriptors.iterdir()))
    gc.disable()  # it may close what nobody refers to, at some time
    try:
        for _ in range(20):
            chat_template.PLAIN.render([])
        assert len(list(descriptors.iterdir())) == before
    finally:
        gc.enable()


def test_the_template_of_a_folder_is_found_where_each_version_of_transformers_keeps_it(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    with pytest.raises(ValueError, match="has no chat template"):
        chat_template.load(tmp_path)
    config.write_text('{"chat_template": "{{ bos_token }}1", "bos_token": {"content": "<b>"}}')
    assert chat_template.load(tmp_path).render([]).text == "<b>1"
    config.write_text(
        '{"chat_template": [{"name": "tool", "template": "3"}, '
        '{"name": "default", "template": "2"}]}'
    )
    assert chat_template.load(tmp_path).render([]).text == "2"
    (tmp_path / "chat_template.jinja").write_text("4")
    assert chat_template.load(tmp_path).render([]).text == "4"


@pytest.mark.parametrize("name", ENDS)
def test_the_token_that_ends_a_turn_is_found(name):
    ends = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "qwen3": "<|im_end|>"}
    expected = ends.get(name.removesuffix("_marked"), "</s>")
    assert chat.turn_ends(template(name), SPECIAL) == (expected,)


def test_tokens_have_the_places_of_their_text(tmp_path):
    """Begin and end are one token each; every other token stands where its text is."""
    text = "<s>Größe: 3 µm, 你好 🎉</s><s>and"
    piece_model = tokenizer_training.sentencepiece_model([text * 20], "bpe", 290)
    (tmp_path / "small.model").write_bytes(piece_model)
    for tokenizer in (tokenizers.load("bytes"), tokenizers.load(str(tmp_path / "small.model"))):
        ids_N, offsets_N2 = tokenizer.with_offsets(text)
        assert [text[a:b] for a, b in offsets_N2[ids_N == tokenizer.bos_id]] == ["<s>"] * 2
        assert [text[a:b] for a, b in offsets_N2[ids_N == tokenizer.eos_id]] == ["</s>"]
        plain = [i for i in ids_N if i not in (tokenizer.bos_id, tokenizer.eos_id)]
        between = text.replace("</s>", "").split("<s>")
        expected = [i for part in between for i in tokenizer.encode(part)]
        assert plain == expected
        starts = offsets_N2[:, 0]
        assert (np.diff(starts) >= 0).all() and offsets_N2.max() == len(text)


def test_the_nulls_of_a_table_change_no_token():
    """A table gives each message all keys of any message, and each call all arguments of any."""
    calls = [
        {"function": {"name": "add", "arguments": arguments}} for arguments in ({"a": 1}, {"b": 2})
    ]
    tools = [
        {"name": "add", "parameters": {"a": {"type": "int"}, "b": {"type": "int", "unit": "m"}}}
    ]
    rows = [
        {"messages": [TALK[0], call, {"role": "tool", "content": "3"}, TALK[1]], "tools": tools}
        for call in ({"role": "assistant", "content": None, "tool_calls": [c]} for c in calls)
    ]
    shows = of(
        "{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>{% if 'tool_calls' in m %}"
        "{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    form = chat.Form(shows, 10**6)
    table = pyarrow.Table.from_pylist(rows).to_pylist()
    assert "tool_calls" in table[0]["messages"][0]
    for row, filled in zip(rows, table, strict=True):
        expected, found = (
            form.tokens(chat.conversation(one), by_character, SPECIAL) for one in (row, filled)
        )
        assert found.text == expected.text and "null" not in found.text
        np.testing.assert_array_equal(found.ids_N, expected.ids_N)
        np.testing.assert_array_equal(found.weights_N, expected.weights_N)


def by_character(text):
    """A toy tokenizer whose tokens are the characters."""
    places = np.arange(len(text))
    return np.array([ord(c) for c in text]), np.stack([places, places + 1], axis=1)


def test_tojson_has_the_arguments_that_transformers_gives_it():
    shows = of(
        "{{ messages[0] | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
    )
    assert shows.render([{"b": "é", "a": [1]}]).text == '{"a":[1],"b":"\\u00e9"}'
    plain = of("{{ messages[0] | tojson }} {{ messages[0] | tojson(indent=1) }}")
    assert plain.render([{"b": "é"}]).text == '{"b": "é"} {\n "b": "é"\n}'


def test_the_system_of_a_sharegpt_record_is_its_first_message():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    own = {"from": "system", "value": "Be long."}

    def roles(system, *first):
        talk = chat.conversation({"conversations": [*first, *turns], "system": system})
        return [(one["role"], one["content"]) for one in talk.messages]

    talk = [("user", "a"), ("assistant", "b")]
    assert roles("Be brief.") == [("system", "Be brief."), *talk]
    assert roles("Be brief.", own) == [("system", "Be long."), *talk]
    assert roles("") == roles(None) == talk


def test_tools_as_a_text_are_those_tools():
    tools = [{"name": "add", "parameters": {"a": "int"}}]
    as_text = chat.conversation({"messages": TALK, "tools": json.dumps(tools)})
    assert as_text == chat.conversation({"messages": TALK, "tools": tools})
    assert as_text.tools == tuple(tools)
    assert chat.conversation({"messages": TALK, "tools": ""}).tools is None
