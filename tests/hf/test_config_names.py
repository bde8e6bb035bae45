"""A key that nothing reads is refused: a flipped bit in a name gives no other model in silence."""

import json

import pytest

from moe_jax.hf import configs
from tests.hf.test_configs import read, refusal, values
from tests.hf.test_golden import GOLDEN

FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def misspelt(name: str):
    """The names with one flipped bit in one of their letters."""
    for place, letter in enumerate(name):
        for bit in range(7):
            yield name[:place] + chr(ord(letter) ^ 1 << bit) + name[place + 1 :]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_flipped_bit_in_a_name_is_refused_or_of_no_effect(folder):
    before = json.loads((GOLDEN / folder / "config.json").read_text())
    model, refused = configs.read(before), 0
    for number, name in enumerate(before):
        if name == "model_type":
            continue
        for flipped in list(misspelt(name))[number % 5 :: 5]:
            after = {flipped if n == name else n: value for n, value in before.items()}
            if len(after) < len(before):
                continue  # it is another key of the file
            try:
                assert configs.read(after) == model, flipped
            except configs.UnsupportedError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("model_type", "changes", "complaint"),
    [
        ("llama", {"rope_tetha": 5e5}, "did you mean rope_theta?"),
        ("llama", {"hidden_sizes": 32}, "did you mean hidden_size?"),
        ("qwen3_moe", {"norm_topk_probs": True}, "did you mean norm_topk_prob?"),
        ("mistral", {"sliding_windows": None}, "did you mean sliding_window?"),
        ("llama", {"rope_scalinf": {}}, "did you mean rope_scaling?"),
        ("llama", {"attention_sinks": 4}, "'attention_sinks' is no key that a llama is known"),
        ("llama", {"rope_interleaved": True}, "remove it if the model computes the same"),
        ("llama", {"sliding_window": 4096}, "'sliding_window' is no key that a llama"),
        ("mixtral", {"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported"),
        ("gpt2", {"a\nb" * 99: 1}, "is no key that a gpt2 is known to have"),
    ],
)
def test_a_key_that_the_family_has_not_is_refused(model_type, changes, complaint):
    assert complaint in refusal(values(model_type, **changes))


@pytest.mark.parametrize("model_type", configs.KEYS)
def test_keys_without_effect_are_allowed(model_type):
    extra = {"use_cache": False, "_name_or_path": "x", "torch_dtype": "bfloat16", "top_k": 50}
    extra |= {"transformers.js_config": {"a": 1}, "summary_type": "x", "rope_interleaved": False}
    extra |= {"max_length": 20, "another": None, "unsloth_fixed": True}
    assert read(model_type, **extra) == read(model_type)
