"""Experts that stay in the folder: the same bits as in memory, in no more memory than given."""

import dataclasses
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import hf, model
from moe_jax.commands import generate as generate_command
from moe_jax.data import tokenizers
from moe_jax.evaluation import generate
from moe_jax.hf import offload
from moe_jax.model.layout import sparse_layers
from moe_jax.ops import grouped_host, host_memory
from tests.hf.test_golden import GOLDEN

NUM_TOKENS = 6


def tokens_of(params, config, prompts):
    return np.stack(generate.generate(params, config, prompts, num_tokens=NUM_TOKENS))


def expert_bytes(folder):
    config, params = hf.load(folder)
    experts = (b["moe"]["experts"] for b in params["blocks"].values() if "moe" in b)
    total = sum(x.nbytes for leaves in experts for x in leaves.values() if x.ndim == 4)
    return total / config.num_experts


@pytest.mark.parametrize(
    ("name", "kept", "tolerance"),
    [
        ("mixtral", 1 / 3, 0),
        ("mixtral", 2.5, 0),
        ("olmoe", 100, 0),
        # The flags of these tests let XLA round LOLA's norms in another way; its own do not.
        ("lola", 1, 1e-5),
    ],
)
def test_logits_and_tokens_are_those_of_the_model_in_memory(name, kept, tolerance):
    config, params = hf.load(GOLDEN / name)
    draw = np.random.default_rng(0).integers
    prompts = [draw(0, config.vocab_size, n).astype(np.int32) for n in (7, 4)]
    apply = jax.jit(model.apply, static_argnames="config")
    _, there, store = offload.load(GOLDEN / name, kept * expert_bytes(GOLDEN / name))
    np.testing.assert_allclose(
        apply(there, jnp.asarray(prompts[0])[None], config=config).logits_BTV,
        apply(params, jnp.asarray(prompts[0])[None], config=config).logits_BTV,
        rtol=tolerance,
        atol=tolerance,
    )
    np.testing.assert_array_equal(
        tokens_of(there, config, prompts), tokens_of(params, config, prompts)
    )
    held = [
        sum(r.result().nbytes for r in of_layer.values() if r.done()) for of_layer in store._held
    ]
    assert max(held) <= kept * expert_bytes(GOLDEN / name) / len(sparse_layers(config))


def test_the_counts_say_what_was_read():
    """With room for all experts each matrix is read once, and after that found."""
    folder = GOLDEN / "mixtral"
    config, there, store = offload.load(folder, 1e9)
    prompts = [np.arange(3, dtype=np.int32)]
    tokens_of(there, config, prompts)
    assert store.counts.bytes_read <= config.num_experts * expert_bytes(folder)
    read, waited = store.counts.bytes_read, store.counts.waited
    tokens_of(there, config, prompts)
    assert (store.counts.bytes_read, store.counts.waited) == (read, waited)
    assert store.counts.in_memory > 0


def test_a_product_in_parts_counts_its_matrix_once(monkeypatch):
    """LOLA has one expert for a token, whose columns are divided over the cores."""
    monkeypatch.setattr(grouped_host, "_num_cores", lambda: 3)
    config, there, store = offload.load(GOLDEN / "lola", 1e9)
    generate.generate(there, config, [np.array([1])], num_tokens=3)
    counts, sparse = store.counts, len(sparse_layers(config))
    assert counts.in_memory + counts.ahead + counts.waited == 3 * sparse * len(("up", "down"))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="GB have no room for one matrix of each of the 3 sparse"):
        offload.load(GOLDEN / "mixtral", 10.0)
    with pytest.raises(ValueError, match="llama has no experts that could stay out of memory"):
        offload.load(GOLDEN / "llama", 1e9)


def test_a_damaged_expert_ends_the_command_with_one_line(tmp_path, capsys, monkeypatch):
    """A folder in memory is refused when it is read; here that is in the middle of a product."""
    config, params = hf.load(GOLDEN / "mixtral")
    # The bytes' tokenizer needs more ids than the golden model has.
    more = ((0, tokenizers.ByteTokenizer.vocab_size - config.vocab_size), (0, 0))
    config = dataclasses.replace(config, vocab_size=tokenizers.ByteTokenizer.vocab_size)
    params["embed"]["tokens"] = np.pad(params["embed"]["tokens"], more)
    params["unembed"] = np.pad(params["unembed"], more[::-1])
    params["blocks"]["0"]["moe"]["experts"]["down"][:, :, 0, 0] = np.nan
    hf.save(tmp_path / "moe", config, params)
    options = [f"--checkpoint={tmp_path / 'moe'}", "--prompt=a", "--tokenizer=bytes"]
    options += ["--num_tokens=2", "--offload=1"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *options])
    monkeypatch.setattr(tokenizers.ByteTokenizer, "prompt", lambda self, text: np.array([1]))
    with pytest.raises(SystemExit) as ended:
        generate_command.main()
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "w2.weight are not finite" in last, last


PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = ["generate", *sys.argv[2:]]
from moe_jax.commands import generate
generate.main()
"""


@pytest.mark.long
def test_a_mixture_larger_than_the_limit_of_memory_generates_the_same(tmp_path):
    """1.6 GB of experts under a limit of 1.2 GB for the memory of the whole process."""
    config = model.ModelConfig(
        model_type="mixtral",
        vocab_size=259,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_experts=8,
        num_experts_per_tok=2,
    )
    folder = tmp_path / "moe"
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))
    hf.save(folder, config, params)
    del params

    def said(limit, *more):
        command = [sys.executable, "-c", PROGRAM, str(int(limit)), f"--checkpoint={folder}"]
        command += ["--prompt=To insert", "--num_tokens=8", "--tokenizer=bytes", *more]
        return subprocess.run(command, capture_output=True, text=True)

    unlimited, limited = said(resource.RLIM_INFINITY), said(1.2e9, "--offload=0.5")
    assert limited.returncode == 0, limited.stderr
    assert limited.stdout == unlimited.stdout != ""
    assert "GB read; of the experts' matrices" in limited.stderr
    assert said(1.2e9).returncode != 0


@pytest.mark.parametrize(("name", "tolerance"), [("mixtral", 0), ("olmoe", 0), ("lola", 1e-5)])
def test_experts_in_the_hosts_memory_give_the_same_logits_and_tokens(name, tolerance):
    """A CPU has that kind of memory too. One row chooses fewer experts than there are."""
    config, params = hf.load(GOLDEN / name)
    _, there = offload.load_into_host_memory(GOLDEN / name, 1e9)
    prompts = [np.random.default_rng(0).integers(0, config.vocab_size, 7).astype(np.int32)]
    apply = jax.jit(model.apply, static_argnames="config")
    for tokens_BT in (prompts[0][None], prompts[0][None, :1]):
        np.testing.assert_allclose(
            apply(there, tokens_BT, config=config).logits_BTV,
            apply(params, tokens_BT, config=config).logits_BTV,
            rtol=tolerance,
            atol=tolerance,
        )
    np.testing.assert_array_equal(
        tokens_of(there, config, prompts), tokens_of(params, config, prompts)
    )


@pytest.mark.parametrize("sizes", [[0, 3, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
def test_only_the_experts_that_rows_chose_are_sent(sizes):
    stack_XDF = jnp.arange(12.0)[:, None, None] * jnp.ones((1, 2, 3))
    weights = host_memory.HostExperts(stack_XDF, jnp.int32(1), matrices=(6, 2, 3))
    (sent_nDF,), sizes_n = host_memory.sent((weights,), jnp.array(sizes, jnp.int32), num_rows=5)
    chosen = [expert for expert, size in enumerate(sizes) if size]
    np.testing.assert_array_equal(sent_nDF[: len(chosen), 0, 0], [6.0 + e for e in chosen])
    np.testing.assert_array_equal(sizes_n, [s for s in sizes if s] + [0] * (5 - len(chosen)))


def test_one_layer_of_experts_must_fit_beside_an_accelerator():
    with pytest.raises(ValueError, match=r"1e-06 GB have no room for the experts of one layer"):
        offload.load_into_host_memory(GOLDEN / "mixtral", 1e3)
