"""Loss masks of conversations against those of TRL's SFTTrainer (tests/golden/trl/make_masks.py).

TRL makes a mask in two ways. "completion": a record with a prompt and a completion, whose tokens
after the prompt's are trained; this works with any template. "assistant": a conversation, whose
turns are found by the marks {% generation %} in TRL's own training templates for Llama-3, Qwen2.5
(ChatML) and Qwen3, and in our marked ChatML; TRL refuses the other families.
"""

import json
import pathlib

import numpy as np
import pytest

from moe_jax.data import chat, tokenizers
from moe_jax.data.chat_template import ChatTemplate

TESTS = pathlib.Path(__file__).parents[1]
GOLDEN = json.loads((TESTS / "golden/trl/masks.json").read_text())
TOKENS = (("bos_token", "<s>"), ("eos_token", "</s>"))
ROWS = {f"{row['family']}, {row['kind']}, {row['case']}": row for row in GOLDEN["masks"]}
# TRL's training template of Qwen2.5 marks the line break after <|im_start|>assistant, which is a
# part of the prompt that the model is asked with. TRL's own completion masks leave it out.
HEADER = {name for name in ROWS if name.startswith("chatml, assistant")}
# TRL trains a token with a part of the prompt in it: here "\n\n", of the header's line break and
# the answer's. A model that is asked with the prompt never says this token, and TRL warns of it.
CROSSING = {name for name in ROWS if name.endswith("newline")}
# TRL's training template of Qwen3 writes thoughts into all turns, the published one into the last.
THOUGHTS = {name for name in ROWS if name.startswith("qwen3, assistant, 2 turns")}
THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("trl") / "tokenizer.json"
    path.write_text(json.dumps(GOLDEN["tokenizer"]))
    return tokenizers.load(str(path))


def ours(row, tokenizer):
    source = (TESTS / f"data/chat_templates/{row['family']}.jinja").read_text()
    form = chat.Form(ChatTemplate(source, TOKENS, "here"), 1000)
    special = tuple(tokenizer.special_tokens)
    return form.tokens(chat.conversation(row["record"]), tokenizer.with_offsets, special)


@pytest.mark.parametrize("name", sorted(ROWS.keys() - HEADER - CROSSING - THOUGHTS))
def test_tokens_and_mask_are_those_of_trl(name, tokenizer):
    found = ours(ROWS[name], tokenizer)
    assert found.ids_N.tolist() == ROWS[name]["ids"]
    assert found.weights_N.tolist() == ROWS[name]["mask"]


def test_every_family_is_compared_with_and_without_a_system_turn():
    cases = {(row["family"], row["case"]) for row in ROWS.values() if row["kind"] == "completion"}
    families = ("llama2", "llama3", "chatml", "tulu", "mistral", "qwen3")
    ways = [f"turn {turn}{system}" for turn in (1, 2) for system in ("", ", system")]
    assert cases == {(f, way) for f in families for way in ways} | {("chatml", "newline")}


@pytest.mark.parametrize("name", sorted(HEADER | CROSSING))
def test_a_token_of_the_prompt_is_trained_by_trl_alone(name, tokenizer):
    found, row = ours(ROWS[name], tokenizer), ROWS[name]
    assert found.ids_N.tolist() == row["ids"]
    differ = np.flatnonzero(found.weights_N != row["mask"])
    assert len(differ) == (2 if "2 turns" in name else 1)
    for at in differ:
        assert found.weights_N[at] == 0
        assert tokenizer.decode(found.ids_N[:at]).endswith("assistant")
        assert tokenizer.decode(found.ids_N[at : at + 1]) == "\n\n"[: 1 + (name in CROSSING)]


@pytest.mark.parametrize("name", sorted(THOUGHTS))
def test_trl_trains_thoughts_that_qwen3_does_not_show_in_earlier_turns(name, tokenizer):
    def trained(ids, mask):
        kept = np.array(ids)[np.array(mask) > 0]
        assert np.sum(kept == tokenizer.special_tokens["<|im_end|>"]) == 2
        return tokenizer.decode(kept)

    found, row = ours(ROWS[name], tokenizer), ROWS[name]
    first, last = "A matrix.", THOUGHT + "A small network.\n"
    assert trained(found.ids_N, found.weights_N) == first + last
    assert trained(row["ids"], row["mask"]) == THOUGHT + first + "\n" + last
    shown = tokenizer.decode(found.ids_N)
    assert tokenizer.decode(row["ids"]) == shown.replace(first, THOUGHT + first)
