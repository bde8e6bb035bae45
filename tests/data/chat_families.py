"""The templates of published families, and what is trained of a conversation in each."""

import pathlib

from moe_jax.data import chat
from moe_jax.data.chat_template import ChatTemplate

TEMPLATES = pathlib.Path(__file__).parent / "chat_templates"
SPECIAL = ("<s>", "</s>", "<|im_end|>", "<|eot_id|>")
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "What is a router?"},
    {"role": "assistant", "content": "A matrix."},
    {"role": "user", "content": "And an expert?"},
    {"role": "assistant", "content": "A small network."},
]
# Template -> what follows a turn's content and is trained with it.
ENDS = {
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
    "chatml": "<|im_end|>\n",
    "chatml_marked": "<|im_end|>",
    "tulu": "</s>",
    "mistral": "</s>",
    "qwen3": "<|im_end|>",
}
# Qwen3 writes thoughts, here empty ones, and a line break in the last turn only.
LAST = {"qwen3": "<think>\n\n</think>\n\n{}<|im_end|>\n"}


def template(name):
    source = (TEMPLATES / f"{name}.jinja").read_text()
    return ChatTemplate(source, (("bos_token", "<s>"), ("eos_token", "</s>")), name)


def of(source):
    return ChatTemplate(source, (), "here")


def answers(name, messages, **how):
    talk = chat.Conversation(tuple(messages), **how)
    found = chat.render(template(name), talk, SPECIAL)
    return found.text, [found.text[start:stop] for start, stop in found.spans]
