"""Turns of the assistant in templates that write them otherwise after other messages."""

import pytest

from moe_jax.data import chat, chat_template
from tests.data.chat_families import ENDS, SPECIAL, of, template

# As Qwen3's, it writes thoughts into turns after the last question only, and empty ones into the
# last message; a line break stands between a content and a call.
THINKS = of(
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set c = m.content or '' %}"
    "{% if m.role == 'assistant' %}{% set parts = c.split('</think>') %}"
    "{% if loop.index0 > ns.last and (loop.last or parts[1:]) %}"
    "{{ '<think>' + parts[:-1][0] | default('') | replace('<think>', '') + '</think>' }}{% endif %}"
    "{{ parts[-1] }}{% for call in m.tool_calls or [] %}"
    "{% if parts[-1] %}{{ '\n' }}{% endif %}{{ '<call>' + call.name + '</call>' }}{% endfor %}"
    "{% else %}{{ c }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trained_by(shown, *messages):
    found = chat.render(shown, chat.conversation({"messages": list(messages)}), SPECIAL)
    return [found.text[start:stop] for start, stop in found.spans]


def asked(content):
    return {"role": "user", "content": content}


def answered(content, **keys):
    return {"role": "assistant", "content": content, **keys}


@pytest.mark.parametrize("content", ["", None, "I add."])
def test_calls_of_a_tool_are_trained_in_a_template_that_writes_the_last_turn_otherwise(content):
    call = answered(content, tool_calls=[{"name": "add"}])
    tool = {"role": "tool", "content": "5"}
    begins = f"{content}\n" if content else ""
    assert trained_by(THINKS, asked("2+3?"), call, tool, call, tool, answered("5")) == [
        begins + "<call>add</call><|im_end|>",
        begins + "<call>add</call><|im_end|>",
        "<think></think>5<|im_end|>\n",
    ]


def test_thoughts_in_contents_are_trained_where_the_template_writes_them():
    talk = [asked("a"), answered("<think>u</think>x"), asked("b"), answered("<think>v</think>y")]
    last = "<think>v</think>y<|im_end|>\n"
    assert trained_by(THINKS, *talk) == ["x<|im_end|>", last]
    assert trained_by(THINKS, asked("a"), answered("x"), *talk[2:]) == ["x<|im_end|>", last]


def test_a_turn_with_the_end_token_in_it_is_not_cut_there():
    twice = "x<|im_end|>\n<|im_start|>user\ny"
    talk = asked("a"), answered(twice), asked("b"), answered("z")
    assert trained_by(THINKS, *talk)[0] == twice + "<|im_end|>"
    with pytest.raises(ValueError, match="message 2: neither its rendering"):
        trained_by(THINKS, talk[0], answered("<think>u</think>" + twice), *talk[2:])


@pytest.mark.parametrize("name", [*sorted(ENDS.keys() - {"chatml_marked", "mistral"}), "plain"])
def test_the_header_of_an_answer_that_begins_a_conversation_is_not_trained(name):
    shown = chat_template.PLAIN if name == "plain" else template(name)
    found = trained_by(shown, answered("Hello."), asked("a"), answered("b"))
    expected = trained_by(shown, asked("c"), answered("Hello."), asked("a"), answered("b"))
    assert [turn.rstrip() for turn in found] == [turn.rstrip() for turn in expected]
    assert len(found) == 2


def test_a_first_answer_without_a_known_header_is_refused():
    swaps = of("{% for m in messages | reverse %}{{ m.role + m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="message 1: the conversation begins with it"):
        trained_by(swaps, answered("b"), asked("a"))


@pytest.mark.parametrize(
    "source", ["hello", "{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}"]
)
def test_a_template_that_never_writes_the_answer_is_refused(source):
    talk = asked("a"), answered("b")
    talk = talk if source == "hello" else talk[1:]
    with pytest.raises(ValueError, match=r"^: the chat template of here writes nothing of") as said:
        trained_by(of(source), *talk)
    assert f"message {len(talk)}," in str(said.value)
    bare = of("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert trained_by(bare, asked("a"), answered("")) == [""]


@pytest.mark.parametrize(
    ("source", "turns"),
    [
        # No prompt adds a header, and no special token ends a turn.
        ("[{{ m.content }}]" + "{% if m.role == 'user' %}>{% endif %}", ["[Hello.]", "[b]"]),
        # An answer after another message is written otherwise than one that begins.
        (
            "<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last and loop.index0 %}"
            "<think></think>{% endif %}"
            "{{ m.content }}.",
            ["Hello..", "<think></think>b."],
        ),
    ],
)
def test_a_first_answers_header_is_what_stands_before_the_same_answer_elsewhere(source, turns):
    header = "{% if add_generation_prompt %}<|assistant|>{% endif %}" if "think" in source else ""
    shown = of("{% for m in messages %}" + source + "{% endfor %}" + header)
    assert trained_by(shown, answered("Hello."), asked("a"), answered("b")) == turns
