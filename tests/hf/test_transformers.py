"""Transformers loads the folders that we write, with the same logits."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moe_jax import config as configs
from moe_jax import hf, model, train, upcycle
from moe_jax.commands import convert, generate
from tests.hf.test_golden import GOLDEN, NAMES

pytestmark = pytest.mark.long
# Their code is not part of Transformers.
FOREIGN = ("lola", "skywork", "skywork_remote_names")
apply = jax.jit(model.apply, static_argnames="config")
TOKENS_BT = np.random.default_rng(0).integers(3, 100, (2, 17))


@pytest.fixture(scope="module")
def theirs():
    """Logits of a folder by Transformers."""
    reason = "needs pip install torch transformers"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)

    def logits(folder):
        # Its grouped products refuse rows that are no multiple of 16 bytes.
        network = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        with torch.no_grad():
            return network(torch.tensor(TOKENS_BT)).logits.numpy()

    return logits


def same(folder, config, params, theirs):
    hf.save(folder, config, params)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    ours, want = apply(params, TOKENS_BT, config).logits_BTV, theirs(folder)
    np.testing.assert_allclose(ours, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FOREIGN])
def test_a_saved_model_has_our_logits_in_transformers(name, tmp_path, theirs):
    same(tmp_path / "saved", *hf.load(GOLDEN / name), theirs)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama_rope3", {}),
        ("llama_yarn", {}),
        ("mistral", {}),
        ("qwen3", {}),
        ("llama", {"tie_word_embeddings": True}),
    ],
)
def test_an_upcycled_model_has_our_logits_in_transformers(name, changes, tmp_path, theirs):
    config, params = hf.load(GOLDEN / name)
    if changes:
        config = dataclasses.replace(config, **changes)
        params = {k: v for k, v in params.items() if k != "unembed"}
    moe = config.to_moe(num_experts=3, num_experts_per_tok=2)
    made = upcycle.upcycle(params, config, moe, recipe="drop", key=jax.random.key(0))
    same(tmp_path / "moe", moe, made, theirs)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def base_model(folder):
    """A mixture with a tokenizer of bytes whose end token is another than that of CHATML."""
    words = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*words, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, []))
    tokenizer.add_special_tokens(words)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = model.ModelConfig(
        model_type="mixtral",
        vocab_size=len(ids),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    hf.save(folder, config, model.init(config, jax.random.key(0)))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')


def test_a_tuned_model_answers_in_transformers_with_our_tokens_and_ends_there(
    tmp_path, monkeypatch, capsys
):
    reason = "needs pip install torch transformers"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base_model(tmp_path / "base")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    with open(tmp_path / "talks.jsonl", "w") as file:
        for n in range(80):
            talk = {"prompt": f"{n}?", "completion": "yes" if n % 2 else "no"}
            file.write(json.dumps(talk) + "\n")
    config = configs.default()
    config.init.source = str(tmp_path / "base")
    config.data.update(
        source=str(tmp_path / "talks.jsonl"),
        conversations=True,
        chat_template=str(tmp_path / "chatml.jinja"),
        sequence_length=64,
        packing="best_fit",
    )
    config.training.update(num_steps=60, batch_size=8)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=2)
    config.evaluation.batch_size = 8
    train.run(configs.resolve(config), tmp_path / "run")
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    talks = [
        [{**user, "content": "7?"}],
        [{"role": "system", "content": "Be brief."}, {**user, "content": "4?"}],
        [{**user, "content": "1?"}, {**assistant, "content": "yes"}, {**user, "content": "2?"}],
    ]
    asked, answered, folder = (tmp_path / n for n in ("asked.jsonl", "answers.jsonl", "tuned"))
    asked.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    chat = ["--chat", f"--messages={asked}", f"--output={answered}", "--num_tokens=24"]
    for command, arguments in (
        (convert, [f"--source={tmp_path / 'run'}", f"--output={folder}", "--to=hf"]),
        (generate, [f"--checkpoint={folder}", *chat]),
    ):
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        command.main()
    ours = [json.loads(line)["answer"] for line in answered.open()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for talk, answer in zip(talks, ours, strict=True):
        how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        prompt = tokenizer.apply_chat_template(talk, **how)
        found = network.generate(**prompt, do_sample=False, max_new_tokens=24)
        theirs = found[0, prompt["input_ids"].shape[1] :].tolist()
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert theirs == [*tokenizer.encode(answer, add_special_tokens=False), end]
