"""Transformers loads the folders that we write, with the same logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import hf, model, upcycle
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
