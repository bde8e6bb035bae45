"""Preferences whose prompt and answers are messages: their forms, their tokens, what is refused."""

import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.data import chat, chat_pairs, chat_template, document, preferences, tokenizers
from moe_jax.data.chat_template import ChatTemplate
from moe_jax.data.policy import Reading

TESTS = pathlib.Path(__file__).parents[1]
BYTES = tokenizers.load("bytes")
READING = Reading(conversations=True, pairs=True)
PLAIN = chat.Form(chat_template.PLAIN, 1000)
# It writes what a preference of plain strings is: the begin token, the prompt, an answer, the end.
BARE = ChatTemplate(
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    (("bos_token", tokenizers.BEGIN), ("eos_token", tokenizers.END)),
    "bare",
)


def said(role, content):
    return {"role": role, "content": content}


ASKED, GOOD, BAD = said("user", "Hi"), said("assistant", "Yes"), said("assistant", "No!")
PAIR = {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}


def ids(record, form=PLAIN, tokenizer=BYTES):
    special = tuple(tokenizer.special_tokens)
    return chat_pairs.ids(chat_pairs.pair(record), form, tokenizer.with_offsets, special)


def of_bytes(text):
    """The ids of a text by hand: <s> is 1, </s> is 2, and byte b is b + 3."""
    marked = text.replace("<s>", "\1").replace("</s>", "\2")
    return [b if b < 3 else b + 3 for b in marked.encode()]


def test_an_answers_tokens_are_those_that_the_template_adds_to_the_prompt():
    prompt, chosen, rejected = ids(PAIR)
    assert prompt.tolist() == of_bytes("<s>user:\nHi</s>\nassistant:\n")
    assert chosen.tolist() == of_bytes("Yes</s>\n")
    assert rejected.tolist() == of_bytes("No!</s>\n")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No!"},
        {"prompt": "Hi", **PAIR},  # UltraFeedback's columns
        {"prompt": [ASKED], **PAIR},
        {"chosen": [ASKED | {"name": None}, GOOD], "rejected": [ASKED, BAD | {"tool_calls": None}]},
    ],
)
def test_the_forms_of_a_pair_are_one(record):
    assert chat_pairs.pair(record) == chat_pairs.pair(PAIR)


def test_all_shared_messages_are_the_prompt_and_their_answers_are_not_trained():
    shared = [said("system", "Be brief."), ASKED, GOOD, said("user", "And?")]
    prompt, chosen, _ = ids({"chosen": [*shared, GOOD], "rejected": [*shared, BAD]})
    begins = "<s>system:\nBe brief.</s>\nuser:\nHi</s>\nassistant:\nYes</s>\n"
    assert prompt.tolist() == of_bytes(begins + "user:\nAnd?</s>\nassistant:\n")
    assert chosen.tolist() == of_bytes("Yes</s>\n")
    same = chat_pairs.pair({"chosen": [*shared, GOOD], "rejected": [*shared, GOOD]})
    assert same.chosen.first == 4


@pytest.mark.parametrize("label", [True, False])
def test_a_labelled_completion_is_one_answer(label):
    for record in (
        {"prompt": [ASKED], "completion": [GOOD], "label": label},
        {"prompt": "Hi", "completion": "Yes", "label": label},
    ):
        prompt, *answers = ids(record)
        assert prompt.tolist() == ids(PAIR)[0].tolist()
        answer, none = answers if label else reversed(answers)
        assert answer.tolist() == of_bytes("Yes</s>\n") and none is None


GOLDEN = json.loads((TESTS / "golden/trl/masks.json").read_text())
TRL = [row for row in GOLDEN["masks"] if row["kind"] == "completion" and row["case"] != "newline"]


@pytest.mark.parametrize("family", sorted({row["family"] for row in TRL}))
def test_prompt_and_answer_are_those_that_trl_tunes_on(family, tmp_path):
    """The answer is at the same time the chosen one, the rejected one, and that of a record with a
    label."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizer"]))
    tokenizer = tokenizers.load(str(tmp_path / "tokenizer.json"))
    source = (TESTS / f"data/chat_templates/{family}.jinja").read_text()
    form = chat.Form(ChatTemplate(source, PLAIN.template.tokens, family), 1000)
    for row in [row for row in TRL if row["family"] == family]:
        record, at = row["record"], row["mask"].index(1)
        both = {"chosen": record["completion"], "rejected": record["completion"]}
        for given in ({"prompt": record["prompt"], **both}, {**record, "label": True}):
            prompt, chosen, rejected = ids(given, form, tokenizer)
            assert prompt.tolist() == row["ids"][:at] and chosen.tolist() == row["ids"][at:]
            assert rejected is None or rejected.tolist() == chosen.tolist()


def write(path, records):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def opened(source, cache, form=None, length=40, **how):
    reading = Reading(conversations=form is not None, pairs=True, **how)
    where = {"sequence_length": length, "validation_fraction": 0, "cache": cache}
    return preferences.open_pairs(source, "train", BYTES, reading=reading, form=form, **where)


def plain(number, with_pairs):
    """Preferences of strings, of which some prompts are cut."""
    for i in range(number):
        prompt = "why " * (1 + i % 5) + str(i)
        if with_pairs:
            yield {"prompt": prompt, "chosen": f"a{i}", "rejected": f"bb{i}"}
        else:
            yield {"prompt": prompt, "completion": f"a{i}", "label": i % 3 == 0}


def as_messages(record):
    prompt = [said("user", record["prompt"])]
    if "label" in record:
        return {**record, "prompt": prompt, "completion": [said("assistant", record["completion"])]}
    return {n: [*prompt, said("assistant", record[n])] for n in ("chosen", "rejected")}


@pytest.mark.parametrize("with_pairs", [True, False])
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_messages_and_plain_strings_make_the_same_records(ending, with_pairs, tmp_path):
    records = list(plain(12, with_pairs))
    length = 40 if with_pairs else 20
    text = opened(write(tmp_path / f"text{ending}", records), tmp_path, length=length)
    talks = write(tmp_path / f"talks{ending}", [as_messages(record) for record in records])
    form = chat.Form(BARE, 81)
    made = opened(talks, tmp_path, form, length)
    assert made.digest == text.digest and made.counts == text.counts
    assert text.counts["pairs"] == 12 and text.counts["prompts cut"] > 0
    # Another template has another cache.
    assert opened(talks, tmp_path, PLAIN, 80).digest != opened(talks, tmp_path, form, 80).digest


BACKWARDS = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
TELLING = (
    "{{ messages[-1].content | length }}: {{ messages[0].content }}"
    "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"chosen": [ASKED, GOOD]}, 'has no "rejected"'),
        ({**PAIR, "chosen": []}, '"chosen" is not a list of messages'),
        ({**PAIR, "chosen": 3}, '"chosen" is not a list of messages'),
        ({"chosen": [GOOD], "rejected": [BAD]}, "share no first messages"),
        ({"chosen": "Yes", "rejected": "No"}, "share no first messages"),
        ({**PAIR, "chosen": [said("user", "Ho"), GOOD]}, "share no first messages"),
        ({**PAIR, "prompt": "Ho"}, "adds messages of ['user', 'assistant']"),
        ({**PAIR, "chosen": [ASKED, GOOD, ASKED, GOOD]}, "['assistant', 'user', 'assistant']"),
        ({"prompt": "Hi", "chosen": [ASKED], "rejected": "No"}, "adds messages of []"),
        ({"prompt": "Hi", "completion": "Yes", "label": 1}, "neither true nor false"),
        ({**PAIR, "tools": "add"}, '"tools" is not a list'),
        ({"messages": [ASKED, GOOD]}, "is no pair; give"),
    ],
)
def test_a_record_that_is_no_pair_is_refused_in_one_line(record, problem, tmp_path):
    source = write(tmp_path / "pairs.jsonl", [record])
    with pytest.raises(ValueError) as refused:
        opened(source, tmp_path, PLAIN)
    assert problem in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "answers", "problem"),
    [
        (BACKWARDS, ("Yes", "No"), "does not show where the assistant's turns are"),
        (TELLING, ("Yes", "No"), "writes the prompt in another way"),
        (BARE.source, ("", ""), "has no token"),
    ],
)
def test_answers_that_a_template_does_not_show_exactly_are_refused(source, answers, problem):
    template = ChatTemplate(source, (("bos_token", ""), ("eos_token", "")), "here")
    record = {"prompt": "Hi", "chosen": answers[0], "rejected": answers[1]}
    with pytest.raises(ValueError, match=problem):
        ids(record, chat.Form(template, 1000))


def test_an_answer_that_shares_a_token_with_the_prompt_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizer"]))
    tokenizer = tokenizers.load(str(tmp_path / "tokenizer.json"))
    source = (TESTS / "data/chat_templates/chatml.jinja").read_text()
    form = chat.Form(ChatTemplate(source, (), "chatml"), 1000)
    record = {"prompt": "Hi", "chosen": "\nYes", "rejected": "\nNo"}
    with pytest.raises(ValueError, match="no token that begins where the prompt ends"):
        ids(record, form, tokenizer)


def test_a_pair_that_cannot_be_tokenized_is_named_or_skipped_and_counted(tmp_path):
    records = [PAIR, {"prompt": "Hi", "chosen": "", "rejected": "No"}]
    form = chat.Form(ChatTemplate(BARE.source, (("bos_token", "<s>"), ("eos_token", "")), "b"), 99)
    source = write(tmp_path / "pairs.jsonl", records)
    with pytest.raises(ValueError, match=r"data.source: 'Hi\\n' …: the answer ''"):
        opened(source, tmp_path, form)
    found = opened(source, tmp_path, form, skip_damaged=1)
    assert found.counts["pairs"] == 1
    assert found.counts["answers without tokens of their own"] == 1


def test_a_question_is_in_one_split_whatever_the_system_says():
    keys = set()
    for content in ("Be brief.", "Be long."):
        record = {n: [said("system", content), *PAIR[n]] for n in PAIR}
        key, found = document.from_record(record, READING)
        assert found.text == f"{content}\nHi\nYes" and found.preference.rejected
        assert found.conversation == found.preference.chosen
        keys.add(key)
    assert keys == {"Hi"}


def test_validation_text_is_the_prompt_with_its_chosen_answer():
    _, found = document.from_record({"prompt": "Hi", "completion": "No", "label": False}, READING)
    made = PLAIN.tokens(found.conversation, BYTES.with_offsets, tuple(BYTES.special_tokens))
    assert made.text == "No</s>\n" and np.sum(made.weights_N) == 4
