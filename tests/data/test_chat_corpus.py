"""Conversations as token records: the loss is that of the answers, whatever happens to prompts."""

import functools
import json

import jax
import numpy as np
import pyarrow
import pytest
import tokenizers as hf_tokenizers
from pyarrow import parquet

from moe_jax import model
from moe_jax.config.data import Data
from moe_jax.data import (
    batches,
    chat,
    chat_template,
    document,
    policy,
    prepare,
    sources,
    tokenizers,
)
from moe_jax.data.mixed import MixedText
from moe_jax.data.packing import RowPlan
from moe_jax.evaluation import perplexity
from moe_jax.training import objective

BYTES = tokenizers.load("bytes")
T = 64
PLAIN = chat.Form(chat_template.PLAIN, T + 1)
HOW = {"validation_fraction": 0}


def talk(*contents):
    roles = ("user", "assistant") * len(contents)
    pairs = zip(roles, contents, strict=False)
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


TALKS = [
    talk("What?", "This."),
    talk("Why?", "So.", "And?", "No."),
    talk("Long?", "Yes.", "More?", "x" * 40),
    talk("Too long?", "y" * 90),
]


def opened(tmp_path, records=TALKS, most=T + 1, template=chat_template.PLAIN, **how):
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return open_path(tmp_path, tmp_path / "talks.jsonl", chat.Form(template, most), **how)


def open_path(tmp_path, path, form=PLAIN, **how):
    reading = policy.Reading(conversations=True, **how)
    cache = tmp_path / "cache"
    return prepare.open_corpus(
        *(str(path), "train", BYTES), **HOW, cache=cache, reading=reading, form=form
    )


def trained(corpus, record):
    tokens, weights = corpus.tokens(record), corpus.weights(record)
    return BYTES.decode(tokens[1:][weights > 0])


def test_the_answers_of_a_record_are_trained_and_its_prompts_are_not(tmp_path, capsys):
    corpus = opened(tmp_path)
    assert [trained(corpus, i) for i in range(3)] == ["This.\n", "So.\nNo.\n", "Yes.\n"]
    whole = BYTES.decode(corpus.tokens(1))
    assert whole == "user:\nWhy?\nassistant:\nSo.\nuser:\nAnd?\nassistant:\nNo.\n"
    assert len(corpus.pairs) == 3  # the last conversation fits into no row
    assert corpus.num_tokens == sum(int(corpus.weights(i).sum()) for i in range(3))
    said = "".join(capsys.readouterr())
    assert "conversation that does not fit into a row: 1" in said
    assert "message at the end that does not fit into a row: 2" in said


def test_bytes_per_token_are_those_of_the_answers(tmp_path):
    corpus = opened(tmp_path, TALKS[:1])
    # "This." with the end token, as 6 tokens, and a newline; the end token is written </s>.
    assert corpus.num_tokens == 7 and corpus.bytes_per_label == (len("This.</s>\n"),)


def made(corpus, per_document=False):
    plan = RowPlan(corpus.pairs, sequence_length=T, seed=0, packing="best_fit")
    columns = MixedText({"": corpus}).columns(per_document=per_document)
    return next(batches.batches(corpus, plan, batch_size=2, columns=columns))


CONFIG = model.ModelConfig(
    model_type="mixtral",
    vocab_size=BYTES.vocab_size,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=2,
    num_experts_per_tok=1,
)


@functools.cache
def parameters():
    return jax.jit(lambda key: model.init(CONFIG, key))(jax.random.key(0))


@jax.jit
def token_losses(params, batch):
    x_BTD, _ = objective.hidden_states(params, batch, None, CONFIG)
    return objective.token_losses(params, x_BTD, batch)


def test_a_changed_prompt_target_changes_no_loss_and_a_changed_answer_changes_its_own(tmp_path):
    batch = made(opened(tmp_path))

    def losses(targets_BT):
        changed = batch.replace(targets_BT=targets_BT)
        return np.asarray(token_losses(parameters(), changed) * batch.weights_BT)

    before = losses(batch.targets_BT)
    is_answer = batch.weights_BT > 0
    np.testing.assert_array_equal(losses(np.where(is_answer, batch.targets_BT, 7)), before)
    row, column = np.argwhere(is_answer)[3]
    targets = batch.targets_BT.copy()
    targets[row, column] = 7
    changed = np.argwhere(losses(targets) != before)
    assert changed.tolist() == [[row, column]]


def test_the_held_out_loss_is_that_of_the_answers(tmp_path):
    held_out = MixedText({"": opened(tmp_path)})
    how = {"sequence_length": T, "batch_size": 2, "columns": held_out.columns()}
    (batch,) = batches.evaluation_batches(held_out, **how)
    step = perplexity.make_eval_step(CONFIG, len(held_out.labels))
    found = perplexity.evaluate(step, parameters(), [batch], held_out.bytes_per_token).loss()
    nats_BT = np.asarray(token_losses(parameters(), batch))
    assert found.held_out_tokens == held_out.num_tokens == batch.weights_BT.sum()
    expected = (nats_BT * batch.weights_BT).sum() / batch.weights_BT.sum()
    assert found.loss == pytest.approx(expected, rel=1e-5)


def test_a_held_out_conversation_is_whole(tmp_path):
    held_out = MixedText({"": opened(tmp_path, [talk("Why?" * n, "So.") for n in range(1, 9)])})
    how = {"sequence_length": T, "batch_size": 2, "columns": held_out.columns()}
    lengths = []
    for batch in batches.evaluation_batches(held_out, **how):
        for segments_T in batch.segment_ids_BT:
            lengths += np.bincount(segments_T)[1:].tolist()
    assert sorted(filter(None, lengths)) == sorted(held_out.pairs)


def test_per_document_the_weights_of_each_conversation_sum_to_1(tmp_path):
    batch = made(opened(tmp_path), per_document=True)
    for weights_T, segments_T in zip(batch.weights_BT, batch.segment_ids_BT, strict=True):
        for segment in set(segments_T.tolist()) - {0}:
            assert weights_T[segments_T == segment].sum() == pytest.approx(1)


def test_a_record_that_is_no_conversation_is_named_or_skipped_and_counted(tmp_path):
    records = [TALKS[0], {"text": "no"}, {"messages": [{"role": "user", "content": "?"}]}]
    with pytest.raises(ValueError, match='talks.jsonl:2 has none of "messages"'):
        opened(tmp_path, records)
    corpus = opened(tmp_path, records, skip_damaged=2)
    assert corpus.skipped == {"no conversation": 2} and len(corpus.pairs) == 1


def marking(source):
    return chat_template.ChatTemplate(source, (), "here.jinja")


ANSWER_ALONE = marking(
    "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
)


def test_text_of_which_no_token_has_a_loss_is_refused_each_time(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="no token of its train conversations has a loss") as e:
            opened(tmp_path, [talk("?", ""), talk("!", "")], template=ANSWER_ALONE)
        assert "here.jinja" in str(e.value) and "give answers with text" in str(e.value)


def test_a_label_without_a_loss_has_no_bytes_per_token(tmp_path):
    records = [{**talk("?", ""), "lang": "a"}, {**talk("!", "Yes."), "lang": "b"}]
    found = opened(tmp_path, records, template=ANSWER_ALONE)
    assert found.bytes_per_token == {"a": 0.0, "b": 1.0}


def test_a_template_that_writes_nothing_is_named(tmp_path):
    empty = "{% for m in messages if m.role == 'assistant' %}{% generation %}{% endgeneration %}"
    with pytest.raises(ValueError, match="no train conversation has any text, as .* here.jinja"):
        opened(tmp_path, [talk("?", "")], template=marking(empty + "{% endfor %}"))


def test_a_split_that_lost_all_conversations_says_why(tmp_path):
    with pytest.raises(ValueError) as error:
        opened(tmp_path, TALKS[3:])
    assert str(error.value).endswith(
        "has no train documents, and conversations do not fit into a row of 64 tokens: 1; raise "
        "config.data.sequence_length"
    )
    with pytest.raises(ValueError, match="were skipped .no conversation: 1.; mend them, or set"):
        opened(tmp_path, [{"text": "a"}], skip_damaged=5)
    with pytest.raises(ValueError, match="not be tokenized: 2, such as .*raises.*; mend them$"):
        raising = marking("{{ raise_exception('raises') }}")
        opened(tmp_path, TALKS[:2], template=raising, skip_damaged=5)


def test_a_text_file_has_no_conversations(tmp_path):
    (tmp_path / "a.txt").write_text("plain text")
    with pytest.raises(ValueError, match=r"a.txt is text, which has no conversations; give .jsonl"):
        open_path(tmp_path, tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("record", "fix"),
    [
        ({"messages": []}, "set config.data.conversations=True"),
        ({"conversations": []}, "set config.data.conversations=True"),
        ({"prompt": "a", "completion": "b"}, "set config.data.conversations=True"),
        ({"prompt": "a"}, "set config.data.text_field to the one with the text"),
    ],
)
def test_conversations_read_as_text_say_which_key_reads_them(record, fix, tmp_path):
    with pytest.raises(policy.UnusableError) as error:
        document.from_record(record, policy.STRICT)
    assert str(error.value).endswith(fix)
    table = pyarrow.Table.from_pylist([record])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError) as error:
        list(sources.documents(*(str(tmp_path / "a.parquet"), "train"), **HOW, data_dir=tmp_path))
    assert fix in str(error.value)


def test_a_command_without_a_config_names_a_fix_that_it_has(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    read = sources.texts("--text", str(tmp_path / "a.jsonl"), "train", **HOW, data_dir=tmp_path)
    with pytest.raises(ValueError, match="^--text: .*a.jsonl:1 has no .text.*; write the text of"):
        list(read)


def test_a_line_that_is_no_json_names_the_fields_of_conversations(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": \n')
    with pytest.raises(ValueError, match='bad.jsonl:1 is not a JSON object with "messages", "conv'):
        open_path(tmp_path, tmp_path / "bad.jsonl")


def test_text_and_conversations_can_be_mixed(tmp_path):
    talks = opened(tmp_path)
    (tmp_path / "a.txt").write_text("plain text")
    text = prepare.open_corpus(
        str(tmp_path / "a.txt"), "train", BYTES, validation_fraction=0, cache=tmp_path / "cache"
    )
    mixed = MixedText({"text": text, "talks": talks})
    (column,) = mixed.columns().values()
    assert (column(0) == 1).all() and column(1).tolist() == talks.weights(0).tolist()


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"conversations": False}, None),
        ({"conversations": True, "tokenizer": "bytes"}, "plain"),
        ({"conversations": True, "tokenizer": "x/t.json", "chat_template": "plain"}, "plain"),
    ],
)
def test_the_form_of_a_config(keys, place):
    form = chat.form_of(Data(**keys))
    assert (form and form.template.place) == place
    with pytest.raises(ValueError, match="data.chat_template='none.jinja' is no file"):
        chat.form_of(Data(conversations=True, chat_template="none.jinja"))


@pytest.mark.parametrize("given", ["plain", "elsewhere/mine.jinja"])
def test_a_named_template_writes_the_special_tokens_of_the_tokenizer(given, tmp_path, monkeypatch):
    """A run's copy of the template is read beside its tokenizer: both must be the same text."""
    monkeypatch.chdir(tmp_path)
    for folder in ("elsewhere", "model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "elsewhere" / "mine.jinja").write_text("{{ messages[0].content + eos_token }}")
    roles = {"bos_token": "<|begin|>", "eos_token": "<|turn|>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(roles))
    tokenizer = str(tmp_path / "model" / "tokenizer.json")
    form = chat.form_of(Data(conversations=True, tokenizer=tokenizer, chat_template=given))
    messages = [{"role": "user", "content": "a"}]
    text = form.template.render(messages).text
    assert "a<|turn|>" in text and "</s>" not in text
    (tmp_path / "model" / chat_template.FILE).write_text(form.template.source)
    assert chat_template.load(tmp_path / "model").render(messages).text == text


def test_a_tokenizer_alone_ends_turns_by_the_token_that_ends_its_texts(tmp_path):
    tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordLevel({"<|endoftext|>": 0}))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path = str(tmp_path / "tokenizer.json")
    tokenizer.save(path)
    form = chat.form_of(Data(conversations=True, tokenizer=path, chat_template="plain"))
    own = tokenizers.load(path)
    (end,) = chat.turn_ends(form.template, tuple(own.special_tokens))
    assert own.special_tokens[end] == own.eos_id


def test_the_embedded_pages_are_questions_and_answers(tmp_path):
    from moe_jax.data import sources
    from moe_jax.data.cache import DATASETS, cache_folder

    how = {"validation_fraction": 0, "data_dir": cache_folder("") / DATASETS}
    reading = policy.Reading(conversations=True)
    page = next(iter(sources.documents("instructions", "validation", reading=reading, **how)))
    asked, answered = page.conversation.messages
    assert asked["role"] == "user" and answered["role"] == "assistant"
    assert page.text == f"{asked['content']}\n{answered['content']}"
    with pytest.raises(ValueError, match=r"set data\.conversations=True"):
        list(sources.documents("instructions", "validation", **how))
