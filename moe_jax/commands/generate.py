"""Continues prompts with a model.

Examples:
  python scripts/generate.py --checkpoint=runs/quickstart/dense --prompt="To insert a table, "
  python scripts/generate.py --checkpoint=path/to/folder --prompt="The capital of France is" \\
      --prompt="Water boils at" --num_tokens=32 --temperature=0.7 --top_p=0.9
  python scripts/generate.py --checkpoint=path/to/folder --prompt="The capital of France is" \\
      --offload=0.5                          (a mixture that is larger than memory)
  python scripts/generate.py --checkpoint=path/to/folder --prompt="Once upon a time" \\
      --temperature=1 --samples=4 --output=generated.jsonl

The checkpoint is a Hugging Face folder (with its tokenizer.json or tokenizer.model) or a run's
workdir. Temperature 0, the default, takes the most likely token each time. A text ends at an
end token of generation_config.json, or else of config.json, or else of the tokenizer. --output
writes a line {"prompt", "text"} for each text, which evaluate.py --generated reads.
"""

import contextlib
import math
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import numpy as np

from moe_jax import command_line, files, stores, strict_json, untrusted
from moe_jax.evaluation import generate
from moe_jax.hf import folders, offload
from moe_jax.parallel import mesh


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's workdir, RUN@STEP or a Hugging Face folder",
    )
    text = "a text to continue; can be given several times"
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help=text)
    parser.add_argument("--num_tokens", type=int, default=64, help="number of tokens to generate")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens with this total probability",
    )
    parser.add_argument("--seed", type=command_line.seed, default=0, help="seed for sampling")
    number = "texts to sample for each prompt; the seeds of the later ones follow --seed"
    parser.add_argument("--samples", type=int, default=1, help=number)
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="FILE", help="a .jsonl file to write the texts to"
    )
    parser.add_argument("--tokenizer", help="a tokenizer to use instead of the model's own")
    parser.add_argument(
        "--offload",
        type=float,
        metavar="GB",
        help="keep at most this many GB of the experts in memory, and the others in the Hugging "
        "Face folder or, with an accelerator, in the host's memory (default: keep all)",
    )
    parser.add_argument("--allow_nonfinite", **stores.ALLOW_NONFINITE)
    arguments = parser.parse_args()
    in_range = 0 <= arguments.temperature < math.inf and 0 < arguments.top_p <= 1
    if arguments.num_tokens < 1 or not in_range:
        parser.error("--num_tokens is at least 1, --temperature at least 0, --top_p above 0 to 1")
    if arguments.offload is not None and not 0 < arguments.offload < math.inf:
        parser.error(f"--offload={arguments.offload} must be more than 0")
    if arguments.samples < 1 or (arguments.samples > 1 and not arguments.temperature):
        parser.error(
            f"--samples={arguments.samples}: use at least 1, and 1 with --temperature=0, which "
            "always gives the same text"
        )
    with parser.refusing():
        if arguments.output is not None and not arguments.output.parent.is_dir():
            raise ValueError(f"--output={arguments.output}: its folder does not exist; make it")
        texts = run(arguments)
        if arguments.output is None:
            # A model's text may hold any character; a terminal would obey some of them.
            shown = untrusted.page if sys.stdout.isatty() else str
            print("\n".join(shown(text.whole) for text in texts))
        else:
            lines = [strict_json.text({"prompt": t.prompt, "text": t.text}) + "\n" for t in texts]
            files.write_text(arguments.output, "".join(lines))
            print(f"{len(lines)} texts in {arguments.output}")


class Text(NamedTuple):
    """A prompt, the text after it, and the two as the tokenizer decodes them together."""

    prompt: str
    text: str
    whole: str


def run(arguments) -> list[Text]:
    """The texts in the order of the prompts, with all samples of a prompt together."""
    source = stores.find(arguments.checkpoint)
    folder, allow, store = source.folder, arguments.allow_nonfinite, None
    if arguments.offload is None:
        model_config, params = stores.load(source, mesh.one_device(), allow_nonfinite=allow)
    elif not folders.is_folder(folder):
        raise ValueError(
            f"--offload reads a Hugging Face folder; make one of {folder} with convert"
        )
    elif jax.default_backend() == "cpu":
        model_config, params, store = offload.load(
            folder, 1e9 * arguments.offload, allow_nonfinite=allow
        )
    else:
        model_config, params = offload.load_into_host_memory(
            folder, 1e9 * arguments.offload, allow_nonfinite=allow
        )
    tokenizer = stores.tokenizer_for(folder, model_config, arguments.tokenizer)
    prompts = [tokenizer.prompt(text) for text in arguments.prompt]
    began = time.perf_counter()
    with store.failing_as_it_is() if store else contextlib.nullcontext():
        rounds = [
            generate.generate(
                params,
                model_config,
                prompts,
                num_tokens=arguments.num_tokens,
                temperature=arguments.temperature,
                top_p=arguments.top_p,
                key=jax.random.key(arguments.seed + sample),
            )
            for sample in range(arguments.samples)
        ]
    if store:
        number = len(prompts) * arguments.samples * arguments.num_tokens
        print(_summary(store.counts, number, began), file=sys.stderr)
    texts, ends = [], stores.end_ids(folder, tokenizer)
    by_prompt = zip(*rounds, strict=True)
    for prompt, prompt_ids, samples in zip(arguments.prompt, prompts, by_prompt, strict=True):
        begin = tokenizer.decode(prompt_ids)
        for ids in samples:
            ids = ids[~np.logical_or.accumulate(np.isin(ids, ends))]
            whole = tokenizer.decode(np.concatenate([prompt_ids, ids]))
            # A text decoded alone would lose the space before its first word in some tokenizers.
            joins = whole.startswith(begin)
            text = whole[len(begin) :] if joins else tokenizer.decode(ids)
            texts.append(Text(prompt, text, whole))
    return texts


def _summary(counts: offload.Counts, num_tokens: int, began: float) -> str:
    seconds, total = time.perf_counter() - began, counts.in_memory + counts.ahead + counts.waited
    return (
        f"{num_tokens} tokens in {seconds:.1f} s ({num_tokens / seconds:.2f} tokens/s, with "
        f"compilation); {counts.bytes_read / 1e9:.2f} GB read; of the experts' matrices, "
        f"{counts.in_memory / total:.0%} were in memory, {counts.ahead / total:.0%} were fetched "
        f"ahead, {counts.waited / total:.0%} were waited for"
    )
