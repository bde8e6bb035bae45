"""A run on conversations from its data to an answer in its template."""

import json
import sys

import pytest
import tokenizers

from moe_jax import config as configs
from moe_jax import init, train
from moe_jax.commands import evaluate, generate
from moe_jax.data import tokenizers as data_tokenizers


def test_a_run_learns_answers_and_is_evaluated_and_asked_in_its_own_template(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with open(tmp_path / "talks.jsonl", "w") as file:
        for n in range(80):
            talk = {"prompt": f"{n}?", "completion": "yes" if n % 2 else "no", "id": n}
            file.write(json.dumps(talk) + "\n")
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    config = configs.default()
    config.model.update(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        remat="none",
    )
    config.data.update(
        source=str(tmp_path / "talks.jsonl"),
        conversations=True,
        chat_template=str(tmp_path / "mine.jinja"),
        sequence_length=32,
        packing="best_fit",
        validation_fraction=0.2,
    )
    config.training.update(num_steps=30, batch_size=8)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=2)
    config.evaluation.update(every_steps=15, batch_size=8, final_max_batches=0)
    result = train.run(configs.resolve(config), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [row["validation"]["loss"] for row in rows if "validation" in row]
    assert losses[-1] < 0.5 * losses[0]
    (tmp_path / "mine.jinja").unlink()  # the run has a copy
    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"--checkpoint={tmp_path / 'run'}", "--json"])
    evaluate.main()
    found = json.loads(capsys.readouterr().out)
    assert abs(found["loss"] - result["loss"]) < 1e-5
    talks = tmp_path / "asked.jsonl"
    talks.write_text(json.dumps({"messages": [{"role": "user", "content": "7?"}]}) + "\n")
    options = ["--chat", f"--checkpoint={tmp_path / 'run'}", f"--messages={talks}"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *options, "--num_tokens=8"])
    generate.main()
    answer = json.loads(capsys.readouterr().out)["answer"]
    assert set(answer) <= set("yesno")


@pytest.mark.parametrize(
    ("end", "settings", "expected"),
    [
        ("<|turn|>", None, {"eos_token_id": [1, 2]}),
        ("<|turn|>", {"top_k": 5, "eos_token_id": 0}, {"top_k": 5, "eos_token_id": [0, 2]}),
        ("</s>", None, None),  # the tokenizer's own end token
        ("\n", None, None),
    ],
)
def test_a_run_keeps_the_token_that_ends_a_turn_where_transformers_looks_for_it(
    end, settings, expected, tmp_path, capsys
):
    """A base model's end token ends texts, and a chat template's often another one turns."""
    words = {"<s>": 0, "</s>": 1, "<|turn|>": 2, "a": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "a"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<|turn|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    if settings:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{{ m.content + '" + end + "' }}{% endfor %}"
    )
    config = configs.default()
    config.model.update(
        vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    config.data.update(
        source="talks.jsonl",
        conversations=True,
        tokenizer=str(tmp_path / "tokenizer.json"),
        chat_template=str(tmp_path / "mine.jinja"),
    )
    (tmp_path / "run").mkdir()
    for _ in range(2):  # a resumed run changes nothing
        init.keep_from_parents(
            configs.resolve(config), data_tokenizers.load(config.data.tokenizer), tmp_path / "run"
        )
    kept = tmp_path / "run" / "tokenizer" / "generation_config.json"
    assert (json.loads(kept.read_text()) if kept.exists() else None) == expected
    assert ("nothing will end an answer" in capsys.readouterr().err) == (end == "\n")
