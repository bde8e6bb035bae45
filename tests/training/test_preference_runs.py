"""Whole runs on pairs of answers: what they learn, their cached reference, and what is refused."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import model, stores, train
from moe_jax.analysis import answers
from moe_jax.data import document, preferences, tokenizers
from moe_jax.data.policy import STRICT
from moe_jax.parallel import mesh as meshes
from moe_jax.training import metrics, reference, text

START = model.ModelConfig(
    vocab_size=259,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    remat="none",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config of a run on pairs, of which the shorter answer is chosen, and its start."""
    folder = tmp_path_factory.mktemp("pairs")
    draw = np.random.default_rng(0)
    lines = []
    for i in range(64):
        short, long = ("ab" * draw.integers(1, 4), "cd" * draw.integers(5, 8))
        lines.append({"prompt": f"{i}? ", "chosen": short, "rejected": long, "id": str(i)})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text)
    params = jax.jit(lambda key: model.init(START, key))(jax.random.key(0))
    stores.save(folder / "start", START, params)
    config = configs.default()
    config.init.source = str(folder / "start")
    config.data.update(source=str(folder / "pairs.jsonl"), sequence_length=48)
    config.data.update(validation_fraction=0.25, cache_dir=str(folder / "cache"))
    config.objective.name = "dpo"
    config.objective.preference.reference = str(folder / "start")
    config.balance.load_balancing_coefficient = 0.0
    config.optimizer.learning_rate = 3e-3
    config.training.update(num_steps=0, num_epochs=2.5, batch_size=8, log_every=1, log_to=())
    config.evaluation.update(batch_size=16, every_steps=10, max_batches=1, final_max_batches=1)
    return config


def test_a_run_on_messages_has_the_pairs_of_one_on_plain_strings(run, tmp_path):
    """The template writes the prompt and the answer as they are, between begin and end token."""
    config = run.copy_and_resolve_references()
    (tmp_path / "bare.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    with open(tmp_path / "talks.jsonl", "w") as file:
        for line in pathlib.Path(run.data.source).read_text().splitlines():
            pair = json.loads(line)
            asked = {"role": "user", "content": pair["prompt"]}
            for name in ("chosen", "rejected"):
                pair[name] = [asked, {"role": "assistant", "content": pair[name]}]
            file.write(json.dumps(pair) + "\n")
    config.data.update(source=str(tmp_path / "talks.jsonl"), conversations=True)
    config.data.chat_template = str(tmp_path / "bare.jinja")
    plain, made = (
        text.open_text(configs.resolve(one), tokenizers.load("bytes"), pathlib.Path(tmp_path))
        for one in (run, config)
    )
    assert made.digests["train"] == plain.digests["train"]
    assert made.pairs.digest == plain.pairs.digest
    # The held-out text is the same, but the loss of messages is that of the chosen answers.
    held_out, weighted = plain.held_out, made.held_out
    assert (
        held_out.num_tokens
        > weighted.num_tokens
        == sum(
            int(made.pairs.weights(record).sum()) for record in range(0, len(made.pairs.pairs), 2)
        )
    )


def rows_of(workdir, key):
    return [row for row in metrics.read(workdir / "metrics.jsonl") if key in row]


def test_a_run_comes_to_prefer_what_is_chosen(run, tmp_path, capsys):
    result = train.run(configs.resolve(run), tmp_path)
    said = capsys.readouterr().err
    [number] = re.findall(r"train pairs: (\d+), prompts cut: 0, left out: 0", said)
    steps = -(-5 * int(number) // 16)
    training, held_out = (rows_of(tmp_path, key) for key in ("gradient_norm", "preferences"))
    assert result["steps"] == steps == len(training)
    assert f"training.num_epochs=2.5 of {number} rows is training.num_steps={steps}" in said
    assert configs.load_json(tmp_path).training.num_steps == steps
    # It begins as its reference.
    np.testing.assert_allclose(training[0]["loss"], np.log(2), rtol=1e-6)
    assert training[0]["reference_kl"] < 1e-9
    begin, *_, end = (row["preferences"] for row in held_out)
    assert begin["preference_accuracy"] == 0 and end["preference_accuracy"] == 1
    assert end["chosen_log_prob"] > begin["chosen_log_prob"]
    assert end == result["preferences"]


def test_the_cached_log_probs_are_the_reference_models(run, tmp_path):
    mesh = meshes.make({"fsdp": 8})
    config, params = stores.load(pathlib.Path(run.init.source), mesh)
    text = pathlib.Path(run.data.source).read_text()
    lines = [document.from_json(line, STRICT)[1] for line in text.splitlines()[:6]]
    pairs = preferences.of_documents(lines, tokenizers.load("bytes"), 48)
    how = {"cache": tmp_path, "sequence_length": 48, "batch_size": 8}
    made = reference.with_reference(pairs, config, params, mesh, **how)
    for record in range(len(pairs.pairs)):
        tokens, at = pairs.tokens(record), int(pairs.answers_R[record])
        padded = jnp.asarray(np.pad(tokens, (0, 48 - len(tokens))))[None]
        log_p = jax.nn.log_softmax(jitted_apply(params, padded, config))[0]
        by_hand = log_p[np.arange(at - 1, len(tokens) - 1), tokens[at:]]
        np.testing.assert_allclose(made.reference(record)[at - 1 :], by_hand, atol=2e-6)
        assert not made.reference(record)[: at - 1].any()
    [path] = (tmp_path / "references").iterdir()
    np.save(path, made.reference_X - 1)  # the file is read, unless the model or the pairs changed
    again = reference.with_reference(pairs, config, params, mesh, **how)
    np.testing.assert_array_equal(again.reference_X, made.reference_X - 1)
    other = jax.tree.map(lambda x: x * 1.5, params)
    changed = reference.with_reference(pairs, config, other, mesh, **how)
    assert np.abs(changed.reference_X - made.reference_X).max() > 1e-3
    path.write_bytes(path.read_bytes()[:-9])  # a damaged file is not read
    mended = reference.with_reference(pairs, config, params, mesh, **how)
    np.testing.assert_array_equal(mended.reference_X, made.reference_X)


@functools.partial(jax.jit, static_argnums=2)
def jitted_apply(params, tokens_BT, config):
    return model.apply(params, tokens_BT, config).logits_BTV


@pytest.mark.long
def test_a_run_with_a_frozen_reference_has_the_numbers_of_one_with_a_cached_one(run, tmp_path):
    frozen = run.copy_and_resolve_references()
    frozen.objective.preference.reference_log_probs = "frozen"
    names = (*answers.MEASURES, "loss", "gradient_norm")
    found = []
    for name, config in (("cached", run), ("frozen", frozen)):
        result = train.run(configs.resolve(config), tmp_path / name)
        rows = rows_of(tmp_path / name, "gradient_norm")
        found.append([[row[n] for n in names] for row in rows])
        found[-1].append([*result["preferences"].values(), 0.0])
    np.testing.assert_allclose(*found, rtol=1e-6, atol=1e-12)


REFUSED = {
    "needs a reference model; set objective.preference.reference": {
        "objective.preference.reference": ""
    },
    "logit_z_coefficient=0.1 is for objective.name='next_token'": {
        "objective.logit_z_coefficient": 0.1
    },
    "document_mask=False has no effect without config.objective.name='next_token'": {
        "data.document_mask": False
    },
    "average='document' has no effect": {"objective.average": "document"},
    "label_smoothing=0.1 has no effect": {"objective.preference.label_smoothing": 0.1},
    "for messages, set data.conversations=True": {"data.source": "messages"},
    "data.packing='best_fit' has no effect": {"data.packing": "best_fit"},
    "data.reset_positions=False has no effect": {"data.reset_positions": False},
    "set exactly one of them": {"training.num_steps": 10},
    "warmup_steps=100": {"optimizer.warmup_steps": 100},
    "no train pairs that fit into rows of 8": {"data.sequence_length": 8},
    "config.objective.name='dop' is unknown: did you mean": {"objective.name": "dop"},
    "is no pair; give": {"data.source": "text"},
    "have one answer; use 'kto'": {"data.source": "unpaired"},
}


WRONG = {
    "text": lambda i: {"text": f"text {i}"},
    "unpaired": lambda i: {"prompt": f"{i}", "completion": "b", "label": True},
    "messages": lambda i: {
        name: [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": name}]
        for name in ("chosen", "rejected")
    },
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(complaint, run, tmp_path):
    config = run.copy_and_resolve_references()
    for key, value in REFUSED[complaint].items():
        *sections, name = key.split(".")
        functools.reduce(getattr, sections, config)[name] = value
    if config.data.source in WRONG:
        rows = [WRONG[config.data.source](i) for i in range(20)]
        config.data.source = str(tmp_path / "rows.jsonl")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(configs.ConfigError) as error:
        train.run(configs.resolve(config), tmp_path / "run")
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
