"""Makes masks.json: the tokens of conversations that TRL's SFTTrainer trains.

    pip install trl==1.16.0 torch && python tests/golden/trl/make_masks.py

The templates are those of tests/data/chat_templates, and TRL's own training templates where it has
one for a published template of the family. The tokenizer is a byte-level BPE, small enough to be
kept in the file.
"""

import json
import pathlib
import tempfile
from collections.abc import Sequence

import datasets
import tokenizers
import transformers
import trl
from tokenizers import decoders, models, pre_tokenizers, trainers
from trl import chat_template_utils

HERE = pathlib.Path(__file__).parent
TEMPLATES = HERE.parents[1] / "data" / "chat_templates"
SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
FAMILIES = ("llama2", "llama3", "chatml", "tulu", "mistral", "qwen3")
# The published templates of which TRL has a training template.
PUBLISHED = {"llama3": "llama3", "chatml": "qwen2_5", "qwen3": "qwen3"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "What is a router?"},
    {"role": "assistant", "content": "A matrix."},
    {"role": "user", "content": "And an expert?"},
    {"role": "assistant", "content": "A small network."},
]
NEWLINE = [TALK[0], {"role": "assistant", "content": "\nA matrix."}]  # "\n\n" is one token
# As Llama-3's and Qwen's tokenizers do, it keeps line breaks together and apart from words.
PIECES = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL) + 60,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [message["content"] for message in (SYSTEM, *TALK)]
    texts += ["system\n", "user\n", "assistant\n", "\n\n", "[INST]", "<think>\n\n</think>\n\n"]
    made.train_from_iterator(texts * 3, trainer)
    return made


def trained(
    fast: tokenizers.Tokenizer, template: str, records: Sequence[dict], **settings
) -> list[dict]:
    """The tokens of each record as SFTTrainer prepares them, and 1 for those with a label."""
    processing = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    processing.chat_template = template
    config = transformers.LlamaConfig(
        vocab_size=fast.get_vocab_size(),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            transformers.LlamaForCausalLM(config),
            trl.SFTConfig(
                folder, max_length=None, report_to=[], use_cpu=True, bf16=False, **settings
            ),
            train_dataset=datasets.Dataset.from_list(list(records)),
            processing_class=processing,
        )
        rows = list(trainer.train_dataset)
    return [
        {"ids": row["input_ids"], "mask": [int(label != -100) for label in row["labels"]]}
        for row in rows
    ]


def main() -> None:
    fast = tokenizer()
    talks = {True: [SYSTEM, *TALK], False: TALK}
    found = []

    def add(family: str, template: str, kind: str, records: dict[str, dict], **settings) -> None:
        rows = trained(fast, template, list(records.values()), **settings)
        for (name, record), row in zip(records.items(), rows, strict=True):
            found.append({"family": family, "kind": kind, "case": name, "record": record, **row})

    for family in FAMILIES:
        template = (TEMPLATES / f"{family}.jinja").read_text()
        completions = {
            f"turn {turn}{', system' * system}": {
                "prompt": talk[: 2 * turn - 1 + system],
                "completion": [talk[2 * turn - 1 + system]],
            }
            for system, talk in talks.items()
            for turn in (1, 2)
        }
        if family == "chatml":
            completions["newline"] = {"prompt": NEWLINE[:1], "completion": NEWLINE[1:]}
        add(family, template, "completion", completions)
        whole = {
            f"{turns} turns{', system' * system}": {"messages": talk[: 2 * turns + system]}
            for system, talk in talks.items()
            for turns in (1, 2)
        }
        # Qwen2.5's template writes a system turn of its own if there is none.
        if family == "chatml":
            whole = {name: record for name, record in whole.items() if "system" in name}
        if family in PUBLISHED:
            original = getattr(chat_template_utils, f"{PUBLISHED[family]}_chat_template")
            add(family, original, "assistant", whole, assistant_only_loss=True)
    marked = (TEMPLATES / "chatml_marked.jinja").read_text()
    whole = {"2 turns": {"messages": TALK}, "2 turns, system": {"messages": [SYSTEM, *TALK]}}
    whole["newline"] = {"messages": NEWLINE}
    add("chatml_marked", marked, "assistant", whole, assistant_only_loss=True)
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    made = {**versions, "tokenizer": json.loads(fast.to_str()), "masks": found}
    (HERE / "masks.json").write_text(json.dumps(made, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
